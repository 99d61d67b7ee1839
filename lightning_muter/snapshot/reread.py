"""What comes through a door is of its kind; and the objective of a stored training is read off its step again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError, MismatchError
from lightning_muter.model.dataset import SampleSource, insist_on_positions
from lightning_muter.model.loss_identity import in_words, same_loss
from lightning_muter.model.losses import Loss
from lightning_muter.model.read_step import read_objective
from lightning_muter.model.reading import Reading, Settled
from lightning_muter.snapshot.stored import Stored


@dataclass(frozen=True, kw_only=True, eq=False)
class Access:
    """How a caller has the rows of a training read; explained at :func:`lightning_muter.unlearn`."""

    loss: Loss | None = None
    collate: Callable[[list[Any]], Any] | None = None
    batch_size: int = 1024
    inputs: Any = None
    label: Any = None

    def read(
        self, model: nn.Module, data: Dataset[Any], positions: Sequence[int] | None = None, **of_rows: Any
    ) -> Reading:
        """The loss of these rows of the data (None: all)."""
        how = {"loss": self.loss, "collate": self.collate, "inputs": self.inputs, "label": self.label}
        return read_objective(model, data, positions=positions, **how, **of_rows)

    def reread(self, model: nn.Module, snapshot: Stored, data: Dataset[Any], positions: Sequence[int]) -> Reading:
        """The model's objective, read off these rows, with the weights that the snapshot holds of all rows.

        Raises:
            MismatchError: its loss is not the one that the snapshot was taken with.
        """
        # weights and decay are stored, whatever batches they were of: any size of batch will do to read the loss
        reading = self.read(
            model, data, positions, normalization=snapshot.normalization, rows_per_step=16, whole=snapshot.beyond_head
        )
        reading.rows_per_step = None
        if not same_loss(reading.identity, snapshot.loss_name):
            raise MismatchError(
                f"loss: got {in_words(reading.identity)}, the snapshot was taken with {in_words(snapshot.loss_name)}. Pass that "
                "loss, or take a new snapshot."
            )
        reading.settled = Settled(snapshot.sample_weight, snapshot.mass)
        return reading

    def source(
        self,
        reading: Reading,
        threat: ThreatModel,
        data: Dataset[Any],
        positions: Sequence[int] | None = None,
        **options: Any,
    ) -> SampleSource:
        """These rows of the data (None: all), on the model's device."""
        return SampleSource(
            data,
            collate=self.collate,
            batch_size=self.batch_size,
            device=next(reading.module.parameters()).device,
            threat=threat,
            readable=positions,
            reading=reading,
            **options,
        )


def check_given(model: object, snapshot: object, **data: object) -> None:
    """Refuse arguments of another kind, swapped ones among them.

    Args:
        model: is to be a module.
        snapshot: is to be one, not its path.
        data: datasets by the name of their argument; None where there is none.

    Raises:
        ArgumentError: model or snapshot is of another kind.
        UnsuitableError: rows of a dataset cannot be read by position.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", model, "a torch module", "The model comes first, then its snapshot.")
    if not isinstance(snapshot, Stored):
        advice = "Of a file: Snapshot.load(path); of a trained model: take_snapshot(model, dataset, ...)."
        raise ArgumentError("snapshot", snapshot, "a Snapshot or a WideSnapshot", advice)
    for dataset in data.values():
        if dataset is not None:
            insist_on_positions(dataset)
