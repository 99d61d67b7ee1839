"""Refinement: further steps to the minimiser over the retained samples, in a metric that follows the weights where they went far.

The stored curvature H_R belongs to the trained weights. For a small removal it still holds at the new weights and a request
needs no other. A removed class is no small change: nothing of it is left in R, its own logit moves down an exponential
tail, and a Newton step of e^-z advances z by one at a time while the curvature there shrinks by e. How much of the gradient
a Newton step leaves tells the two apart: where it is more than a quarter, the total Hessian is taken anew at the weights
reached (one more pass over the retained samples, a few times dearer than an evaluation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.response.choose import Response
from lightning_muter.minimise.descent import Descent, Metric, Pair, descend, descend_contested, jumped
from lightning_muter.minimise.polish import in_metrics, metric_of, polish
from lightning_muter.solvers.dense import definite_inverse

#: Share of the gradient that a Newton step may leave before its curvature counts as aged.
AGED = 0.25
#: Accepted steps in one fresh metric.
ROUND = 2
#: Passes over the retained data in one polish after it.
PASSES = 120
#: On the stationarity: what a descent that stalls short of it has met is a kink, not rounding.
STALLED = 1e-8
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
    """At most ``steps`` accepted steps on F_R from theta, in the metric of ``matrix`` or of fresh ones.

    Where maxima are followed singly these are steps of L-BFGS. Where several are weighed (`curvature.contest`) each step holds
    the kinks between them as they are, and a look for new maxima follows it. A linear model goes over from the first to the
    second where it stalls, or where a look from scratch finds larger maxima than those it followed.

    Args:
        matrix: H_R of the stored statistics, (K q, K q), row-major as theta.
        before: F_R at the weights that ``matrix`` was used from; first: at theta, one Newton step further. Together they
            tell whether the curvature has aged.
    """
    linear = objective.problem.backbone.affine  # looked at afresh in every evaluation
    aged = float(first.gradient.norm()) > AGED * float(before.gradient.norm())
    # the stored matrix holds the kinks as they were at the trained weights
    metric, _ = definite_inverse(matrix if before.kinks is None else matrix - before.kinks.stiffness())
    learnt: list[Pair] = []
    found = Descent(theta, first, "capped", 0, [first.stationarity])
    if steps and objective.reproducible:
        found = _looked_at(objective, found)
    while found.status == "capped" and found.steps < steps:
        now, left = found.evaluation, steps - found.steps
        if aged:
            metric, now = _fresh(objective, found, response, curvature)
            left = min(ROUND, left)
        elif found.steps and not linear:
            now = objective.evaluate(found.theta, explore=True)
        objective.accept(now)
        report = None if on_step is None else (lambda i, e, done=found.steps: on_step(done + i, e))
        if objective.reproducible:
            if not (aged or found.steps):
                left = 1  # a larger maximum is better met early
            learnt = [] if aged else learnt
            part = descend(
                objective,
                found.theta,
                metric,
                max_steps=left,
                tolerance=TOLERANCE,
                first=now,
                learnt=learnt,
                on_step=report,
            )
            part = _looked_at(objective, part)
        else:
            part = descend_contested(
                objective, found.theta, metric, max_steps=1, tolerance=TOLERANCE, first=now, on_step=report
            )
        history = [*found.history, *part.history[1:]]
        found = Descent(part.theta, part.evaluation, part.status, found.steps + part.steps, history)
    objective.cool(None)
    if found.steps and not linear:
        last = objective.evaluate(found.theta, explore=True)
        objective.accept(last)
        found = Descent(found.theta, last, found.status, found.steps, [*found.history[:-1], last.stationarity])
    return found


def polished(
    objective: RobustObjective, response: Response, curvature: Curvature, at: Descent, tolerance: float
) -> Descent:
    """A linear model on from where a refinement ended until the head is so stationary, every round in a fresh metric."""
    history: list[float] = []
    done = polish(
        objective,
        at.theta,
        in_metrics(response),
        tolerance=max(tolerance, TOLERANCE),
        max_passes=PASSES,
        anchored=True,
        curvature=curvature,
        on_step=lambda _, e: history.append(e.stationarity),
    )
    return Descent(done.theta, done.evaluation, done.status, at.steps + len(history), [*at.history, *history])


def _looked_at(objective: RobustObjective, at: Descent) -> Descent:
    """Where a descent along single maxima of a linear model ended, evaluated from scratch; if it stalled, or larger maxima are
    found, they are weighed from now on.
    """
    now, status = objective.afresh(at.theta), at.status
    kink = status == "stalled" and now.stationarity > STALLED
    if (kink or jumped(at.evaluation.value, now.value)) and objective.contend():
        now, status = objective.evaluate(at.theta), "capped"
    return replace(at, evaluation=now, status=status, history=[*at.history[:-1], now.stationarity])


def _fresh(
    objective: RobustObjective, at: Descent, response: Response, curvature: Curvature
) -> tuple[Metric, Evaluation]:
    """The total Hessian over the retained samples where the descent stands, the share of kinks left out, as a metric; and F_R
    at its maximisers.
    """
    objective.accept(at.evaluation)
    sums, delta = objective.sums(
        at.theta, response=in_metrics(response), curvature=curvature, explore=not objective.reproducible
    )
    now = objective.evaluation(at.theta, sums, delta)
    metric, _ = metric_of(objective, sums, now)
    return metric, now
