"""The inner maximiser: where the adversary sits, how well that is known, and how smooth it is in the weights.

    phi_i(w) = max over delta in B(x_i) of  l(w, x_i + delta, y_i) + rho_i(delta),
    rho_i(delta) = 1/2 sum_j c_ij (h_ij^2 - (delta_j - m_ij)^2)            (m, h: centre and half-width of coordinate j)

The concave term rho is 0 for an L2 ball (c = 0). For an L-infinity ball, the maximiser of a convex loss is a vertex that
jumps as w moves: phi has a kink at each jump and its pointwise Hessian misses them. With

    c_ij = s lambda_max(d2l/dx2) + tau mean_j|g_ij| / h_ij           at the clean sample and at fixed *anchor* weights

the maximiser leaves the vertex only where the loss is nearly flat in coordinate j (within the bandwidth of a switch), the
inner problem is concave at the anchor, and phi is once continuously differentiable: this is the convolution of the switch with
a box kernel (`curvature.response`), written as an objective, so that polish, refine, certificate and curvature
all speak of the same function. rho is 0 at the vertices and rho >= 0: phi <= phi_smooth <= phi + max rho.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_muter.curvature.problem import HeadProblem
from lightning_muter.threat import ThreatModel


@dataclass(frozen=True)
class Smoothing:
    """How the switches of an L-infinity maximiser are smoothed; frozen with the snapshot.

    Args:
        strength: s, multiple of the largest input curvature at the anchor; 1 makes the inner problem concave there.
        bandwidth: tau, relative to the mean input gradient of the sample.
        anchor: theta at which both are evaluated (``None``: no smoothing).
    """

    strength: float = 1.0
    bandwidth: float = 0.03
    anchor: Tensor | None = None

    def coefficients(self, problem: HeadProblem, threat: ThreatModel, x: Tensor, y: Tensor) -> Tensor | None:
        """c_ij (n, D), or ``None`` where nothing is smoothed; depends on the sample and the anchor alone."""
        if self.anchor is None or threat.norm != "linf" or threat.eps == 0 or not (self.strength or self.bandwidth):
            return None
        z = problem.logits(self.anchor, problem.backbone(x).detach())
        terms = problem.terms(z, y)
        gradient = problem.backbone.pullback(x, (terms.r @ problem.weight(self.anchor))[:, None])[:, 0]
        assert terms.hess is not None
        root = problem.curvature_root(self.anchor, x, terms.hess)
        top = torch.linalg.eigvalsh(root.mT @ root)[:, -1:].clamp(min=0.0)
        lo, hi = threat.bounds(x.to(gradient))
        half = ((hi - lo) / 2).clamp(min=1e-3 * threat.eps)
        return self.strength * top + self.bandwidth * gradient.abs().mean(1, keepdim=True) / half


@dataclass
class Maximisers:
    """delta (n, D), value of the inner objective (n,), residual (n,), iterations used."""

    delta: Tensor
    value: Tensor
    residual: Tensor
    iterations: int
    tolerance: float

    def better(self, other: Maximisers) -> Maximisers:
        """Sample by sample the one of larger value."""
        wins = other.value > self.value + 1e-9 * (1 + self.value.abs())
        return Maximisers(
            torch.where(wins[:, None], other.delta, self.delta),
            torch.where(wins, other.value, self.value),
            torch.where(wins, other.residual, self.residual),
            max(self.iterations, other.iterations),
            self.tolerance,
        )

    @property
    def converged(self) -> Tensor:
        return self.residual <= self.tolerance


@dataclass
class InnerSolver:
    """Monotone ascent for the inner problem, per sample and reproducible.

    Each step maximises the linearised loss plus rho exactly over B, minus a proximal term (1/2t)|delta' - delta|^2 whose
    1/t is 0 until a step fails to rise (for a loss convex in x it never does). The residual is the length of the next step
    over eps, scaled up by what the proximal term takes from it: 0 exactly at a stationary point of the inner problem.

    Args:
        tolerance: on the residual; ``None``: 1e-9 in float64, 1e-5 in float32.
        max_iter: gradient steps per solve.
        starts: screen a start towards every other class and keep the best (linear models); the others start at 0.
    """

    tolerance: float | None = None
    max_iter: int = 300
    starts: bool = True
    screening: int = field(default=3, repr=False)
    descent: int = field(default=80, repr=False)
    tracking: int = field(default=10, repr=False)
    finish: int = field(default=6, repr=False)

    def tolerance_for(self, dtype: torch.dtype) -> float:
        if self.tolerance is not None:
            return self.tolerance
        return 1e-9 if dtype == torch.float64 else 1e-5

    def solve(
        self,
        problem: HeadProblem,
        theta: Tensor,
        threat: ThreatModel,
        x: Tensor,
        y: Tensor,
        c: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Maximisers:
        """Maximise from ``start`` (n, D), or from scratch: the result then depends on the sample and theta alone."""
        x = x.to(problem.backbone.exact_dtype)
        tol = self.tolerance_for(x.dtype)
        if threat.eps == 0:
            zero = torch.zeros_like(x)
            value, _ = problem.loss_and_input_gradient(theta, x, y)
            return Maximisers(zero, value, value * 0, 0, tol)
        rho = Rho(threat, x, c)
        if start is not None:
            first = threat.project(start.to(x), x)
        else:
            first = self._screen(problem, theta, threat, x, y, rho)
        if problem.backbone.affine or not problem.backbone.piecewise_linear:
            return self._ascend(problem, theta, threat, x, y, rho, first, self.max_iter, tol)
        steps, step = (self.descent, 1.0) if start is None else (self.tracking, 0.1)
        first = self._shrinking(problem, theta, threat, x, y, rho, first, steps, step)
        return self._ascend(problem, theta, threat, x, y, rho, first, self.max_iter, tol, kinked=True)

    def _shrinking(
        self,
        problem: HeadProblem,
        theta: Tensor,
        threat: ThreatModel,
        x: Tensor,
        y: Tensor,
        rho: Rho,
        delta: Tensor,
        steps: int,
        step: float,
    ) -> Tensor:
        """The best iterate of projected steps of length step * eps, shrinking by a twentieth (scratch) or a quarter (tracked:
        short enough to stay with the same local maximum).

        Maximisers of a ReLU network like to sit on kinks, where monotone ascent zigzags and stalls; steps that may fall
        and shrink get past them (a subgradient method).
        """
        shrink = 0.95 if step == 1.0 else 0.75
        best, value = delta, torch.full_like(x[:, 0], -math.inf)
        for _ in range(steps):
            loss, gradient = problem.loss_and_input_gradient(theta, x + delta, y)
            now = loss.to(x) + rho.value(delta)
            rose = now > value
            best, value = torch.where(rose[:, None], delta, best), torch.where(rose, now, value)
            slope = gradient + rho.gradient(delta)
            size = slope.norm(dim=1, keepdim=True) if threat.norm == "l2" else slope.abs().mean(1, keepdim=True)
            size = size.clamp(min=torch.finfo(x.dtype).tiny)
            pull = size / (step * threat.eps)
            delta = rho.maximise(threat, gradient, delta, pull, x)
            step *= shrink
        return best

    def _screen(
        self, problem: HeadProblem, theta: Tensor, threat: ThreatModel, x: Tensor, y: Tensor, rho: Rho
    ) -> Tensor:
        """The best of a few short ascents: from 0, and towards every logit (linear models; a single logit both ways)."""
        zero = torch.zeros_like(x)
        if not (self.starts and problem.backbone.affine and problem.n_logits != 2 and rho.c is None):
            return zero
        best = self._ascend(problem, theta, threat, x, y, rho, zero, self.screening, 0.0)
        delta, value = best.delta, best.value
        weight = problem.weight(theta)
        if problem.n_logits == 1:  # a loss such as the square rises both ways
            directions = [weight.expand(len(x), -1), -weight.expand(len(x), -1)]
        else:
            own = weight[y] if not y.is_floating_point() and y.dim() == 1 else weight.mean(0).expand(len(x), -1)
            directions = [weight[k] - own for k in range(problem.n_logits)]
        for direction in directions:
            towards = problem.backbone.pullback(x, direction[:, None])[:, 0]
            tried = self._ascend(
                problem, theta, threat, x, y, rho, threat.linear_maximiser(towards, x), self.screening, 0.0
            )
            # a start must win clearly: equal maxima up to rounding may not change places
            better = tried.value > value + 1e-9 * (1 + value.abs())
            delta = torch.where(better[:, None], tried.delta, delta)
            value = torch.where(better, tried.value, value)
        return delta

    def _ascend(
        self,
        problem: HeadProblem,
        theta: Tensor,
        threat: ThreatModel,
        x: Tensor,
        y: Tensor,
        rho: Rho,
        delta: Tensor,
        max_iter: int,
        tol: float,
        kinked: bool = False,
    ) -> Maximisers:
        """Monotone ascent; ``kinked``: samples whose steps fall again and again sit on a kink and are left there."""
        delta = delta.clone()
        loss, gradient = problem.loss_and_input_gradient(theta, x + delta, y)
        value = loss + rho.value(delta)
        damping = torch.zeros(len(x), 1, dtype=x.dtype, device=x.device)  # 1/t
        residual = torch.full_like(value, math.inf)
        live = torch.arange(len(x), device=x.device)
        # gradients are measured by the largest one met: at an interior maximum they vanish
        size = gradient.norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        if not problem.backbone.piecewise_linear and bool(delta.any()):
            size = torch.maximum(size, problem.loss_and_input_gradient(theta, x, y)[1].norm(dim=1).to(size))
        falls = torch.zeros_like(live)
        limit = max_iter if not kinked else self.finish
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
            new_loss, new_gradient = problem.loss_and_input_gradient(theta, xl + candidate, y[live])
            new_value = new_loss + part.value(candidate)
            change, noise = new_value - value[live], 16 * torch.finfo(x.dtype).eps * (1 + value[live].abs())
            # where differences of values are rounding, steps must grow shorter (a symmetric contraction near a strict
            # maximum): values alone settle positions to the square root of the precision only
            again = part.maximise(threat, new_gradient, candidate, pull, xl)
            shrinks = (again - candidate).norm(dim=1) <= (candidate - d).norm(dim=1)
            rose = torch.where(change.abs() <= noise, shrinks, change >= 0)
            if bool(rose.all()):
                delta[live], gradient[live], value[live] = candidate, new_gradient, new_value
                damping[live] = damping[live] / 3
                continue
            up, down = live[rose], live[~rose]
            delta[up], gradient[up], value[up] = candidate[rose], new_gradient[rose], new_value[rose]
            damping[up] = damping[up] / 3
            damping[down] = torch.maximum(damping[down] * 6, unit[~rose, None].reciprocal())
            falls[down] += 1
        return Maximisers(delta, value, residual, iterations, tol)


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
