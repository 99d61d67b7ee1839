"""Which rows went into a training, known by their content: 64-bit hashes of the batches as the model received them.

    h(row) = sum_j a_j u_j  mod 2^64          u: the bits of all tensors of the row as integers,  a: fixed random odd numbers

The sum is exact in integers, so that a row has the same hash in every batch, on every device and in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 1 << 21  # numbers of a batch hashed at a time: 16 MiB
_FOLD = 256  # batches after which hashes are made a set


class RowHashes:
    """The set of rows that were seen; a copy of a row counts as the row.

    >>> seen = RowHashes()
    >>> seen.add((torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])))
    >>> seen.positions([(torch.tensor([[2.0], [3.0]]), torch.tensor([1, 1]))])
    ([0], 1)
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._set = torch.zeros(0, dtype=torch.int64)
        self._factors: dict[tuple[int, int, torch.device], Tensor] = {}
        self.readable = True

    def add(self, batch: Any) -> None:
        """See the rows of a batch; of one without tensors nothing can be told any more."""
        found = self.hashes(batch)
        if found is None:
            self.readable = False
            return
        self._parts.append(found)
        if len(self._parts) >= _FOLD:
            self.seen()

    def seen(self) -> Tensor:
        """The hashes so far, sorted, without repetition."""
        if self._parts:
            self._set = torch.cat([self._set, *(p.cpu() for p in self._parts)]).unique()
            self._parts = []
        return self._set

    def include(self, hashes: Tensor) -> None:
        """Hashes that another process has seen."""
        self._parts.append(hashes)

    def hashes(self, batch: Any) -> Tensor | None:
        """h of every row (n,), over all tensors whose first size is that of the first one; None: no such tensor."""
        leaves = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim() and t.layout == torch.strided]
        rows = [t for t in leaves if len(t) == len(leaves[0])]
        if not rows or not len(rows[0]):
            return None
        total = torch.zeros(len(rows[0]), dtype=torch.int64, device=rows[0].device)
        for number, tensor in enumerate(rows):
            total += self._hashed(tensor.detach(), number).to(total.device)
        return total

    def _hashed(self, tensor: Tensor, number: int) -> Tensor:
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        words = tensor.reshape(len(tensor), -1).contiguous().view(_WORDS[tensor.element_size()])
        key = (number, words.shape[1], words.device)
        if key not in self._factors:
            generator = torch.Generator().manual_seed(number)
            drawn = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=generator) * 2 + 1
            self._factors[key] = drawn.to(words.device)
        step = max(1, _AT_ONCE // max(1, words.shape[1]))
        parts = [(words[i : i + step].to(torch.int64) * self._factors[key]).sum(1) for i in range(0, len(words), step)]
        return torch.cat(parts)

    def positions(self, batches: Iterable[Any]) -> tuple[list[int], int]:
        """Positions, counted through ``batches``, of the rows that were seen; and how many seen rows are not there."""
        found = [self.hashes(batch) for batch in batches]
        table = torch.cat([f.cpu() for f in found if f is not None]) if found else torch.zeros(0, dtype=torch.int64)
        return self.positions_in(table)

    def positions_in(self, table: Tensor) -> tuple[list[int], int]:
        """As :meth:`positions`, given the hashes of all rows."""
        seen = self.seen()
        return torch.isin(table, seen).nonzero()[:, 0].tolist(), int((~torch.isin(seen, table)).sum())


def reachable(loader: DataLoader[Any]) -> list[int] | None:
    """The positions that a loader's sampler can yield, where its kind tells: None for all of them.

    Raises:
        LookupError: a sampler of another kind; only what it yields can tell.
    """
    n = len(loader.dataset)  # type: ignore[arg-type]
    sampler, dropped = _sampler(loader)
    if isinstance(sampler, RandomSampler) or (
        isinstance(sampler, DistributedSampler) and sampler.dataset is loader.dataset
    ):
        return None  # over some epochs: drop_last leaves out others each time
    if isinstance(sampler, SubsetRandomSampler):
        return _part(sampler.indices, n)
    if isinstance(sampler, WeightedRandomSampler):
        return _part((sampler.weights > 0).nonzero()[:, 0].tolist(), n)
    if isinstance(sampler, SequentialSampler):
        return _part(range(n - dropped), n)
    raise LookupError(type(sampler).__name__)


def reached_in_one_epoch(loader: DataLoader[Any]) -> bool:
    """Whether every epoch yields every position that can be reached."""
    sampler, dropped = _sampler(loader)
    if isinstance(sampler, RandomSampler):
        return not (sampler.replacement or dropped or sampler._num_samples not in (None, len(loader.dataset)))  # type: ignore[arg-type]
    return isinstance(sampler, SequentialSampler) or (isinstance(sampler, SubsetRandomSampler) and not dropped)


def _sampler(loader: DataLoader[Any]) -> tuple[Any, int]:
    """What yields positions one by one, and how many of them drop_last leaves out; a batch sampler of another kind as it is."""
    outer: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(outer) is not BatchSampler:
        return outer, 0
    return outer.sampler, len(outer.sampler) % outer.batch_size if outer.drop_last else 0  # type: ignore[arg-type]


def reached_by_iterating(loader: DataLoader[Any]) -> list[int] | None:
    """The positions that a sampler of any kind yields, None for all; for those that yield the same ones each time.

    Raises:
        LookupError: it yields other ones the second time.
    """
    n = len(loader.dataset)  # type: ignore[arg-type]
    source: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    once, again = (
        {int(i) for item in source for i in (item if hasattr(item, "__iter__") else [item])} for _ in range(2)
    )
    if once != again:
        raise LookupError(type(_sampler(loader)[0]).__name__)
    return _part(once, n)


def collate_of(loader: DataLoader[Any]) -> Callable[[list[Any]], Any]:
    """How single samples become a batch: where whole batches of indices go to the dataset, they are stacked."""
    return torch.utils.data.default_collate if takes_whole_batches(loader) else loader.collate_fn


def takes_whole_batches(loader: DataLoader[Any]) -> bool:
    """Whether the dataset is asked for lists of indices (``batch_size=None`` and a sampler that yields them)."""
    if loader.batch_sampler is not None or isinstance(loader.sampler, (RandomSampler, SequentialSampler)):
        return False
    if isinstance(loader.sampler, BatchSampler):
        return True
    with torch.random.fork_rng(devices=[]):
        return hasattr(next(iter(loader.sampler), None), "__iter__")


def in_order(loader: DataLoader[Any], positions: Sequence[int], size: int = 256) -> DataLoader[Any]:
    """These samples in order, as the loader makes batches of them."""
    rows: Subset[Any] = Subset(loader.dataset, list(positions))
    return DataLoader(rows, batch_size=size, collate_fn=collate_of(loader), num_workers=loader.num_workers)


def _part(indices: Iterable[Any], n: int) -> list[int] | None:
    found = sorted({int(i) for i in indices})
    return None if len(found) == n else found
