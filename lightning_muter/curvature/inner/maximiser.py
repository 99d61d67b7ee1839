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

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.ascent import Inner, Maximisers, Rho
from lightning_muter.curvature.inner.local_maxima import Several, ranked
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.solvers.eigen import symmetric_eigenvalues


@dataclass(frozen=True)
class Smoothing:
    """How the switches of an L-infinity maximiser are smoothed; frozen with the snapshot.

    Args:
        strength: s, multiple of the largest input curvature at the anchor; 1 makes the inner problem concave there.
        bandwidth: tau, relative to the mean input gradient of the sample.
        anchor: theta at which both are evaluated (``None``: no smoothing).
        temperature: T of the soft maximum over local maxima (smooth nonlinear backbones), in units of the loss; 0: the largest
            alone.
        directions: of the logits' curvature that lambda_max is looked for in, the leading ones, a pass over the backbone each;
            None: all.

    >>> Smoothing(bandwidth=0.01)
    Smoothing(strength=1.0, bandwidth=0.01, anchor=None, temperature=0.005, directions=None)
    """

    strength: float = 1.0
    bandwidth: float = 0.03
    anchor: Tensor | None = None
    temperature: float = 0.005
    directions: int | None = None

    @classmethod
    def of(cls, problem: HeadProblem) -> Smoothing:
        """The default of a model.

        A linear model gets a quarter more than keeps its inner problem concave at the anchor, so that it stays so at the weights
        to which a removal leads.

        Args:
            problem: the model as a function of its head.
        """
        return cls(strength=1.25) if problem.backbone.affine else cls()

    def coefficients(self, problem: HeadProblem, threat: ThreatModel, x: Tensor, y: Tensor) -> Tensor | None:
        """c_ij = s lambda_max(d2l/dx2) + tau mean_j|g_ij| / h_ij at the anchor; depends on the sample and the anchor alone.

        Args:
            problem: the model as a function of its head.
            threat: the set of perturbations, with half-widths h_ij.
            x: samples (n, D).
            y: their labels.

        Returns:
            c (n, D), or ``None`` where nothing is smoothed.
        """
        if self.anchor is None or not threat.jumps or not (self.strength or self.bandwidth):
            return None
        z = problem.logits(self.anchor, problem.backbone(x).detach())
        terms = problem.terms(z, y)
        gradient = problem.backbone.pullback(x, (terms.r @ problem.weight(self.anchor))[:, None])[:, 0]
        assert terms.hess is not None
        root = problem.curvature_root(self.anchor, x, terms.hess, directions=self.directions)
        top = symmetric_eigenvalues(root.mT @ root)[:, -1:].clamp(min=0.0)
        lo, hi = threat.bounds(x.to(gradient))
        half = ((hi - lo) / 2).clamp(min=1e-3 * threat.eps)
        return self.strength * top + self.bandwidth * gradient.abs().mean(1, keepdim=True) / half


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
        """On the residual, in this precision."""
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
        """Maximise from ``start`` (n, D) and ``rivals`` (m, n, D), or from scratch.

        From scratch the result depends on the sample and theta alone. ``explore``: from both. Rivals within ``margin`` of the best
        are maximised as it is; ``prior`` (1 + m, n) goes along with the tracked ones.
        """
        x = x.to(problem.backbone.exact_dtype)
        tol = self.tolerance_for(x.dtype)
        if threat.eps == 0:
            zero = torch.zeros_like(x)
            value, _ = problem.loss_and_input_gradient(theta, x, y)
            return Maximisers(zero, value, value * 0, 0, tol)
        one = Inner(problem, theta, threat, x, y, Rho(threat, x, c), tol)
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

    def _finish(self, one: Inner, delta: Tensor, kinked: bool, far_away: bool) -> Maximisers:
        if far_away:
            delta, _ = one.shrinking(delta, 60, 0.5, 0.92)
        return one.ascend(delta, self.max_iter, one.tol, self.finish if kinked else 0)

    def _near(self, one: Inner, delta: Tensor, kinked: bool, alone: bool) -> tuple[Tensor, Tensor]:
        """A little up from a tracked maximiser: short steps, so that it stays with its local maximum."""
        if kinked:
            return one.shrinking(delta, self.tracking, 0.1, 0.75)
        return one.short(delta, 0 if alone else 5)

    def _far(self, one: Inner, delta: Tensor, kinked: bool, alone: bool) -> tuple[Tensor, Tensor]:
        """Up from far away, until the better maxima can be told."""
        if kinked:
            return one.shrinking(delta, 20, 1.0, 0.8)
        return one.short(delta, 0 if alone else 3 if one.problem.backbone.affine else 4)

    def _starts(self, one: Inner) -> list[Tensor]:
        """Where ascents from scratch begin.

        0, and the ball's furthest points towards the most likely other classes (a single logit: both ways), then, for want of
        classes, in directions that are the same for every sample.
        """
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
