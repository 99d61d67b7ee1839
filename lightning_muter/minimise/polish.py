"""Polish: rounds of descents, each in the metric of the total Hessian where it begins, until a head is stationary."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.hessian.sums import Sums
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.response.choose import NoResponse, Response
from lightning_muter.minimise.descent import Descent, Metric, descend, descend_contested, jumped, left_of
from lightning_muter.solvers.dense import definite_inverse


@dataclass
class Polish:
    """What :func:`polish` reached: theta, stationarity before and after, status, passes over the data, metric shift."""

    theta: Tensor
    evaluation: Evaluation
    before: float
    status: str
    passes: int
    shift: float


def polish(
    objective: RobustObjective,
    theta: Tensor,
    response: Response,
    *,
    tolerance: float,
    max_passes: int = 120,
    anchored: bool = False,
    curvature: Curvature = "hessian",
    on_step: Callable[[int, Evaluation], None] | None = None,
) -> Polish:
    """Minimise F until stationary: rounds of :func:`descend`, each in the metric of the total Hessian at its start.

    Args:
        tolerance: on |grad F| / sum |grad phi_i|.
        anchored: the smoothing is given and stays. Otherwise its anchor follows theta from round to round until the two
            agree to a hundredth, so that the frozen smoothing is the one of the stationary point; or until they come no nearer
            (two minimisers, each of the smoothing at the other).
    """
    begin = objective.passes
    rounds = _Rounds(objective, tolerance, anchored)
    before: float | None = None
    status, shift, damping, steps = "capped", 0.0, 0.0, 0
    while objective.passes - begin < max_passes:
        rounds.follow(theta)
        objective.restart()
        # other local maxima are looked for between descents, so that in the end they depend on theta and not on the path
        explore = not objective.reproducible
        sums, delta = objective.sums(theta, response=response, curvature=curvature, explore=explore)
        first = objective.evaluation(theta, sums, delta)
        if rounds.overlooked(first):
            continue
        objective.accept(first)
        before = first.stationarity if before is None else before
        metric, shift = metric_of(objective, sums, first, damping)
        found = (descend if first.kinks is None else descend_contested)(
            objective,
            theta,
            metric,
            # far from the end the curvature ages fast: short rounds; a step may take several passes
            max_steps=min(4 if first.stationarity > 1e-3 else 10, 1 + (max_passes - objective.passes + begin) // 2),
            tolerance=tolerance,
            first=first,
            on_step=None if on_step is None else (lambda _, e, offset=steps: on_step(offset + _, e)),  # type: ignore[misc]
        )
        steps += found.steps
        theta = found.theta
        if rounds.contended(first, found):
            continue
        if rounds.converged(found):
            status = "converged"
            break
        stuck = found.status == "stalled" and found.steps == 0
        if stuck and damping < 1.0 and found.evaluation.stationarity > 1e-2:
            damping = max(10 * damping, 0.01)  # far from the end: shorter steps, as in Levenberg-Marquardt
            continue
        if stuck or rounds.idle >= 4:
            status = "stalled"
            break
        damping = 0.0 if damping < 0.01 else damping / 10
    assert before is not None
    theta, evaluation = rounds.best or (theta, objective.evaluate(theta))
    if status != "converged" and objective.reproducible:
        evaluation = objective.afresh(theta)
    if left_of(objective, evaluation) <= tolerance and rounds.settled(theta):
        status = "converged"
    objective.accept(evaluation)
    objective.cool(None)
    return Polish(theta, evaluation, before, status, objective.passes - begin, shift)


@dataclass
class _Rounds:
    """What one round of :func:`polish` tells the next: the best head of this objective, and whether anything is still gained.

    Attributes:
        reached: F where the last descent ended.        idle: rounds since the last gain.
        off: distance to the smoothing's anchor; circling: how often it came no nearer.
    """

    objective: RobustObjective
    tolerance: float
    anchored: bool
    best: tuple[Tensor, Evaluation] | None = None
    reached: float | None = None
    idle: int = 0
    off: float = math.inf
    circling: int = 0

    def follow(self, theta: Tensor) -> None:
        """Anchor the smoothing at theta where that is far from it, and the two still come nearer."""
        objective = self.objective
        before, self.off = self.off, objective.off_anchor(theta)
        self.circling += 0.5 * before < self.off < 0.1
        self.anchored = self.anchored or self.circling > 2
        if self.settled(theta):
            return
        # at a zero head there is nothing to smooth, yet F has its worst kink there: look from where Newton points
        zero = not bool(objective.problem.weight(theta).any())
        objective.anchor(_newton_point(objective, theta) if zero else theta)
        self.best, self.reached = None, None  # another objective

    def settled(self, theta: Tensor) -> bool:
        return self.anchored or not self.objective.smoothing_moves(theta)

    def overlooked(self, first: Evaluation) -> bool:
        """Whether maxima are weighed from now on, for those that were followed are not the largest: two are equal on the way."""
        return self.reached is not None and jumped(self.reached, first.value) and self._contend()

    def contended(self, first: Evaluation, found: Descent) -> bool:
        """Take note of a round; whether maxima are weighed from now on, for it gained nothing."""
        self.reached = found.evaluation.value
        falls = found.evaluation.value < first.value - 1e-3 * abs(first.value)
        gained = self.best is None or falls or self._left(found.evaluation) < 0.5 * self._left(self.best[1])
        self.idle = 0 if gained else self.idle + 1
        return (found.status == "stalled" or self.idle >= 2) and self._contend()

    def converged(self, found: Descent) -> bool:
        """Keep the better of the best and this; whether that is the end."""
        objective = self.objective
        if self.best is None or self._left(found.evaluation) < self._left(self.best[1]):
            self.best = (found.theta, found.evaluation)
        if found.status != "converged":
            return False
        # maxima were followed: converged is what stays so after another look
        if found.steps and objective.reproducible:
            self.best = (found.theta, objective.afresh(found.theta))
        sure = self.best[1].stationarity <= self.tolerance if objective.reproducible else found.steps == 0
        return sure and self.settled(found.theta)

    def _contend(self) -> bool:
        if not self.objective.contend():
            return False
        self.best, self.reached, self.idle = None, None, 0
        return True

    def _left(self, at: Evaluation) -> float:
        return left_of(self.objective, at)


def metric_of(objective: RobustObjective, sums: Sums, at: Evaluation, damping: float = 0.0) -> tuple[Metric, float]:
    """v -> H^-1 v of the total Hessian in these sums, with weight decay and without the share of kinks, and the shift that made it
    definite; ``damping``: in units of its mean diagonal.
    """
    assert sums.hessian is not None
    matrix = sums.hessian.dense()
    matrix.diagonal().add_(objective.total * objective.decay.flatten())
    if at.kinks is not None:
        matrix -= at.kinks.stiffness()
    if damping:
        matrix.diagonal().add_(damping * matrix.diagonal().mean())
    return definite_inverse(matrix)


def _newton_point(objective: RobustObjective, theta: Tensor) -> Tensor:
    """theta after one Newton step of the direct Hessian."""
    sums, delta = objective.sums(theta, response=NoResponse())
    at = objective.evaluation(theta, sums, delta)
    metric, _ = metric_of(objective, sums, replace(at, kinks=None))
    return theta - metric(at.gradient.flatten()).reshape(theta.shape)


def in_metrics(response: Response) -> Response:
    """The response in the metrics of a descent, which need not be exact: input Hessians by Gauss-Newton."""
    if not getattr(response, "max_exact", 0):
        return response
    cheaper: Any = copy(response)
    cheaper.max_exact = 0
    return cast(Response, cheaper)
