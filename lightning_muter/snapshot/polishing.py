"""Minimising the robust objective of a head before its statistics are taken, and what that changed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_muter.adversarial.climb import LossAttack
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.objective.sharded import ShardedObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.response.choose import Response, as_response
from lightning_muter.minimise.best import Best, best_head
from lightning_muter.minimise.budget import Budget
from lightning_muter.minimise.train_on import TrainedOn, affordable, cost_of_sums, train_on
from lightning_muter.model.losses import Loss, accuracy, per_sample
from lightning_muter.scope.asked import Examples, Take
from lightning_muter.snapshot.progress import bar

#: Share of the samples whose adversarial examples may be unknown (they start from 0), for these to be used at all.
_UNKNOWN = 0.1
#: Stationarity that polish aims at, by the dtype of the backbone.
AIM = {torch.float64: 1e-6, torch.float32: 1e-4}
#: Samples on which robust figures are taken, spread over the data: a sixteenth of them, within these; steps of the climb that finds
#: their perturbations.
_LEAST, _MOST, _STEPS = 64, 256, 10
#: Gradients per sample that all these figures take, of a thousand samples or more; what few ones take is little.
COST = 2.0


@dataclass(frozen=True)
class Polished:
    """A head, the response its statistics are for, the stationarity that can be asked of it, and how it came about."""

    theta: Tensor
    response: Response
    aim: float
    done: TrainedOn | None = None
    best: Best | None = None
    curve: list[float] = field(default_factory=list)

    def figures(self, objective: RobustObjective, loss: Loss, before: Tensor) -> dict[str, Any]:
        """The entry "polish" of a snapshot's figures; none where nothing was polished.

        ``step_norm`` over ``head_norm`` says how far the head moved. Robust accuracy is an estimate on 64 to 256 samples, with
        the package's own climb at both heads.
        """
        done, problem, after = self.done, objective.problem, self.theta
        if done is None or self.best is None:
            return {}
        figures: dict[str, Any] = {
            "status": done.status,
            "passes": done.passes,
            "stationarity_before": done.before,
            "stationarity_after": done.after,
            "step_norm": float((after - before).norm()),
            "head_norm": float(before.norm()),
        }
        clean = _clean(objective, problem, loss, before, after)
        for name, theta, share in zip(("before", "after"), (before, after), clean, strict=True):
            figures[f"accuracy_{name}"] = share
            figures[f"robust_accuracy_{name}"] = None if share is None else _robust(objective, problem, loss, theta)
        curve = {
            "curve": [value for value in self.curve if math.isfinite(value)],
            "curve_of": "gap" if done.as_found else "stationarity",
        }
        return {"polish": figures | done.figures | self.best.to_dict() | curve}


def polished(objective: ShardedObjective, asked: Take, anchored: bool, budget: Budget) -> Polished:
    """The best head that was found from the model's on; the model itself is not changed.

    Args:
        anchored: the smoothing stays as it is; else how much is smoothed may be chosen, unless that is asked for.
        budget: in gradients per sample; a response that is not given may be chosen such that it can be paid.
    """
    source, problem = objective.source, objective.problem
    theta, own_smoothing = problem.read_theta(), asked.smoothing is None and not anchored
    aim = asked.tolerance
    if aim is None:
        aim = AIM.get(next(asked.model.parameters()).dtype, 1e-3)
    response = metric = as_response(asked.response, objective.threat).resolved(problem.backbone, source.n)
    if not isinstance(asked.response, Response):
        response = affordable(response, objective, budget, own_smoothing=own_smoothing)
    if asked.polish == 0:
        return Polished(theta, response, aim)
    if metric.norm is None:
        metric = as_response("auto", objective.threat).resolved(problem.backbone, source.n)
    budget.spend(cost_of_sums(objective, response) + COST)  # what comes after
    with bar(objective, "polish", asked.progress, budget) as told:
        done = train_on(
            objective,
            theta,
            metric,
            tolerance=aim,
            limit=asked.polish,
            anchored=anchored,
            budget=budget,
            first=None if asked.examples is None else known_examples(objective, asked.examples),
            on_step=told.step,
            on_pass=told.gap,
            sharpen=own_smoothing,
        )
    best = best_head(objective, theta, done, constants=asked.polish == "auto", anchored=anchored)
    # cutting sets aim at the objective, not at the gradient
    aim = max(aim, AIM[torch.float32]) if done.as_found else aim
    return Polished(problem.rounded(best.theta), response, aim, done, best, told.curve)


def known_examples(objective: ShardedObjective, examples: Examples) -> Tensor | None:
    """Adversarial examples (n, D) of this process's samples, if nearly all are known in every process."""
    found, known = [], 0
    for batch in objective.source.batches(objective.own):
        delta, there = examples(batch.x)
        found.append(delta)
        known += int(there.sum())
    missing = torch.tensor([1.0 - known / max(len(objective.own), 1)])
    if not found or float(objective.largest(missing.to(objective.problem.device))) > _UNKNOWN:
        return None
    return torch.cat(found)


def _clean(objective: RobustObjective, problem: HeadProblem, loss: Loss, *heads: Tensor) -> list[float | None]:
    """Accuracy on clean inputs of each head, by one pass through the backbone; None where there is none (regression)."""
    right, count = [torch.zeros(()) for _ in heads], 0
    for batch in objective.source.batches():
        with torch.no_grad():
            phi = problem.backbone(batch.x.to(problem.backbone.exact_dtype))
        count += len(phi)
        for number, theta in enumerate(heads):
            share = accuracy(loss, problem.logits(theta, phi), batch.y)
            if share is None:
                return [None for _ in heads]
            right[number] = right[number] + share.cpu() * len(phi)
    return [float(r) / count for r in right]


def _robust(objective: RobustObjective, problem: HeadProblem, loss: Loss, theta: Tensor) -> float:
    """Accuracy at the perturbations found, on some samples."""
    source = objective.source
    chosen = torch.linspace(0, source.n - 1, _samples(source.n)).long().tolist()
    climb = LossAttack(objective.threat, None, steps=_STEPS, random_start=False)
    right = 0.0
    for batch in source.batches(chosen):
        y = batch.y

        def logits(at: Tensor) -> Tensor:
            return problem.logits(theta, problem.backbone(at))

        found = climb.maximise(logits, batch.x.to(problem.backbone.exact_dtype), lambda z, y=y: per_sample(loss, z, y))  # type: ignore[misc]
        with torch.no_grad():
            share = accuracy(loss, logits(found), y)
        assert share is not None
        right += float(share) * len(y)
    return right / len(chosen)


def _samples(n: int) -> int:
    return min(n, _MOST, max(_LEAST, n // 16))
