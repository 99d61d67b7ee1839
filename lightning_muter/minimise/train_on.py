"""How a head is trained on until its robust objective is stationary: by cutting sets, or by L-BFGS in the total Hessian's metric.

A network's loss surface in single precision has kinks or noise on which line searches stall: cutting sets. What is smooth
and exact (linear models, and networks in double precision while nothing limits the time) goes on to full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.response.choose import Response
from lightning_muter.minimise.budget import FORWARD, Budget
from lightning_muter.minimise.cuts import CuttingSets, OnPass
from lightning_muter.minimise.polish import polish

#: Relative gap to the least objective that is aimed at.
GAP = 1e-3
#: Passes of the older method, and of cutting sets, that "auto" allows.
PASSES, CUT_PASSES = 150, 400


@dataclass
class TrainedOn:
    """Where it ended.

    Attributes:
        status: "converged", "noise floor", "budget", "capped" or "stalled".
        before, after: stationarity.
        gap: relative, to the least objective (cutting sets alone).
        as_found: the objective tracks the very points that the head was trained on.
    """

    theta: Tensor
    status: str
    passes: int
    before: float
    after: float
    as_found: bool = False
    figures: dict[str, Any] = field(default_factory=dict)


def by_cuts(objective: RobustObjective, budget: Budget) -> bool:
    """Whether cutting sets are the method for this objective."""
    backbone = objective.problem.backbone
    inexact = backbone.exact_dtype != torch.float64 or budget.limit is not None
    return not backbone.affine and inexact and objective.threat.eps > 0


def train_on(
    objective: RobustObjective,
    theta: Tensor,
    response: Response,
    *,
    tolerance: float,
    limit: str | int,
    anchored: bool,
    budget: Budget,
    first: Tensor | None = None,
    on_step: Callable[[int, Evaluation], None] | None = None,
    on_pass: OnPass | None = None,
) -> TrainedOn:
    """Minimise from theta; the objective is left tracking the maximisers there.

    Args:
        tolerance: on the stationarity.
        limit: passes at most; "auto".
        anchored: the smoothing is given and stays; else its anchor is where this ends.
        budget: of gradients per sample.
        first: perturbations that are known beforehand (n, D).
    """
    if not by_cuts(objective, budget):
        most = PASSES if limit == "auto" else int(limit)
        done = polish(
            objective, theta, response, tolerance=tolerance, max_passes=most, anchored=anchored, on_step=on_step
        )
        figures = {"objective": done.evaluation.value}
        return TrainedOn(
            done.theta, done.status, done.passes, done.before, done.evaluation.stationarity, figures=figures
        )
    most = CUT_PASSES if limit == "auto" else int(limit)
    found = CuttingSets(objective, budget, first).run(theta, tolerance=GAP, max_passes=most, on_pass=on_pass)
    if not anchored:
        objective.anchor(found.theta)
    places, prior = found.places[: 1 + objective.inner.rivals], found.prior[: 1 + objective.inner.rivals]
    places = places.to(objective.problem.backbone.exact_dtype) * objective.threat.eps
    objective.delta, objective.rivals = places[0], places[1:]
    objective.prior = prior / prior.sum(0).clamp(min=1e-300)
    objective.passes += found.passes
    figures = {"gap": found.gap, "gradients": budget.spent, "objective": found.value, "bound": found.bound}
    figures["objective_before"] = found.history[0]["value"] if found.history else found.value
    return TrainedOn(found.theta, found.status, found.passes, found.before, found.after, True, figures)


def cost_of_sums(objective: RobustObjective, response: Response) -> float:
    """Gradients per sample that the total Hessian's sums take beside the maximisation, as if every pass were as dear as it can be."""
    backbone, logits = objective.problem.backbone, objective.problem.n_logits
    smoothing = 2 * FORWARD + FORWARD * logits if objective.threat.jumps else 0.0
    if response.norm is None:
        return FORWARD + smoothing
    directions = int(getattr(response, "sketch", 0) or 0)
    through = 2 * FORWARD * directions if directions else FORWARD * min(backbone.width, backbone.inputs)
    return 2 * FORWARD + smoothing + through + FORWARD * logits
