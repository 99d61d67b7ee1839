"""A certified distance to the retrained optimum, for linear models with a convex loss and every parameter decayed.

F_R is m-strongly convex, m = min(lambda) |R|. With g the gradient at inexact maximisers whose total gap is at most eta,

    |w - w_R*| <= (|g| + sqrt(|g|^2 + 4 m eta)) / (2 m)

eta is certified, not assumed: `curvature.globality` bounds what the global maxima can be above the maximisers used.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_muter.curvature.globality import best_maximisers, why_no_bound
from lightning_muter.curvature.objective import Evaluation, RobustObjective
from lightning_muter.curvature.problem import HeadProblem


def why_no_certificate(problem: HeadProblem, decay: Tensor) -> str | None:
    """Why no bound can be given, or None."""
    if not problem.backbone.affine:
        return "no certificate: with a nonlinear backbone the global inner maximum is not known"
    if bool((decay <= 0).any()):
        return "no certificate: some parameters of the head have no weight decay, so F is not strongly convex in them"
    why = why_no_bound(problem.loss)
    return None if why is None else f"no certificate: {why}"


def certified_distance(gradient: Tensor, decay: Tensor, count: int, gap: float) -> float:
    """The bound above; ``gap``: total eta.

    >>> round(certified_distance(torch.tensor([3.0]), torch.tensor([0.5]), 2, 0.0), 6)
    3.0
    """
    m = float(decay.min()) * count
    g = float(gradient.norm())
    return (g + (g * g + 4 * m * max(gap, 0.0)) ** 0.5) / (2 * m)


def certify(objective: RobustObjective, theta: Tensor, evaluation: Evaluation) -> float:
    """The bound at theta, given the objective's evaluation there.

    The gradient is taken at the maximisers that the search for global ones ends with, and eta is their gap.
    """
    if objective.threat.eps == 0:
        return certified_distance(evaluation.gradient, objective.decay, objective.count, 0.0)
    m = float(objective.decay.min()) * objective.count
    # a gap that moves the bound by a hundredth need not be told from 0
    target = 0.01 * float(evaluation.gradient.square().sum()) / (4 * m)
    delta, gap = globally_maximised(objective, theta, evaluation.delta, target / max(objective.count, 1))
    exact = replace(objective, delta=delta, tick=None)
    sums, delta = exact.sums(theta, settle=False)
    gradient = exact.evaluation(theta, sums, delta).gradient
    return certified_distance(gradient, objective.decay, objective.count, gap)


def globally_maximised(
    objective: RobustObjective, theta: Tensor, delta: Tensor, tolerance: float = 0.0
) -> tuple[Tensor, float]:
    """Maximisers (n, D) at least as good as ``delta``, and eta, an upper bound of sum_i w_i (phi_i - value at them).

    ``tolerance``: of the gap of one sample.
    """
    problem, threat = objective.problem, objective.threat
    found, total, done = [], 0.0, 0
    for batch in objective.source.batches(objective.positions):
        x = batch.x.to(problem.backbone.exact_dtype)
        c = objective.coefficients(done, x, batch.y)
        here = delta[done : done + len(x)].to(x)
        here, gap = best_maximisers(problem, theta, threat, x, batch.y, here, c, tolerance)
        total += float((gap if batch.weight is None else gap * batch.weight).sum())
        found.append(here)
        done += len(x)
        if objective.tick is not None:
            objective.tick(len(x))
    return torch.cat(found), total
