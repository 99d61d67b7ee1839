"""A snapshot of a checkpoint's weights for the command line: a first one, or one in the place of another."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_muter.deletion.options import SnapshotOptions
from lightning_muter.deletion.training_data import TrainingData, threat_of, trades_beta_of, trained_decay
from lightning_muter.minimise.budget import Fit
from lightning_muter.model.losses import Loss
from lightning_muter.snapshot.part import snapshot_of_rows
from lightning_muter.snapshot.refreshing import refresh
from lightning_muter.snapshot.stored import Stored
from lightning_muter.snapshot.summary import decay_text
from lightning_muter.storage.fingerprint import DigestKey


def refreshed(
    trainer: L.Trainer, model: L.LightningModule, old: Stored, data: TrainingData, loss: Loss | None, size: int
) -> Stored:
    """A new snapshot in the place of the old one, at the weights that the model holds."""
    return refresh(
        model,
        old,
        data.dataset,
        loss=loss,
        collate=data.collate,
        batch_size=size,
        progress=trainer.progress_bar_callback is not None,
    )


def taken(
    trainer: L.Trainer,
    model: L.LightningModule,
    checkpoint: dict[str, Any],
    data: TrainingData,
    said: SnapshotOptions,
    key: DigestKey,
) -> Stored:
    """A first snapshot of the checkpoint's weights, which the model holds."""
    given = said.weight_decay != "auto"
    decay, read = (said.weight_decay, "given") if given else trained_decay(checkpoint, model)
    threat_model, attack = threat_of(trainer, model, said.threat_model)
    snapshot = snapshot_of_rows(
        model,
        data.dataset,
        data.rows(),
        attack=attack,
        trades_beta=trades_beta_of(trainer, model),
        fit=Fit(float(checkpoint.get("epoch", 0))),
        collate=data.collate,
        device=trainer.strategy.root_device,
        key=key,
        progress=trainer.progress_bar_callback is not None,
        **said.training() | {"threat_model": threat_model, "weight_decay": decay},
    )
    snapshot.figures["weight_decay_read"] = read
    print(f"weight_decay: {decay_text(snapshot)}, {read}")
    return snapshot
