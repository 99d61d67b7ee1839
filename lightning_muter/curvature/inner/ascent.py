"""One inner problem: a batch at fixed weights, and ascents in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.anderson import Anderson
from lightning_muter.curvature.inner.newton import Newton
from lightning_muter.curvature.problem.head import HeadProblem


@dataclass
class Maximisers:
    """delta (n, D), value of the inner objective (n,), residual (n,), iterations used.

    Attributes:
        rivals: other local maxima (m, n, D), with values (m, n), -inf where one is none.
        prior: weights q (1 + m, n) of the maximiser and its rivals, summing to 1 (`curvature.contest`).
        frozen: which rivals are maxima no more, but points where one was (m, n) (`curvature.rivals`).
    """

    delta: Tensor
    value: Tensor
    residual: Tensor
    iterations: int
    tolerance: float
    rivals: Tensor | None = None
    rival_values: Tensor | None = None
    prior: Tensor | None = None
    frozen: Tensor | None = None

    @property
    def converged(self) -> Tensor:
        return self.residual <= self.tolerance


@dataclass
class Inner:
    """The inner problem of a batch at fixed weights, and ascents in it."""

    problem: HeadProblem
    theta: Tensor
    threat: ThreatModel
    x: Tensor
    y: Tensor
    rho: Rho
    tol: float

    def take(self, rows: Tensor) -> Inner:
        return replace(self, x=self.x[rows], y=self.y[rows], rho=self.rho.take(rows))

    def of(
        self, rows: Tensor | None, delta: Tensor, ascend: Callable[[Inner, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Ends and values of ascents from some rows (all of them: None); -inf elsewhere."""
        if rows is None or len(rows) == len(delta):
            return ascend(self, delta)
        ends, values = delta.clone(), self.lowest()
        if len(rows):
            ends[rows], values[rows] = ascend(self.take(rows), delta[rows])
        return ends, values

    def value(self, delta: Tensor) -> Tensor:
        loss, _ = self.problem.loss_and_input_gradient(self.theta, self.x + delta, self.y)
        return loss.to(self.problem.dtype) + self.rho.value(delta)

    def lowest(self) -> Tensor:
        """-inf for every sample. Values are of the algebra's dtype, maximisers of the model's."""
        return torch.full((len(self.x),), -math.inf, dtype=self.problem.dtype, device=self.x.device)

    def short(self, delta: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        if steps == 0:  # nothing to compare with
            return delta, torch.zeros_like(self.lowest())
        found = self.ascend(delta, steps, 0.0)
        return found.delta, found.value

    def shrinking(self, delta: Tensor, steps: int, step: float, shrink: float) -> tuple[Tensor, Tensor]:
        """The best iterate, and its value, of projected steps of length step * eps, each ``shrink`` times the last.

        Maximisers of a ReLU network like to sit on kinks, where monotone ascent zigzags and stalls; steps that may fall
        and shrink get past them (a subgradient method).
        """
        threat, x, rho = self.threat, self.x, self.rho
        best, value = delta, self.lowest()
        for _ in range(steps):
            loss, gradient = self.problem.loss_and_input_gradient(self.theta, x + delta, self.y)
            now = loss.to(value) + rho.value(delta)
            rose = now > value
            best, value = torch.where(rose[:, None], delta, best), torch.where(rose, now, value)
            slope = gradient + rho.gradient(delta)
            size = threat.ball.length(slope).clamp(min=torch.finfo(x.dtype).tiny)
            delta = rho.maximise(threat, gradient, delta, size / (step * threat.eps), x)
            step *= shrink
        return best, value

    def ascend(self, delta: Tensor, max_iter: int, tol: float, falls_allowed: int = 0) -> Maximisers:
        """Monotone ascent; samples whose steps fall ``falls_allowed`` times sit on a kink of the backbone and are left there."""
        problem, theta, threat, x, y, rho = self.problem, self.theta, self.threat, self.x, self.y, self.rho
        delta = delta.clone()
        loss, gradient = problem.loss_and_input_gradient(theta, x + delta, y)
        value = loss.to(problem.dtype) + rho.value(delta)
        damping = torch.zeros(len(x), 1, dtype=x.dtype, device=x.device)  # 1/t
        residual = torch.full_like(value, math.inf)
        live = torch.arange(len(x), device=x.device)
        # gradients are measured by the largest one met: at an interior maximum they vanish
        size = gradient.norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        if not problem.backbone.piecewise_linear and bool(delta.any()):
            size = torch.maximum(size, problem.loss_and_input_gradient(theta, x, y)[1].norm(dim=1).to(size))
        falls = torch.zeros_like(live)
        kinked, limit = falls_allowed > 0, falls_allowed or max_iter
        memory = Anderson(delta) if threat.ball.euclidean and not kinked else None
        c = self.rho.c if tol else None  # a few steps need no more than to be compared
        newton = Newton(problem, theta, x, y, c) if c is not None and Newton.serves(problem, c) else None
        iterations = 0
        for done in range(max_iter):
            iterations = done + 1
            d, g, xl, part = delta[live], gradient[live], x[live], rho.take(live)
            pull = damping[live]
            candidate = part.maximise(threat, g, d, pull, xl)
            # in units of the ball, as if the step had been a full one
            size[live] = torch.maximum(size[live], g.norm(dim=1))
            unit = threat.eps / size[live]
            moved = (candidate - d).norm(dim=1) / threat.eps * (1 + pull[:, 0] * unit)
            residual[live] = moved.to(residual)
            # a proximal term this strong means a kink of the backbone: no direction rises any more
            going = (moved > tol) & (pull[:, 0] * unit <= 1e13) & (falls[live] < limit)
            if not bool(going.all()):
                live = live[going]
                if len(live) == 0:
                    break
                d, g, xl, part = d[going], g[going], xl[going], part.take(going)
                candidate, unit, pull = candidate[going], unit[going], pull[going]
            candidate, mixed = self._accelerated(live, d, candidate, part, memory, newton)
            new_loss, new_gradient = problem.loss_and_input_gradient(theta, xl + candidate, y[live])
            new_value = new_loss.to(value) + part.value(candidate)
            change, noise = new_value - value[live], 16 * torch.finfo(x.dtype).eps * (1 + value[live].abs())
            # where differences of values are rounding, steps must grow shorter (a symmetric contraction near a strict
            # maximum): values alone settle positions to the square root of the precision only
            again = part.maximise(threat, new_gradient, candidate, pull, xl)
            shrinks = (again - candidate).norm(dim=1) <= (candidate - d).norm(dim=1)
            # (of a linear model every step rises but for rounding, away from a saddle longer and longer)
            rose = torch.where(change.abs() <= noise, shrinks | problem.backbone.affine, change >= 0)
            if bool(rose.all()):
                delta[live], gradient[live], value[live] = candidate, new_gradient, new_value
                damping[live] = damping[live] / 3
                continue
            up, down = live[rose], live[~rose & ~mixed]
            for accelerator in (memory, newton):
                if accelerator is not None:
                    accelerator.forget(live[~rose])
            delta[up], gradient[up], value[up] = candidate[rose], new_gradient[rose], new_value[rose]
            damping[up] = damping[up] / 3
            damping[down] = torch.maximum(damping[down] * 6, unit[~rose & ~mixed, None].reciprocal())
            falls[down] += 1
        return Maximisers(delta, value, residual, iterations, tol)

    def _accelerated(
        self, live: Tensor, d: Tensor, plain: Tensor, part: Rho, memory: Anderson | None, newton: Newton | None
    ) -> tuple[Tensor, Tensor]:
        """Better points than the plain steps' of these samples, where there are some, and where that is."""
        x = self.x[live]
        if memory is not None:
            trial, mixed = memory.mix(live, d, plain)
            return torch.where(mixed[:, None], self._onto(plain, trial, x), plain), mixed
        if newton is not None:
            trial, mixed = newton.mix(live, d, plain, part.inside(plain))
            return torch.where(mixed[:, None], self.threat.project(trial, x), plain), mixed
        return plain, torch.zeros_like(live, dtype=torch.bool)

    def _onto(self, plain: Tensor, mixed: Tensor, x: Tensor) -> Tensor:
        """Mixed points back in the Euclidean ball; on the sphere if the plain ones are."""
        size = mixed.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        outside = plain.norm(dim=1, keepdim=True) >= self.threat.eps * (1 - 1e-9)
        mixed = torch.where(outside, mixed * (self.threat.eps / size).clamp(min=1.0), mixed)
        return self.threat.project(mixed, x)


class Rho:
    """rho and the exact maximiser of <g, delta> + rho(delta) - damping/2 |delta - d|^2 over B."""

    def __init__(self, threat: ThreatModel, x: Tensor, c: Tensor | None) -> None:
        self.c: Tensor | None = None
        if c is not None:
            lo, hi = threat.bounds(x)
            self.c, self.mid, self.half = c.to(x), (lo + hi) / 2, (hi - lo) / 2

    def take(self, index: Tensor) -> Rho:
        part = object.__new__(Rho)
        part.c = None
        if self.c is not None:
            part.c, part.mid, part.half = self.c[index], self.mid[index], self.half[index]
        return part

    def inside(self, delta: Tensor) -> Tensor:
        """Which coordinates do not lie on a face of the box (n, D)."""
        return (delta - self.mid).abs() < self.half

    def value(self, delta: Tensor) -> Tensor:
        if self.c is None:
            return delta.new_zeros(len(delta))
        return (self.c * (self.half.square() - (delta - self.mid).square())).sum(1) / 2

    def gradient(self, delta: Tensor) -> Tensor:
        return torch.zeros_like(delta) if self.c is None else -self.c * (delta - self.mid)

    def maximise(self, threat: ThreatModel, g: Tensor, d: Tensor, damping: Tensor, x: Tensor) -> Tensor:
        if self.c is not None:  # separable: L-infinity
            return threat.project((g + self.c * self.mid + damping * d) / (self.c + damping), x)
        best = threat.linear_maximiser(g, x)
        damped = threat.project(d + g / damping.clamp(min=torch.finfo(d.dtype).tiny), x)
        return torch.where(damping > 0, damped, best)
