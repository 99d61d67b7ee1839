"""A certified distance to the retrained optimum, for linear models with a convex loss and every parameter decayed.

F_R is m-strongly convex, m = min(lambda) |R|. With g the gradient at inexact maximisers whose total gap is at most eta,

    |w - w_R*| <= (|g| + sqrt(|g|^2 + 4 m eta)) / (2 m)

eta is certified, not assumed: `curvature.globality` bounds what the global maxima can be above the maximisers used.

Where the switches of an L-infinity ball are smoothed for the sake of the search, F_R is the objective without that all the same: the
smoothed maximisers are points of the ball as others are, and eta counts what the losses there fall short of the largest ones.

Where several maxima are equal, g is their mixture sum_j p_j grad l_j (`curvature.contest`) and eta what sum_j p_j l_j falls short
of phi too: every l_j is convex in w for fixed delta and below phi.

The curvature of the loss makes it tighter. With the maximisers held where they are, F_R is at least the sum f of the losses there
plus the penalty 1/2 w^T N w, N = |R| diag(lambda), and at most eta above it at w. For cross-entropy the third derivative along a
line is at most omega times the second, omega the range over which the step moves the logits, so that with d = w_R* - w and H
the Hessian of f at w

    f(w + d) >= f(w) + <grad f, d> + 1/2 kappa(omega) d^T H d,      kappa(omega) = 2 (exp(-omega) - 1 + omega) / omega^2

    d^T P d + <g, d> <= eta,      P = N + 1/2 kappa H,      omega = sqrt(2) r max_i |phi(x_i + delta_i)|

for any r known to be at least |d|: the first bound, then this one again (square loss: kappa = 1). The longest d that this allows
is bounded by its Lagrangian dual:

    |d|^2 <= nu eta + nu^2 / 4 g^T (nu P - I)^-1 g         for all nu > 1 / (least eigenvalue of P)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.certificate.global_maxima import best_maximisers, line_curvature, why_no_bound
from lightning_muter.curvature.inner.ascent import Rho
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.response.choose import NoResponse
from lightning_muter.solvers.eigen import symmetric_eigh

#: Heads of up to this many parameters have the eigenvalues of P taken.
_DENSE = 2000


def why_no_certificate(problem: HeadProblem, decay: Tensor, threat: ThreatModel | None = None) -> str | None:
    """Why no bound can be given, or None."""
    if threat is not None and not (threat.eps == 0 or threat.ball.euclidean or threat.ball.separable):
        return f"no certificate: the global inner maximum in a ball of norm {threat.norm!r} is not known"
    if not problem.backbone.affine:
        return "no certificate: with a nonlinear backbone the global inner maximum is not known"
    if bool((decay <= 0).any()):
        return "no certificate: some parameters of the head have no weight decay, so F is not strongly convex in them"
    why = why_no_bound(problem.loss)
    return None if why is None else f"no certificate: {why}"


def certified_distance(gradient: Tensor, decay: Tensor, count: float, gap: float) -> float:
    """The bound above; ``gap``: total eta.

    >>> round(certified_distance(torch.tensor([3.0]), torch.tensor([0.5]), 2, 0.0), 6)
    3.0
    """
    m = float(decay.min()) * count
    g = float(gradient.norm())
    return (g + (g * g + 4 * m * max(gap, 0.0)) ** 0.5) / (2 * m)


def certified_distance_in_metric(
    gradient: Tensor, decay: Tensor, count: float, gap: float, hessian: Tensor, kappa: float
) -> float:
    """The bound with curvature; ``hessian``: H (p, p) of the loss at w, penalty left out.

    >>> g, decay = torch.tensor([[4.0]]), torch.tensor([[0.5]])
    >>> round(certified_distance_in_metric(g, decay, 2, 0.0, torch.tensor([[2.0]]), 1.0), 3)
    2.0
    """
    penalty = (count * decay).flatten().to(hessian)
    g = gradient.flatten().to(hessian)
    rounding = 64 * torch.finfo(hessian.dtype).eps * float(hessian.diagonal().sum())
    matrix = kappa / 2 * hessian
    matrix.diagonal().add_(penalty - rounding)
    values, vectors = symmetric_eigh(matrix)
    if not float(values[0]) > 0:
        return math.inf
    along = (vectors.T @ g).square()
    excess = torch.logspace(-8, 6, 1500, dtype=values.dtype, device=values.device)[:, None]
    nu = (1 + excess) / values[0]
    # nu p_j - 1 = excess + (1 + excess) (p_j - p_1) / p_1
    apart = excess + (1 + excess) * ((values - values[0]) / values[0])
    square = nu[:, 0] * max(gap, 0.0) + nu[:, 0].square() / 4 * (along / apart).sum(1)
    return math.sqrt(float(square.min())) * (1 + 1e-9)


def certify(objective: RobustObjective, theta: Tensor, evaluation: Evaluation, seconds: float = 60.0) -> float:
    """The bound at theta as the module will hold it, rounded to its dtype, given the objective's evaluation at theta.

    ``seconds``: of a processor, about, that the search for larger maxima may take per process (counted in cells, so that the
    bound is the same everywhere); it is the looser for less.
    """
    written = theta.to(objective.problem.head.linear.weight.dtype).to(theta)
    return bound_at(objective, theta, evaluation, seconds) + float((theta - written).norm())


def bound_at(objective: RobustObjective, theta: Tensor, evaluation: Evaluation, seconds: float = 60.0) -> float:
    """The bound at theta itself.

    The gradient is taken at the maximisers that the search for global ones ends with, and eta is their gap.
    """
    m = float(objective.decay.min()) * objective.total
    # a gap that hardly moves the bound need not be told from 0
    target = 1e-4 * float(evaluation.gradient.square().sum()) / (4 * m)
    found = globally_maximised(objective, theta, evaluation, target / max(objective.count, 1), seconds)
    plain = replace(objective.smoothing, anchor=None)
    rivals, prior = evaluation.rivals, evaluation.prior
    exact = replace(objective, smoothing=plain, delta=found.delta, rivals=rivals, prior=prior, tick=None, _c={})
    bent = found.curvature is not None and theta.numel() <= _DENSE
    sums, delta = exact.sums(theta, settle=False, response=NoResponse() if bent else None)
    mixed, gap = exact.evaluation(theta, sums, delta), found.gap
    if mixed.contested:
        alone = replace(exact, rivals=None, prior=None)
        largest = alone.evaluation(theta, *alone.sums(theta, settle=False))
        gap += max(largest.value - mixed.value, 0.0) + 64 * torch.finfo(theta.dtype).eps * abs(mixed.value)
    bound = certified_distance(mixed.gradient, objective.decay, objective.total, gap)
    if sums.hessian is None or found.curvature is None or (mixed.contested and mixed.kinks is None):
        return bound
    hessian = sums.hessian.dense()
    if mixed.kinks is not None:  # of the mixture at fixed shares
        hessian -= mixed.kinks.stiffness()
    for _ in range(3):
        kappa = kappa_of(found.curvature * math.sqrt(2) * bound * found.reach)
        nearer = certified_distance_in_metric(mixed.gradient, objective.decay, objective.total, gap, hessian, kappa)
        bound = min(bound, nearer)
        if kappa > 0.8 or nearer > bound:
            break
    return bound


def kappa_of(omega: float) -> float:
    """The least share of its second-order term by which a loss rises along a line over which the logits range by omega."""
    exact = 1 - omega / 3 if omega < 1e-4 else 2 * (math.expm1(-omega) + omega) / omega**2
    return exact * (1 - 1e-9)


@dataclass
class Maximised:
    """Maximisers (n, D), their total gap eta, max |phi| at them and their rivals, and the multiple of the range of the logits
    that bounds the third derivative of the loss by the second (None: not known).
    """

    delta: Tensor
    gap: float
    reach: float
    curvature: float | None


def _rise(problem: HeadProblem, theta: Tensor, x: Tensor, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The loss at x + high less that at x + low (n,), rounded up, 0 at least."""
    here, there = (problem.losses(problem.logits(theta, problem.backbone(x + d)), y) for d in (low, high))
    return (there - here).clamp(min=0.0) + 16 * torch.finfo(x.dtype).eps * (1 + there.abs())


