"""Minimising the robust objective of a head before its statistics are taken, and what that changed."""

from __future__ import annotations

import math
from collections.abc import Callable
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
from lightning_muter.snapshot.progress import bar

#: What knows adversarial examples of the training (`adversarial.examples`).
Examples = Callable[[Tensor], tuple[Tensor, Tensor]]
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
class Polish:
    """How a head is polished.

    Attributes:
        limit: "auto", or the passes; 0: the head stays.       aim: stationarity.       budget: in gradients per sample.
        given: the response was; else one may be chosen that the budget can pay.       anchored: the smoothing stays.
        own_smoothing: else how much is smoothed may be chosen, too.
    """

    limit: str | int
    aim: float
    budget: Budget
    examples: Examples | None = None
    given: bool = False
    anchored: bool = False
    own_smoothing: bool = True
    progress: bool = True

    def run(self, objective: ShardedObjective, theta: Tensor, response: Response) -> Polished:
        """The best head that was found from ``theta`` on; the model itself is not changed."""
        if self.limit == 0:
            return Polished(theta, self._paid(response, objective), self.aim)
        source, problem = objective.source, objective.problem
        metric = response
        if response.norm is None:
            metric = as_response("auto", objective.threat).resolved(problem.backbone, source.n)
        response = self._paid(response, objective)
        self.budget.spend(cost_of_sums(objective, response) + COST)  # what comes after
        with bar(objective, "polish", self.progress, self.budget) as told:
            done = train_on(
                objective,
                theta,
                metric,
                tolerance=self.aim,
                limit=self.limit,
                anchored=self.anchored,
                budget=self.budget,
                first=None if self.examples is None else known_examples(objective, self.examples),
                on_step=told.step,
                on_pass=told.gap,
                sharpen=self.own_smoothing,
            )
        best = best_head(objective, theta, done, constants=self.limit == "auto", anchored=self.anchored)
        # cutting sets aim at the objective, not at the gradient
        aim = max(self.aim, AIM[torch.float32]) if done.as_found else self.aim
        return Polished(problem.rounded(best.theta), response, aim, done, best, told.curve)

    def _paid(self, response: Response, objective: ShardedObjective) -> Response:
        if self.given:
            return response
        return affordable(response, objective, self.budget, own_smoothing=self.own_smoothing)


@dataclass(frozen=True)
class Polished:
    """A head, the response its statistics are for, the stationarity that can be asked of it, and how it came about."""

    theta: Tensor
    response: Response
    aim: float
    done: TrainedOn | None = None
    best: Best | None = None
    curve: list[float] = field(default_factory=list)

    def figures(self, objective: ShardedObjective, loss: Any, before: Tensor) -> dict[str, Any]:
        if self.done is None or self.best is None:
            return {}
        found = polish_figures(objective, objective.problem, loss, before, self.theta, self.done, self.best)
        found["polish"]["curve"] = [value for value in self.curve if math.isfinite(value)]
        found["polish"]["curve_of"] = "gap" if self.done.as_found else "stationarity"
        return found


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


def polish_figures(
    objective: RobustObjective,
    problem: HeadProblem,
    loss: Loss,
    before: Tensor,
    after: Tensor,
    done: TrainedOn,
    best: Best,
) -> dict[str, Any]:
    """The entry "polish" of a snapshot's figures.

    ``step_norm`` over ``head_norm`` says how far the head moved. Robust accuracy is an estimate on 64 to 256 samples, with
    the package's own climb at both heads.
    """
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
    return {"polish": figures | done.figures | best.to_dict()}


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
