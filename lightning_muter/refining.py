"""Refinement: further steps to the minimiser over the retained samples, in a metric that follows the weights where they went far.

The stored curvature H_R belongs to the trained weights. For a small removal it still holds at the new weights and a request
needs no other. A removed class is no small change: nothing of it is left in R, its own logit moves down an exponential
tail, and a Newton step of e^-z advances z by one at a time while the curvature there shrinks by e. How much of the gradient
a Newton step leaves tells the two apart: where it is more than a quarter, the total Hessian is taken anew at the weights
reached (one more pass over the retained samples, a few times dearer than an evaluation).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_muter.curvature.descent import Descent, Metric, descend, descend_contested
from lightning_muter.curvature.direct import Curvature
from lightning_muter.curvature.objective import Evaluation, RobustObjective
from lightning_muter.curvature.response import Response
from lightning_muter.solvers import definite_inverse

#: Share of the gradient that a Newton step may leave before its curvature counts as aged.
AGED = 0.25
#: Accepted steps in one fresh metric.
ROUND = 2
#: On the stationarity: nothing is left to gain in float64.
TOLERANCE = 1e-12


def refined(
    objective: RobustObjective,
    theta: Tensor,
    matrix: Tensor,
    response: Response,
    curvature: Curvature,
    *,
    before: Evaluation,
    first: Evaluation,
    steps: int,
    on_step: Callable[[int, Evaluation], None] | None = None,
) -> Descent:
    """At most ``steps`` accepted steps of L-BFGS on F_R from theta, in the metric of ``matrix`` or of fresh ones.

    Args:
        matrix: H_R of the stored statistics, (K q, K q), row-major as theta.
        before: F_R at the weights that ``matrix`` was used from; first: at theta, one Newton step further. Together they
            tell whether the curvature has aged.
    """
    if float(first.gradient.norm()) <= AGED * float(before.gradient.norm()):
        if not objective.reproducible:
            return _tracked(objective, theta, matrix, before, first, steps, on_step)
        metric, _ = definite_inverse(matrix)
        return descend(objective, theta, metric, max_steps=steps, tolerance=TOLERANCE, first=first, on_step=on_step)
    found = Descent(theta, first, "capped", 0, [first.stationarity])
    while found.status == "capped" and found.steps < steps:
        metric, now = _fresh(objective, found, response, curvature)
        part = descend(
            objective,
            found.theta,
            metric,
            max_steps=min(ROUND, steps - found.steps),
            tolerance=TOLERANCE,
            first=now,
            on_step=None if on_step is None else (lambda i, e, done=found.steps: on_step(done + i, e)),  # type: ignore[misc]
        )
        history = [*found.history, *part.history[1:]]
        found = Descent(part.theta, part.evaluation, part.status, found.steps + part.steps, history)
    return found


def _tracked(
    objective: RobustObjective,
    theta: Tensor,
    matrix: Tensor,
    before: Evaluation,
    first: Evaluation,
    steps: int,
    on_step: Callable[[int, Evaluation], None] | None,
) -> Descent:
    """Step by step, with a look for new maxima after each: where several are nearly equal the steps hold the kinks between them."""
    # the stored matrix holds the kinks as they were at the trained weights
    smooth, _ = definite_inverse(matrix if before.kinks is None else matrix - before.kinks.stiffness())
    found = Descent(theta, first, "capped", 0, [first.stationarity])
    while found.status == "capped" and found.steps < steps:
        done = found.steps
        report = None if on_step is None else (lambda i, e, done=done: on_step(done + i, e))
        part = descend_contested(
            objective, found.theta, smooth, max_steps=1, tolerance=TOLERANCE, first=found.evaluation, on_step=report
        )
        if part.steps == 0:
            return Descent(found.theta, found.evaluation, part.status, done, found.history)
        seen = objective.evaluate(part.theta, explore=True)
        objective.accept(seen)
        found = Descent(part.theta, seen, "capped", done + 1, [*found.history, seen.stationarity])
    return found


def _fresh(
    objective: RobustObjective, at: Descent, response: Response, curvature: Curvature
) -> tuple[Metric, Evaluation]:
    """The total Hessian over the retained samples where the descent stands, as a metric; and F_R at its maximisers."""
    objective.accept(at.evaluation)
    sums, delta = objective.sums(at.theta, response=response, curvature=curvature)
    assert sums.hessian is not None
    matrix = sums.hessian.dense()
    matrix.diagonal().add_(objective.count * objective.decay.flatten())
    metric, _ = definite_inverse(matrix)
    return metric, objective.evaluation(at.theta, sums, delta)
