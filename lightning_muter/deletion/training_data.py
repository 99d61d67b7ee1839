"""A model and its training data as Lightning would set them up before fit, with a checkpoint's weights; and their snapshot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.deletion.options import SnapshotOptions
from lightning_muter.errors import MismatchError, UnsuitableError
from lightning_muter.minimise.budget import Fit
from lightning_muter.model.losses import Loss
from lightning_muter.model.rows import collate_of, reachable, reached_by_iterating
from lightning_muter.model.stored_decay import stored_decay
from lightning_muter.scope.asked import Decay
from lightning_muter.snapshot.part import snapshot_of_rows
from lightning_muter.snapshot.refreshing import refresh
from lightning_muter.snapshot.stored import Stored
from lightning_muter.snapshot.summary import decay_text
from lightning_muter.storage.fingerprint import DigestKey


@dataclass(frozen=True)
class TrainingData:
    """The training dataset (positions in it are what requests name) and how its loader makes batches of it.

    ``loader``: tells which positions were trained on.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any]
    loader: DataLoader[Any]

    def rows(self) -> list[int] | None:
        """The positions that the loader's sampler reaches; None for all of them.

        Raises:
            UnsuitableError: it reaches others each time.
        """
        try:
            return reachable(self.loader)
        except LookupError:
            pass
        try:
            return reached_by_iterating(self.loader)
        except LookupError as kind:
            raise UnsuitableError(
                f"{kind} yields other rows each time, so that which ones were trained on cannot be told from it. Give the "
                "loader a torch.utils.data.Subset of the rows that were (and any sampler over all of it)."
            ) from None


def training_data(
    trainer: L.Trainer, model: L.LightningModule, datamodule: L.LightningDataModule | None
) -> TrainingData:
    """The training data, after the hooks that Lightning would have called before fit.

    Raises:
        UnsuitableError: not a single DataLoader over a dataset that can be read by position.
    """
    holder: Any = datamodule if datamodule is not None else model
    model.trainer = trainer
    trainer.strategy.connect(model)
    trainer._data_connector.attach_datamodule(model, datamodule)  # batches go through its hooks, or the model's
    if datamodule is not None:
        datamodule.trainer = trainer
        datamodule.prepare_data()
        datamodule.setup("fit")
    model.prepare_data()
    model.setup("fit")
    model.configure_model()
    loader = holder.train_dataloader()
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UnsuitableError(
            f"train_dataloader() returned {type(loader).__name__} over {type(dataset).__name__}; requests name "
            "positions in the dataset of a single DataLoader with `__len__` and `__getitem__`. Pass such a datamodule."
        )
    return TrainingData(dataset, collate_of(loader), loader)


def load_into(model: L.LightningModule, checkpoint: dict[str, Any], path: Path) -> None:
    """Give a model the weights of a checkpoint, or say that they do not fit (`MismatchError`)."""
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"], strict=True)
    except RuntimeError as error:
        raise MismatchError(
            f"{path}: its weights do not fit {type(model).__name__} as it was built here "
            f"({' '.join(str(error).split())[:400]}). Give the model the arguments that it was trained with, "
            "e.g. --model.init_args.width 64."
        ) from error
    model.eval()


def threat_of(
    trainer: L.Trainer, model: L.LightningModule, threat_model: ThreatModel | None
) -> tuple[ThreatModel | None, Any]:
    """Threat model and attack: as given, else off an AdversarialTraining callback (the module's own comes after)."""
    if threat_model is not None:
        return threat_model, None
    for callback in getattr(trainer, "callbacks", []):
        attack = getattr(callback, "attack", None)
        if getattr(callback, "threat_model", None) is not None or attack is not None:
            return callback.threat_model, attack
    return None, None


def trained_decay(checkpoint: dict[str, Any], model: L.LightningModule) -> tuple[Decay, str]:
    """The weight decay that a checkpoint was trained with, and where it was read: its own optimisers before today's code.

    Raises:
        UnsuitableError: the checkpoint's optimisers cannot be read (:func:`lightning_muter.model.stored_decay.stored_decay`).
    """
    found = stored_decay(checkpoint, model)
    if found is None:
        return "auto", "of configure_optimizers() as it is today: the checkpoint holds no optimiser state"
    return found, "of the optimiser in the checkpoint"


def trades_beta_of(trainer: L.Trainer, model: L.LightningModule) -> float | None:
    """The beta of TRADES, off an AdversarialTraining callback or the module's mixin; None where it is not used."""
    for callback in getattr(trainer, "callbacks", []):
        if getattr(callback, "trades_beta", None) is not None:
            return float(callback.trades_beta)
    beta = getattr(model, "trades_beta", None)
    return None if beta is None else float(beta)


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
