"""The gate: what a request did to the model, before it counts. A request that looks wrong is held until a person has decided.

Requests are input from outside. Rows can be chosen (or planted, and then asked for) so that removing them lowers the robustness
of what is left, or costs far more than a removal should (N. Marchant, B. Rubinstein, S. Alfeld, "Hard to Forget: Poisoning
Attacks on Certified Machine Unlearning", AAAI 2022). The gate looks at accuracy, solver and stationarity, and at the step beside
those of random requests of the same size. It is a screen: rows that are rightly removed (wrong labels) may be held too.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muter.adversarial.adversary import loss_at_hand
from lightning_muter.adversarial.climb import LossAttack, attack_scope
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError, MuterError, RequestError
from lightning_muter.evidence.roc import clopper_pearson
from lightning_muter.model.batches import split_batch
from lightning_muter.model.losses import Loss, accuracy, one_logit
from lightning_muter.snapshot.stored import Stored
from lightning_muter.unlearning.result import UnlearnResult
from lightning_muter.unlearning.unlearn import unlearn

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Verdict:
    """What the gate found. ``reasons`` is empty where nothing is held; ``figures`` are JSON values."""

    reasons: list[str]
    figures: dict[str, Any]

    @property
    def held(self) -> bool:
        return bool(self.reasons)

    def require(self) -> None:
        """Raise `RequestError` if the request is held."""
        if self.reasons:
            raise RequestError(
                f"held for a person's decision: {'; '.join(self.reasons)}. Nothing was written. Look at the rows that were asked "
                "for; to carry it out all the same, ask again with --accept_held true."
            )


@dataclass(frozen=True)
class Gate:
    """Thresholds of a request.

    Args:
        clean_drop, robust_drop: accuracy that a request may cost, in points on the test rows (what is within the 95 % interval of
            no loss is not held).
        clean_least, robust_least: accuracy in percent below which nothing is let through.
        stationarity: what is measured after it may not exceed this (and ten times what it was before).
        step_factor: |w_u - w| over the largest of ``random_requests`` random requests of the same size.
        steps: of the attack on the test rows.      seed: of the random requests.
    """

    clean_drop: float = 2.0
    robust_drop: float = 3.0
    clean_least: float = 0.0
    robust_least: float = 0.0
    stationarity: float = 1e-2
    step_factor: float = 5.0
    random_requests: int = 5
    steps: int = 20
    seed: int = 0

    def examine(
        self,
        before: nn.Module,
        after: nn.Module,
        snapshot: Stored,
        result: UnlearnResult,
        data: Dataset[Any],
        test: Batches,
        *,
        loss: Loss | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> Verdict:
        """Look at a request.

        Args:
            before, after: the model as it was and as the request left it.
            snapshot: as it was before the request.      data: the training dataset.
            test: batches of rows that were not trained on.
        """
        figures: dict[str, Any] = {}
        reasons: list[str] = []
        loss = loss_at_hand(loss, after)
        old_right, new_right = (_right(m, test, snapshot.threat_model, loss, self.steps) for m in (before, after))
        limits = {"clean": (self.clean_drop, self.clean_least), "robust": (self.robust_drop, self.robust_least)}
        for kind, (allowed, least) in limits.items():
            old, new = old_right[kind], new_right[kind]
            low, high = clopper_pearson(int(new.sum()), len(new))
            drop, margin = _paired(old, new)
            figures[kind] = {
                "before": 100 * float(old.mean()), "after": 100 * float(new.mean()), "low": 100 * low, "high": 100 * high,
                "drop": drop, "drop_margin": margin, "rows": len(new),
            }  # fmt: skip
            if drop > max(allowed, margin):  # more than is allowed, and more than chance
                about = f"(± {margin:.1f}, on {len(new)} rows)"
                reasons.append(f"{kind} accuracy falls by {drop:.1f} points {about}, {allowed:g} are allowed")
            if 100 * float(new.mean()) < least:
                reasons.append(f"{kind} accuracy is {100 * float(new.mean()):.1f} %, at least {least:g} % is wanted")
        figures |= {
            "status": result.solver["status"],
            "stationarity": result.stationarity_after,
            "step": result.step_norm,
        }
        if result.solver["status"] not in ("converged", "flat"):
            reasons.append(f"the solver ended with {result.solver['status']!r}")
        reached, limit = result.stationarity_after, max(self.stationarity, 10 * (result.stationarity_before or 0.0))
        if reached is not None and reached > limit:
            reasons.append(f"the model is stationary to {reached:.1e} only, {limit:.1e} is wanted")
        usual = self.random_steps(before, snapshot, data, len(result.forgotten), loss, collate)
        if usual:
            figures["step_of_random_requests"] = usual
            if result.step_norm > self.step_factor * max(usual):
                size = len(result.forgotten)
                reasons.append(
                    f"the step is {result.step_norm:.3g}, random requests of {size} rows take {max(usual):.3g} at most"
                )
        return Verdict(reasons, figures)

    def random_steps(
        self,
        before: nn.Module,
        snapshot: Stored,
        data: Dataset[Any],
        size: int,
        loss: Loss | None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> list[float]:
        """Steps of random requests of a size, from stored sums; none beyond the head, where each would read all the data."""
        if snapshot.reads_retained or size >= snapshot.n_retained:
            return []
        generator, found = np.random.default_rng(self.seed), []
        for _ in range(self.random_requests):
            rows = generator.choice(snapshot.retained_positions, size, replace=False).tolist()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # said by the request itself
                    tried = unlearn(
                        before, snapshot, rows, data, dry_run=True, loss=loss, collate=collate, progress=False
                    )
            except MuterError:
                continue
            found.append(tried.step_norm)
        return found


@dataclass
class Watch:
    """A gate at work on one request: it keeps the state from before."""

    gate: Gate
    model: nn.Module
    snapshot: Stored
    accept: bool = False
    verdict: Verdict | None = field(default=None)

    @classmethod
    def of(cls, gate: Gate | None, model: nn.Module, snapshot: Stored, accept: bool) -> Watch | None:
        """Before the request; None without a gate."""
        if gate is None:
            return None
        trainer = getattr(model, "_trainer", None)
        memo = {} if trainer is None else {id(trainer): None}
        return cls(gate, copy.deepcopy(model, memo), copy.deepcopy(snapshot), accept)

    def judge(
        self,
        model: nn.Module,
        result: UnlearnResult,
        data: Dataset[Any],
        test: Batches,
        *,
        loss: Loss | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        """After the request: enter the figures in the result, and raise `RequestError` if it is held."""
        verdict = self.gate.examine(self.model, model, self.snapshot, result, data, test, loss=loss, collate=collate)
        result.gate = {**verdict.figures, "held": verdict.reasons}
        if self.accept:
            result.warnings += [f"held by the gate and accepted by a person: {reason}" for reason in verdict.reasons]
        else:
            verdict.require()


def test_batches(datamodule: Any) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels of a datamodule's test rows, or else of its validation rows.

    Raises:
        ArgumentError: it has neither.
    """
    for name, stage in (("test_dataloader", "test"), ("val_dataloader", "validate")):
        loader = getattr(type(datamodule), name, None)
        if loader is None or loader.__module__.endswith("core.hooks"):  # Lightning's own, which only raises
            continue
        datamodule.setup(stage)
        found = [split_batch(batch)[:2] for batch in loader(datamodule)]
        if found:
            return found
    raise ArgumentError(
        "gate",
        type(datamodule).__name__,
        "a datamodule with test or validation rows",
        "The gate measures accuracy on them.",
    )


