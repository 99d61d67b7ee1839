"""Refinement until the certified distance to retraining is below a given one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.errors import ArgumentError, SolveError
from lightning_muter.minimise.descent import Descent

#: Steps between two looks; each look begins a descent anew, without what the last one had learnt of the curvature.
ROUND = 4
#: Steps in all.
MOST = 60


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
    bound_at: Callable[[Tensor, Evaluation], float],
    start: Descent,
    matrix: Tensor,
    steps: int,
    within: float,
) -> tuple[Descent, float]:
    """Steps until the bound is at most ``within``; where the descent ended, and the bound there.

    The certificate is dear; it is asked for where a Newton step, |H_R^-1 grad F_R|, is below ``within`` or nothing moves.

    Args:
        further: at most so many steps on from a point; bound_at: the certificate at a point.
        start: where the request's own step leads; steps: at least so many (no fewer than a round).

    Raises:
        SolveError: no further step lowers the bound enough.
    """
    found, bound = start, math.inf
    todo = max(steps, ROUND)
    while True:
        if todo:
            part = further(found.theta, found.evaluation, todo)
            history = [*found.history, *part.history[1:]]
            found = replace(part, steps=found.steps + part.steps, history=history)
        ended = found.status not in ("capped",) or found.steps >= MOST
        newton = torch.linalg.lstsq(matrix, found.evaluation.gradient.reshape(-1, 1)).solution.norm()
        if ended or float(newton) <= within:
            bound = bound_at(found.theta, found.evaluation)
            if bound <= within:
                return found, bound
        if ended:
            raise SolveError(
                f"within: the certified distance came to {bound:.3g} after {found.steps} refine steps (stationarity "
                f"{found.evaluation.stationarity:.1e}, {found.status}), {within:.3g} was asked for. Nothing was changed. Ask for a "
                "larger distance, raise the weight decay, or retrain."
            )
        todo = ROUND
