"""A snapshot of a part of a dataset whose positions count in the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from lightning_muter.snapshot.snapshot import Snapshot, WideSnapshot

#: Fields with one row per sample.
_BY_ROW = ("digests", "starts", "base_starts", "sample_weight", "mass")


def snapshot_of_rows(
    take: Callable[..., Snapshot | WideSnapshot],
    model: nn.Module,
    dataset: Dataset[Any],
    rows: Sequence[int] | None,
    **options: Any,
) -> Snapshot | WideSnapshot:
    """``take(model, dataset, **options)`` of these rows alone (None: all); the others become ``absent``: never read."""
    if rows is None:
        return take(model, dataset, **options)
    return _counted_in(take(model, Subset(dataset, list(rows)), **options), list(rows), len(dataset))  # type: ignore[arg-type]


def _counted_in(part: Snapshot | WideSnapshot, rows: list[int], n: int) -> Snapshot | WideSnapshot:
    for name in _BY_ROW:
        value = getattr(part, name, None)
        if value is not None:
            full = value.new_zeros(n, *value.shape[1:])
            full[rows] = value
            setattr(part, name, full)
    inside = set(rows)
    part.forgotten = [rows[i] for i in part.forgotten]
    part.n_total, part.absent = n, [i for i in range(n) if i not in inside]
    return part
