"""A snapshot of a part of a dataset whose positions count in the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from lightning_muter.scope.base import Scope
from lightning_muter.scope.choose import as_scope
from lightning_muter.snapshot.stored import Stored
from lightning_muter.snapshot.take import take_snapshot


def snapshot_of_rows(
    model: nn.Module,
    dataset: Dataset[Any],
    rows: Sequence[int] | None,
    *,
    scope: str | Sequence[str] | Scope[Any],
    **options: Any,
) -> Stored:
    """A snapshot with this scope of these rows alone (None: all); the others become ``absent``: never read.

    Args:
        model: as of `take_snapshot`.
        dataset: the same.
        rows: positions in it.
        scope: the same.
        options: of either; those that the scope has no use for are left out.
    """
    scope = as_scope(scope)
    options = {name: value for name, value in options.items() if name not in scope.useless} | {"scope": scope}
    if rows is None:
        return take_snapshot(model, dataset, **options)
    rows, n = list(rows), len(dataset)  # type: ignore[arg-type]
    part = take_snapshot(model, Subset(dataset, rows), **options)
    part.counted_in(rows, n)
    part.forgotten, part.absent = [rows[i] for i in part.forgotten], sorted(set(range(n)) - set(rows))
    return part
