"""A new snapshot in the place of an old one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from lightning_muter.forgotten.digests import check_digests
from lightning_muter.model.losses import Loss
from lightning_muter.model.modes import full_precision
from lightning_muter.scope.base import Retained, S
from lightning_muter.scope.choose import scope_of
from lightning_muter.snapshot.ranks import ranks_agree
from lightning_muter.snapshot.reread import Access, check_given


@ranks_agree
@torch.inference_mode(False)
@full_precision()
def refresh(
    model: nn.Module,
    snapshot: S,
    data: Dataset[Any],
    *,
    polish: str | int = "auto",
    progress: bool = True,
    loss: Loss | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 1024,
    inputs: Any = None,
    label: Any = None,
) -> S:
    """A new snapshot of the retained samples at the current weights: nothing computed at the old ones remains.

    Args:
        model: with the weights the snapshot belongs to, or trained further on ``snapshot.retained(data)``.
        snapshot: what stands for the model so far: its objective, its key and who was forgotten are kept.
        data: the full training dataset; positions keep their meaning, forgotten rows are not read.
        polish: as of :func:`lightning_muter.take_snapshot`.
        progress: show a bar on a terminal.
        loss: of the training, where it is not read off the module.
        collate: the training loader's ``collate_fn``, where it had one of its own.
        batch_size: samples at a time.
        inputs: key or position in a batch, where it cannot be told which tensor is the input.
        label: the same for the label.

    Returns:
        The new snapshot; the old one is left as it is.

    Raises:
        MismatchError: the retained rows of ``data`` are not those of the snapshot.

    Example::

        unlearn(model, snapshot, [3, 17], train_set)
        snapshot = refresh(model, snapshot, train_set)
        snapshot.save("model.muter.snapshot")
    """
    check_given(model, snapshot, data=data)
    access = Access(loss=loss, collate=collate, batch_size=batch_size, inputs=inputs, label=label)
    snapshot.check_length(data, "data")
    kept = snapshot.retained_positions
    reading = access.reread(model, snapshot, data, kept)
    check_digests(snapshot, data, kept, "data", collate)
    left = Retained(model, snapshot, data, kept, reading, access)
    return scope_of(snapshot).refresh(left, polish, progress)
