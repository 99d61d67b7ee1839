"""Refinement until the certified distance to retraining is below a given one."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.utils.data import Dataset

from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.errors import ArgumentError, SolveError
from lightning_muter.minimise.descent import Descent

#: Refine steps before the first look at the certificate.
FIRST = 4
#: Looks after it, each where the head is stationary enough for the distance, were the bound to fall as the gradient does.
LOOKS = 3


def check_within(within: float | None, retain: Dataset[object] | None) -> None:
    """Raise unless ``within`` is None or a distance that can be certified."""
    if within is None:
        return
    if not (isinstance(within, (int, float)) and math.isfinite(within) and within > 0):
        raise ArgumentError("within", within, "a distance above 0, or None", "1e-3 suits a head of 1000 parameters.")
    if retain is None:
        raise ArgumentError("within", within, "None without retained data", "Pass retain=train_dataset as well.")


def refine_within(
    further: Callable[[Tensor, Evaluation, int], Descent],
    polished: Callable[[Descent, float], Descent],
    bound_at: Callable[[Tensor, Evaluation], float],
    start: Descent,
    steps: int,
    within: float,
) -> tuple[Descent, float]:
    """Steps until the bound is at most ``within``; where the descent ended, and the bound there.

    A few steps in the stored metric, which is enough where the removal was small; then rounds in fresh ones, as retraining takes
    them: where maxima are equal, the stored metric holds the kinks as they were at the trained weights, and steps in it crawl.

    Args:
        further: at most so many steps on from a point; polished: on until so stationary; bound_at: the certificate at a point.
        start: where the request's own step leads; steps: at least so many (no fewer than ``FIRST``).

    Raises:
        SolveError: nothing lowers the bound enough.
    """
    found = further(start.theta, start.evaluation, max(steps, FIRST))
    bound = bound_at(found.theta, found.evaluation)
    before = math.inf
    for _ in range(LOOKS):
        if bound <= within or bound > before / 2:  # what polishing does not lower any more is not to be had
            break
        found = polished(found, found.evaluation.stationarity * within / bound / 4)
        before, bound = bound, bound_at(found.theta, found.evaluation)
    if bound <= within:
        return found, bound
    raise SolveError(
        f"within: the certified distance came to {bound:.3g} after {found.steps} refine steps (stationarity "
        f"{found.evaluation.stationarity:.1e}, {found.status}), {within:.3g} was asked for. Nothing was changed. Ask for a larger "
        "distance, raise the weight decay, or retrain."
    )
