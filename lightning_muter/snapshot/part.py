"""A snapshot of a part of a dataset whose positions count in the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from lightning_muter.snapshot.snapshot import Snapshot, WideSnapshot
from lightning_muter.snapshot.take import take_snapshot

#: What is asked for with one kind of snapshot alone.
_OF_HEAD = ("budget", "fit", "examples", "size_cap")
_BEYOND = ("trades_beta",)


def snapshot_of_rows(
    model: nn.Module,
    dataset: Dataset[Any],
    rows: Sequence[int] | None,
    *,
    scope: str | Sequence[str],
    **options: Any,
) -> Snapshot | WideSnapshot:
    """A snapshot with this scope of these rows alone (None: all); the others become ``absent``: never read.

    Args:
        model: as of `take_snapshot`.
        dataset: the same.
        rows: positions in it.
        scope: the same.
        options: of either; those that the scope has no use for are left out.
    """
    useless = _BEYOND if scope == "head" else _OF_HEAD
    options = {name: value for name, value in options.items() if name not in useless} | {"scope": scope}
    if rows is None:
        return take_snapshot(model, dataset, **options)
    return _counted_in(take_snapshot(model, Subset(dataset, list(rows)), **options), list(rows), len(dataset))  # type: ignore[arg-type]


def _counted_in(part: Snapshot | WideSnapshot, rows: list[int], n: int) -> Snapshot | WideSnapshot:
    inside = set(rows)
    part.counted_in(rows, n)
    part.forgotten, part.absent = [rows[i] for i in part.forgotten], [i for i in range(n) if i not in inside]
    return part
