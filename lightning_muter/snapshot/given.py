"""What comes through the doors is of its kind, or the message says what to pass."""

from __future__ import annotations

from torch import nn

from lightning_muter.errors import ArgumentError
from lightning_muter.model.dataset import insist_on_positions
from lightning_muter.snapshot.stored import Stored


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
