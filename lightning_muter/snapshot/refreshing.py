"""A new snapshot in the place of an old one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from lightning_muter.forgotten.digests import check_digests
from lightning_muter.model.losses import Loss
from lightning_muter.model.weight_decay import WholeDecay
from lightning_muter.snapshot.given import check_given
from lightning_muter.snapshot.ranks import ranks_agree
from lightning_muter.snapshot.reread import Access
from lightning_muter.snapshot.retaken import spread
from lightning_muter.snapshot.snapshot import Snapshot, WideSnapshot
from lightning_muter.snapshot.take import take_snapshot


@ranks_agree
def refresh(
    model: nn.Module,
    snapshot: Snapshot | WideSnapshot,
    data: Dataset[Any],
    *,
    polish: str | int = "auto",
    progress: bool = True,
    loss: Loss | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 1024,
    inputs: Any = None,
    label: Any = None,
) -> Snapshot | WideSnapshot:
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
    access = Access(loss, collate, batch_size, inputs, label)
    if isinstance(snapshot, WideSnapshot):
        from lightning_muter.scope.wide_taking import refresh_wide

        return refresh_wide(model, snapshot, data, access)
    snapshot.check_length(data, "data")
    kept = snapshot.retained_positions
    reading = access.reading(model, snapshot, data, kept)
    check_digests(snapshot, data, kept, "data", collate)
    part = take_snapshot(
        model,
        Subset(data, kept),
        threat_model=snapshot.threat_model,
        response=snapshot.response,
        curvature=snapshot.curvature,
        reading=reading.of_rows(kept),
        weight_decay=_by_name(snapshot, model),
        polish=polish,
        inner=snapshot.inner,
        smoothing=replace(snapshot.smoothing, anchor=None),
        collate=collate,
        batch_size=batch_size,
        key=snapshot.key,
        progress=progress,
    )
    part.barred = snapshot.barred
    return spread(part, snapshot.n_total, snapshot.forgotten, snapshot.absent)


def _by_name(snapshot: Snapshot, model: nn.Module) -> WholeDecay:
    """The decay of a snapshot by parameter name (one number per parameter, as optimisers have it)."""
    head = dict(model.named_modules())[snapshot.head_name]
    assert isinstance(head, nn.Linear)
    prefix = f"{snapshot.head_name}." if snapshot.head_name else ""
    found = WholeDecay({f"{prefix}weight": float(snapshot.decay[0, 0])})
    if head.bias is not None:
        found[f"{prefix}bias"] = float(snapshot.decay[0, -1])
    return found
