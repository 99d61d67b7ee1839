"""A snapshot of a part of a dataset whose positions count in the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from lightning_muter.scope.wide_taking import take_wide_snapshot
from lightning_muter.snapshot.snapshot import WIDE_BATCH, Snapshot, WideSnapshot
from lightning_muter.snapshot.take import take_snapshot

#: Fields with one row per sample.
_BY_ROW = ("digests", "starts", "base_starts", "sample_weight", "mass")


#: What is asked for with one kind of snapshot alone.
_OF_HEAD = ("budget", "fit", "examples")
_BEYOND = ("trades_beta",)


def snapshot_of_rows(
    model: nn.Module,
    dataset: Dataset[Any],
    rows: Sequence[int] | None,
    *,
    scope: str | Sequence[str],
    curvature: Any = None,
    batch_size: int = 1024,
    **options: Any,
) -> Snapshot | WideSnapshot:
    """A snapshot with this scope of these rows alone (None: all); the others become ``absent``: never read.

    Args:
        model: as of `take_snapshot` and `take_wide_snapshot`.
        dataset: the same.
        rows: positions in it.
        scope: "head", or what `take_wide_snapshot` takes.
        curvature: None: "hessian" of the head, "ggn" beyond it.
        batch_size: samples at a time; fewer beyond the head.
        options: of either; those that the scope has no use for are left out.
    """
    head = scope == "head"
    options = {name: value for name, value in options.items() if name not in (_BEYOND if head else _OF_HEAD)}
    options |= {
        "scope": scope,
        "curvature": curvature or ("hessian" if head else "ggn"),
        "batch_size": batch_size if head else min(batch_size, WIDE_BATCH),
    }
    take: Callable[..., Snapshot | WideSnapshot] = take_snapshot if head else take_wide_snapshot
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
