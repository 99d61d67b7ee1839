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
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.anderson import Anderson
from lightning_muter.curvature.inner.local_maxima import Several, ranked
from lightning_muter.curvature.inner.newton import Newton
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.solvers.eigen import symmetric_eigenvalues


@dataclass(frozen=True)
class Smoothing:
    """How the switches of an L-infinity maximiser are smoothed; frozen with the snapshot.

    Args:
        strength: s, multiple of the largest input curvature at the anchor; 1 makes the inner problem concave there.
        bandwidth: tau, relative to the mean input gradient of the sample.
        anchor: theta at which both are evaluated (``None``: no smoothing).
        temperature: T of the soft maximum over local maxima (`curvature.contest`; smooth nonlinear backbones), in units of the loss;
            0: the largest alone.
    """

    strength: float = 1.0
    bandwidth: float = 0.03
    anchor: Tensor | None = None
    temperature: float = 0.005

    @classmethod
    def of(cls, problem: HeadProblem) -> Smoothing:
        """The default. A linear model gets a quarter more than keeps its inner problem concave at the anchor, so that it stays
        so at the weights to which a removal leads."""
        return cls(strength=1.25) if problem.backbone.affine else cls()

    def coefficients(self, problem: HeadProblem, threat: ThreatModel, x: Tensor, y: Tensor) -> Tensor | None:
        """c_ij (n, D), or ``None`` where nothing is smoothed; depends on the sample and the anchor alone."""
        if self.anchor is None or not threat.jumps or not (self.strength or self.bandwidth):
            return None
        z = problem.logits(self.anchor, problem.backbone(x).detach())
        terms = problem.terms(z, y)
        gradient = problem.backbone.pullback(x, (terms.r @ problem.weight(self.anchor))[:, None])[:, 0]
        assert terms.hess is not None
        root = problem.curvature_root(self.anchor, x, terms.hess)
        top = symmetric_eigenvalues(root.mT @ root)[:, -1:].clamp(min=0.0)
        lo, hi = threat.bounds(x.to(gradient))
        half = ((hi - lo) / 2).clamp(min=1e-3 * threat.eps)
        return self.strength * top + self.bandwidth * gradient.abs().mean(1, keepdim=True) / half


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
class InnerSolver:
    """Monotone ascent for the inner problem, per sample and reproducible.

    Each step maximises the linearised loss plus rho exactly over B, minus a proximal term (1/2t)|delta' - delta|^2 whose
    1/t is 0 until a step fails to rise (for a loss convex in x it never does). The residual is the length of the next step
    over eps, scaled up by what the proximal term takes from it: 0 exactly at a stationary point of the inner problem.

    A nonconcave inner problem has several local maxima, and phi is the largest: short ascents from 0 and towards the other
    classes are compared, the best one goes on. The next best are *rivals*: when the maximisers are tracked over moving
    weights, they go along and take over where they win, so that phi stays the largest (and convex in the head).

    Args:
        tolerance: on the residual; ``None``: 1e-9 in float64, 1e-5 in float32.
        max_iter: gradient steps per solve.
        starts: the number of classes to start towards, those of the largest logits first; 0: start at 0 only.
        rivals: how many other local maxima are tracked (nonlinear backbones).
        as_found: sums at the points that a snapshot stores take them as they are: the head was trained on at these very points
            (`minimise.cuts`), and another ascent would find others.
    """

    tolerance: float | None = None
    max_iter: int = 300
    starts: int = 9
    rivals: int = 2
    tracking: int = field(default=10, repr=False)
    finish: int = field(default=6, repr=False)
    as_found: bool = False

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
        rivals: Tensor | None = None,
        prior: Tensor | None = None,
        explore: bool = False,
        margin: float = 0.0,
    ) -> Maximisers:
        """Maximise from ``start`` (n, D) and ``rivals`` (m, n, D); or from scratch: the result then depends on the sample and
        theta alone. ``explore``: from both. Rivals within ``margin`` of the best are maximised as it is; ``prior`` (1 + m, n)
        goes along with the tracked ones."""
        x = x.to(problem.backbone.exact_dtype)
        tol = self.tolerance_for(x.dtype)
        if threat.eps == 0:
            zero = torch.zeros_like(x)
            value, _ = problem.loss_and_input_gradient(theta, x, y)
            return Maximisers(zero, value, value * 0, 0, tol)
        one = _Inner(problem, theta, threat, x, y, Rho(threat, x, c), tol)
        affine = problem.backbone.affine
        kinked = problem.backbone.piecewise_linear and not affine
        near = (
            [] if start is None else [threat.project(d.to(x), x) for d in (start, *(() if rivals is None else rivals))]
        )
        if prior is None:
            prior = x.new_full((len(near), len(x)), 1 / max(len(near), 1))
        else:
            prior = prior.to(x)
        far = self._starts(one) if start is None or explore else []
        alone = len(near) + len(far) == 1
        tried = []
        for j, delta in enumerate(near):
            # of a linear model's only those that have a weight: it is looked at afresh in every evaluation
            rows = prior[j].nonzero()[:, 0] if affine and j else None
            tried.append(one.of(rows, delta, lambda part, d: self._near(part, d, kinked, alone)))
        tried += [self._far(one, delta, kinked, alone) for delta in far]
        deltas, values = torch.stack([d for d, _ in tried]), torch.stack([v for _, v in tried])
        places, heights = ranked(deltas, values, self.rivals if margin or not affine else 0)
        far_away = kinked and bool(far)
        found = self._finish(one, places[0], kinked, far_away)
        if len(places) == 1:
            return found
        places[0], first = found.delta, heights[1:]
        heights = torch.full_like(heights, -math.inf)
        heights[0] = found.value
        for j in range(1, len(places)):
            rows = (first[j - 1] > found.value - 2 * margin).nonzero()[:, 0] if margin else x.new_zeros(0).long()
            if len(rows):
                more = self._finish(one.take(rows), places[j, rows], kinked, far_away)
                places[j, rows], heights[j, rows] = more.delta, more.value
        several = Several(places, heights)
        several.merge()
        if near:
            tracked = (prior if affine else prior.clamp(min=1e-12)).to(heights)
            height = (lambda rows, d: one.take(rows).value(d)) if affine and margin else None
            several.inherit(torch.stack(near), deltas[: len(near)], tracked, margin, height)
        several.settle(fresh=explore or not near)
        found.rivals, found.rival_values = several.places[1:], several.heights[1:]
        found.prior, found.frozen = several.weights, several.frozen[1:]
        return found

    def _finish(self, one: _Inner, delta: Tensor, kinked: bool, far_away: bool) -> Maximisers:
        if far_away:
            delta, _ = one.shrinking(delta, 60, 0.5, 0.92)
        return one.ascend(delta, self.max_iter, one.tol, self.finish if kinked else 0)

    def _near(self, one: _Inner, delta: Tensor, kinked: bool, alone: bool) -> tuple[Tensor, Tensor]:
        """A little up from a tracked maximiser: short steps, so that it stays with its local maximum."""
        if kinked:
            return one.shrinking(delta, self.tracking, 0.1, 0.75)
        return one.short(delta, 0 if alone else 5)

    def _far(self, one: _Inner, delta: Tensor, kinked: bool, alone: bool) -> tuple[Tensor, Tensor]:
        """Up from far away, until the better maxima can be told."""
        if kinked:
            return one.shrinking(delta, 20, 1.0, 0.8)
        return one.short(delta, 0 if alone else 3 if one.problem.backbone.affine else 4)

    def _starts(self, one: _Inner) -> list[Tensor]:
        """0, and the ball's furthest points towards the most likely other classes (a single logit: both ways), then, for want of
        classes, in directions that are the same for every sample."""
        problem, x = one.problem, one.x
        zero = torch.zeros_like(x)
        if not self.starts or problem.n_logits == 2:
            return [zero]
        weight = problem.weight(one.theta)
        if problem.n_logits == 1:  # a loss such as the square rises both ways
            directions = [weight.expand(len(x), -1), -weight.expand(len(x), -1)]
        else:
            likely = problem.logits(one.theta, problem.backbone(x).detach())
            own = weight.mean(0).expand(len(x), -1)
            y = one.y
            if not y.is_floating_point() and y.dim() == 1 and bool(((y >= 0) & (y < problem.n_logits)).all()):
                own = weight[y]
                likely = likely.scatter(1, y[:, None], -math.inf)
            order = likely.argsort(1, descending=True)[:, : min(self.starts, problem.n_logits - 1)]
            directions = [weight[k] - own for k in order.unbind(1)]
        covectors = torch.stack(directions, 1)
        towards = list(problem.backbone.pullback(x, covectors).to(x).unbind(1))
        if (
            problem.backbone.piecewise_linear and not problem.backbone.affine and one.threat.jumps
        ):  # many corners, many kinks
            towards += [g.expand_as(x) for g in _directions(self.starts - len(towards), x)]
        return [zero, *(one.threat.linear_maximiser(g, x) for g in towards)]


def _directions(count: int, x: Tensor) -> Tensor:
    """Random directions (count, D), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(max(count, 0), x.shape[1], generator=generator, dtype=torch.float64).to(x)


@dataclass
class _Inner:
    """The inner problem of a batch at fixed weights, and ascents in it."""

    problem: HeadProblem
    theta: Tensor
    threat: ThreatModel
    x: Tensor
    y: Tensor
    rho: Rho
    tol: float

    def take(self, rows: Tensor) -> _Inner:
        return replace(self, x=self.x[rows], y=self.y[rows], rho=self.rho.take(rows))

    def of(
        self, rows: Tensor | None, delta: Tensor, ascend: Callable[[_Inner, Tensor], tuple[Tensor, Tensor]]
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
