"""What polishing a head changed, in figures: step, stationarity, accuracies and the objective, before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_muter.adversarial.climb import LossAttack
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.minimise.best import Best
from lightning_muter.minimise.train_on import TrainedOn
from lightning_muter.model.losses import Loss, accuracy, per_sample

#: Samples on which robust figures are taken, spread over the data: a sixteenth of them, within these; steps of the climb that finds
#: their perturbations.
_LEAST, _MOST, _STEPS = 64, 256, 10
#: Gradients per sample that all these figures take, of a thousand samples or more; what few ones take is little.
COST = 2.0


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