def _right(model: nn.Module, test: Batches, threat: ThreatModel, loss: Loss, steps: int) -> dict[str, np.ndarray]:
    """Per test row whether the prediction is right, on the input itself and on what the attack makes of it."""
    found: dict[str, list[Tensor]] = {"clean": [], "robust": []}
    parameter = next(model.parameters())
    attack = LossAttack(threat, loss, steps=steps, random_start=False) if threat.eps > 0 else None
    for x, y in test:
        x, y = x.to(parameter), y.to(parameter.device)
        with attack_scope(model):
            moved = x if attack is None else attack(model, x, y)
            with torch.no_grad():
                for kind, inputs in (("clean", x), ("robust", moved)):
                    logits = model(inputs)
                    if accuracy(loss, logits, y) is None:
                        raise ArgumentError(
                            "gate", "a regression", "a classifier", "The gate counts right predictions."
                        )
                    flat = one_logit(logits)
                    right = (logits.reshape(-1) > 0) == (y.reshape(-1) > 0) if flat else logits.argmax(1) == y
                    found[kind].append(right.cpu())
    if not found["clean"]:
        raise ArgumentError("test", "no rows", "at least one row that was not trained on")
    return {kind: torch.cat(parts).double().numpy() for kind, parts in found.items()}


def _paired(old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """Points lost on the same rows, and half of the 95 % interval."""
    lost = old - new
    spread = lost.std(ddof=1) / math.sqrt(len(lost)) if len(lost) > 1 else 0.0
    return 100 * float(lost.mean()), 100 * 1.96 * float(spread)
