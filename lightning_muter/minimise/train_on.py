"""How a head is trained on until its robust objective is stationary: by cutting sets, or by L-BFGS in the total Hessian's metric.

A network's loss surface in single precision has kinks or noise on which line searches stall: cutting sets. What is smooth
and exact (linear models, and networks in double precision while nothing limits the time) goes on to full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.inner.tracked import Tracked
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.response.choose import Response
from lightning_muter.minimise.budget import FORWARD, PULL, PUSH, Budget
from lightning_muter.minimise.cuts import CYCLE, CuttingSets, OnPass, Polished
from lightning_muter.minimise.descent import Descent
from lightning_muter.minimise.polish import Polish, in_metrics, polish

#: Relative gap to the least objective that is aimed at.
GAP = 1e-3
#: Random directions per sample where exact Jacobians are too dear.
SKETCH = 4
#: Directions of the logits' curvature that are followed where all are too dear: of ten classes three hold nine tenths of it.
LEADING = 3
#: Passes of the older method, and of cutting sets, that "auto" allows.
PASSES, CUT_PASSES = 150, 400
#: Passes that a sharper stage of several classes may take, and those after which a sharper one still is not tried.
STAGE, EASY = 40, 12


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
    sharpen: bool = False,
) -> TrainedOn:
    """Minimise from theta; the objective is left tracking the maximisers there.

    Args:
        tolerance: on the stationarity.
        limit: passes at most; "auto".
        anchored: the smoothing is given and stays; else its anchor is where this ends.
        budget: of gradients per sample.
        first: perturbations that are known beforehand (n, D).
        sharpen: smooth a linear model's switches less and less once it is stationary (:func:`sharpened`).
    """
    if not by_cuts(objective, budget):
        most = PASSES if limit == "auto" else int(limit)
        metric = in_metrics(response)
        done = polish(
            objective, theta, metric, tolerance=tolerance, max_passes=most, anchored=anchored, on_step=on_step
        )
        if sharpen and done.status == "converged":
            left = PASSES if limit == "auto" else most - done.passes
            done = sharpened(objective, done, metric, tolerance, left, on_step)
        figures = {"objective": done.evaluation.value}
        return TrainedOn(
            done.theta, done.status, done.passes, done.before, done.evaluation.stationarity, figures=figures
        )
    most = CUT_PASSES if limit == "auto" else int(limit)
    found = CuttingSets(objective, budget, first).run(theta, tolerance=GAP, max_passes=most, on_pass=on_pass)
    if not anchored:
        objective.anchor(found.theta)
    track(objective, found)
    figures = {"gap": found.gap, "gradients": budget.spent, "objective": found.value, "bound": found.bound}
    figures["objective_before"] = found.history[0]["value"] if found.history else found.value
    return TrainedOn(found.theta, found.status, found.passes, found.before, found.after, True, figures)


def sharpened(
    objective: RobustObjective,
    done: Polish,
    response: Response,
    tolerance: float,
    limit: int,
    on_step: Callable[[int, Evaluation], None] | None = None,
) -> Polish:
    """The end of a path of ever sharper switches, as far as every point of it is stationary, in ``limit`` passes at most.

    What smooths the switches of a linear model in L-infinity makes its objective another one, with a minimiser that may be several
    removals away from the robust one (tests/benchmarks/test_smoothing.py measures it). From an untrained head the sharp objective
    is not reached; step by step it is.
    """
    problem, threat = objective.problem, objective.threat
    if not (problem.backbone.affine and threat.jumps and objective.smoothing.anchor is not None):
        return done
    # one logit: the worst vertex is sign(w) however curved the loss is, and only the switch at w_j = 0 needs a width
    path = [(0.4, 0.03), (0.12, 0.03), (0.04, 0.03)] if problem.n_logits == 1 else [(0.4, 0.03), (0.12, 0.01)]
    for strength, bandwidth in path:
        most = min(STAGE if problem.n_logits > 1 else PASSES // 2, limit)
        if most <= 0:
            break
        kept, tracked, contended = objective.smoothing, objective.tracked, objective.contended
        objective.set_smoothing(replace(objective.smoothing, strength=strength, bandwidth=bandwidth))
        objective.anchor(done.theta)
        found = polish(objective, done.theta, response, tolerance=tolerance, max_passes=most, on_step=on_step)
        passes, limit = done.passes + found.passes, limit - found.passes
        if found.status != "converged":
            objective.set_smoothing(kept)
            objective.follow(tracked, contended=contended)
            return replace(done, passes=passes)
        done = replace(found, before=done.before, passes=passes)
        if problem.n_logits > 1 and found.passes > EASY:
            break  # the next, sharper still, would not be reached
    return done


def track(objective: RobustObjective, found: Polished) -> None:
    """Follow the worst points that cutting sets ended with from now on."""
    places, prior = found.places[: 1 + objective.inner.rivals], found.prior[: 1 + objective.inner.rivals]
    places = places.to(objective.problem.backbone.exact_dtype) * objective.threat.eps
    prior = prior / prior.sum(0).clamp(min=1e-300)
    objective.follow(Tracked(places[0], places[1:], prior), passes=found.passes)


def refined_by_cuts(objective: RobustObjective, theta: Tensor, steps: int, on_pass: OnPass | None = None) -> Descent:
    """``steps`` cycles of cutting sets from theta, where the tracked maximisers are the first cuts.

    One cycle is three passes from the worst points and one from scratch. The best weights met are kept, theta among them.
    """
    assert objective.delta is not None
    known = objective.delta[None] if objective.rivals is None else torch.cat([objective.delta[None], objective.rivals])
    sets = CuttingSets(objective, Budget(), known)
    found = sets.run(theta, tolerance=GAP / 10, max_passes=CYCLE * steps + 1, on_pass=on_pass)
    track(objective, found)
    status = "converged" if found.status == "noise floor" else found.status
    evaluation = objective.evaluation(found.theta, *objective.sums(found.theta, settle=False))
    return Descent(found.theta, evaluation, status, steps, [found.before, found.after])


def affordable(
    response: Response, objective: RobustObjective, budget: Budget, *, own_smoothing: bool = False
) -> Response:
    """The response in cheaper forms, as far as the sums would take more than a third of the budget: of the largest maximum of each
    sample alone, from random directions instead of exact Jacobians, by Gauss-Newton instead of exact input Hessians, along the
    logits' leading directions.

    ``own_smoothing``: what sets the width of switches may be measured along the leading directions too: any width is a
    definition, and kept with the snapshot.
    """
    limit = budget.limit
    if limit is None or objective.problem.backbone.affine:
        return response

    def dear() -> bool:
        return cost_of_sums(objective, response) > limit / 3

    for name, cheaper in (("max_exact", 0), ("sketch", SKETCH), ("directions", LEADING)):
        if hasattr(response, name) and dear():
            other = copy(response)
            setattr(other, name, cheaper)
            if cost_of_sums(objective, other) < cost_of_sums(objective, response):
                response = other
    if own_smoothing and objective.threat.jumps and dear():
        objective.set_smoothing(replace(objective.smoothing, directions=LEADING // 2))
    if objective.temperature and dear():
        objective.largest_alone()
    return response


def cost_of_sums(objective: RobustObjective, response: Response) -> float:
    """Gradients per sample that the total Hessian's sums take beside the maximisation, as if every pass were as dear as it can be,
    and every sample had all the local maxima that are weighed.
    """
    backbone, logits = objective.problem.backbone, objective.problem.n_logits
    smoothing = 2 * FORWARD + PULL * min(logits, objective.smoothing.directions or logits)
    smoothing = smoothing if objective.threat.jumps else 0.0
    if response.norm is None:
        return FORWARD + smoothing
    directions = int(getattr(response, "sketch", 0) or 0)
    through = PUSH * directions if directions else PULL * min(backbone.width, backbone.inputs)
    curved = not backbone.piecewise_linear and backbone.inputs <= int(getattr(response, "max_exact", 0))
    along = min(logits, getattr(response, "directions", None) or logits)
    root = 4 * FORWARD * backbone.inputs if curved else PULL * along
    weighed = 1 + objective.inner.rivals if objective.temperature else 1
    return smoothing + weighed * (2 * FORWARD + through + root)