def globally_maximised(
    objective: RobustObjective, theta: Tensor, evaluation: Evaluation, tolerance: float = 0.0, seconds: float = 60.0
) -> Maximised:
    """Maximisers at least as good as the evaluation's, and eta, an upper bound of sum_i w_i (phi_i - loss at them).

    phi_i is the largest loss in the ball; the maximisers are those of the smoothed problem where switches are smoothed.

    ``tolerance``: of the gap of one sample.
    """
    problem, threat = objective.problem, objective.threat
    found, total, done, reach = [], 0.0, 0, 0.0
    curvature = 0.0  # infinity: not known
    for batch in objective.source.batches(objective.own):
        x = batch.x.to(problem.backbone.exact_dtype)
        c = objective.coefficients(done, x, batch.y)
        rows = slice(done, done + len(x))
        here = evaluation.delta[rows].to(x)
        share = seconds * len(x) / len(objective.own) / (1 if c is None else 2)
        here, gap = best_maximisers(problem, theta, threat, x, batch.y, here, c, tolerance, share)
        if c is not None:
            # rho is nowhere below 0: what no loss + rho is above, no loss is above
            above = gap + Rho(threat, x, c).value(here)
            top, rest = best_maximisers(problem, theta, threat, x, batch.y, here, None, tolerance, share)
            gap = torch.minimum(above, rest + _rise(problem, theta, x, batch.y, here, top))
        total += float((gap if batch.weight is None else gap * batch.weight).sum())
        others = () if evaluation.rivals is None else evaluation.rivals[:, rows].to(x)
        for d in (here, *others):
            reach = max(reach, float(problem.augment(problem.backbone(x + d)).norm(dim=1).max()))
        bent = line_curvature(problem, theta, x, batch.y)
        curvature = max(curvature, math.inf if bent is None else bent)
        found.append(here)
        done += len(x)
    eta = objective.added(torch.tensor([total], dtype=problem.dtype, device=problem.device))
    reach, curvature = objective.largest(eta.new_tensor([reach, curvature])).tolist()
    delta = torch.cat(found) if found else evaluation.delta
    return Maximised(delta, float(eta), reach, curvature if math.isfinite(curvature) else None)
