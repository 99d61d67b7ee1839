"""What polishing a head changed, in figures: step, stationarity, accuracies and the objective, before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_muter.adversarial.adversary import LossAttack
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.minimise.train_on import TrainedOn
from lightning_muter.model.losses import Loss, accuracy, per_sample

#: Samples on which robust figures are taken, spread over the data; steps of the climb that finds their perturbations.
_SAMPLES, _STEPS = 256, 10


def polish_figures(
    objective: RobustObjective, problem: HeadProblem, loss: Loss, before: Tensor, after: Tensor, done: TrainedOn
) -> dict[str, Any]:
    """The entry "polish" of a snapshot's figures.

    ``step_norm`` over ``head_norm`` says how far the head moved. Robust accuracy and the objective (mean robust loss and weight
    decay) are estimates on up to 256 samples, with the package's own climb at both heads.
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
        robust, value = _robust(objective, problem, loss, theta)
        figures |= {f"accuracy_{name}": share, f"robust_accuracy_{name}": robust, f"objective_{name}": value}
    return {"polish": figures | done.figures}


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


def _robust(
    objective: RobustObjective, problem: HeadProblem, loss: Loss, theta: Tensor
) -> tuple[float | None, float | None]:
    """Accuracy and objective per sample at the perturbations found, on some samples; None for what has none."""
    source = objective.source
    chosen = torch.linspace(0, source.n - 1, min(source.n, _SAMPLES)).long().tolist()
    climb = LossAttack(objective.threat, None, steps=_STEPS, random_start=False)
    right: float | None = 0.0
    total = 0.0
    for batch in source.batches(chosen):
        x = batch.x.to(problem.backbone.exact_dtype)
        y = batch.y

        def logits(at: Tensor) -> Tensor:
            return problem.logits(theta, problem.backbone(at))

        found = climb.maximise(logits, x, lambda z, y=y: per_sample(loss, z, y))  # type: ignore[misc]
        with torch.no_grad():
            z = logits(found)
            losses = per_sample(loss, z, y)
            share = accuracy(loss, z, y)
        weights = 1.0 if batch.weight is None else batch.weight.to(losses)
        total += float((losses * weights).sum())
        right = None if share is None or right is None else right + float(share) * len(x)
    decay = 0.5 * float((objective.decay * theta.square()).sum())
    return None if right is None else right / len(chosen), total / source.total(chosen) + decay
