"""Snapshots of models that were made to forget: forgotten rows are left out, and stay on the list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from lightning_muter.errors import MismatchError, RequestError
from lightning_muter.forgotten.modules import recalled
from lightning_muter.forgotten.rows import Forgotten, known_keys, remember_key
from lightning_muter.scope.asked import Take
from lightning_muter.snapshot.snapshot import Snapshot


def leaving_out_forgotten(take: Callable[[Take], Any], asked: Take) -> Any:
    """A snapshot without what the model (or the snapshot given as ``like``) was made to forget: it is not read, and is listed as
    forgotten.

    Raises:
        RequestError: forgotten rows lie elsewhere in the dataset than where they were forgotten, or it cannot be told.
    """
    like, dataset = asked.like, asked.dataset
    record = recalled(asked.model) | (Forgotten.of(like) if like is not None else Forgotten())
    if not record:
        return take(asked)
    remember_key(asked.key)
    gone = positions_to_leave_out(record, dataset, asked.collate)
    key = asked.key or known_keys().get(record.key_id)
    if key is not None and record.key_id and key.key_id != record.key_id:
        raise MismatchError(
            f"key: got {key.key_id}, the model's forgotten rows are known under {record.key_id}. Pass that key."
        )
    asked = replace(asked, key=key)
    if not gone:
        snapshot = take(asked)
    else:
        n = len(dataset)  # type: ignore[arg-type]
        kept = sorted(set(range(n)) - set(gone))
        weight = None if asked.sample_weight is None else torch.as_tensor(asked.sample_weight)[kept]
        part = replace(asked, dataset=Subset(dataset, kept), sample_weight=weight, like=like and part_of(like, kept))
        snapshot = spread(take(part), n, gone)
    snapshot.barred = snapshot.barred | record.barred
    return snapshot


def positions_to_leave_out(record: Forgotten, dataset: Dataset[Any], collate: Any = None) -> list[int]:
    """The forgotten rows of a training set, which must lie where they were forgotten.

    Raises:
        RequestError: some lie elsewhere: positions mean other rows than before.
    """
    gone = record.located(dataset, collate)
    length = len(dataset)  # type: ignore[arg-type]
    expected = record.placed(dataset)
    if gone != expected:
        moved = sorted(set(gone) - set(expected))
        raise RequestError(
            f"dataset: rows that were forgotten are among these {length}, at positions {moved[:5]}, which is not where they "
            "were forgotten: it is in another order, or holds them once more. Pass the training set as it was (forgotten rows "
            "included, they are left out), or what is retained of it."
        )
    return gone


def spread(part: Any, n_total: int, gone: Sequence[int], absent: Sequence[int] = ()) -> Any:
    """A snapshot of the retained rows, with positions counted in the full training set again."""
    out = {*gone, *absent}
    kept = [i for i in range(n_total) if i not in out]
    part.counted_in(kept, n_total)
    part.forgotten, part.absent = list(gone), list(absent)
    return part


def part_of(snapshot: Snapshot, kept: list[int]) -> Snapshot:
    """A snapshot as if it had been taken of these rows alone (for its maximisers; its sums are those of before)."""
    starts = None if snapshot.starts is None else snapshot.starts[kept]
    return replace(
        snapshot, n_total=len(kept), forgotten=[], absent=[], digests=snapshot.digests[kept], starts=starts, base_starts=None,
        sample_weight=None, mass=None,
    )  # fmt: skip
