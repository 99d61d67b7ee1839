"""Sums over processes: each sample read by one of them, one reduction per pass, the same numbers as one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_muter.errors import MismatchError, UnsuitableError

#: Strategies of Lightning that split parameters over processes.
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy", "XLAFSDPStrategy")


@dataclass(frozen=True)
class Shards:
    """This process's share of the samples.

    Args:
        rank, world: of this process; :meth:`current` asks torch.distributed.
        group: process group; None: the default one.

    >>> Shards(1, 2).share([10, 11, 12, 13, 14])
    [11, 13]
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @classmethod
    def current(cls, group: Any = None) -> Shards:
        """From torch.distributed if it is initialised, else one process."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def share(self, positions: Sequence[int]) -> list[int]:
        """Every world-th position from rank on: each is read once, whatever the length (no padding)."""
        return list(positions[self.rank :: self.world])

    def sum_(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the processes, in place, by one reduction in their widest dtype."""
        if self.world == 1 or not tensors:
            return
        dtype = tensors[0].dtype
        for t in tensors[1:]:
            dtype = torch.promote_types(dtype, t.dtype)
        flat = torch.cat([t.detach().to(dtype).reshape(-1) for t in tensors])
        dist.all_reduce(flat, group=self.group)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.reshape(t.shape))

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each entry over the processes."""
        if self.world == 1:
            return values
        out = values.detach().clone()
        dist.all_reduce(out, op=dist.ReduceOp.MAX, group=self.group)
        return out

    def gather(self, value: Any) -> list[Any]:
        """What every process has here (anything that can be pickled), by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that succeeds in every process or fails in every process.

        Raises:
            MismatchError: it failed in another process (where it failed, the error itself).
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        said = self.gather(None if failed is None else f"{type(failed).__name__}: {failed}")
        if failed is not None:
            raise failed
        for rank, reason in enumerate(said):
            if reason is not None:
                raise MismatchError(f"process {rank} of {self.world} refused, so nothing was done in any: {reason}")

    def agree(self, what: Mapping[str, str]) -> None:
        """Insist that every process was told the same.

        Raises:
            MismatchError: in every process, with the names of what differs.
        """
        told = self.gather(dict(what))
        names = sorted({name for theirs in told for name in theirs})
        differing = [name for name in names if len({theirs.get(name) for theirs in told}) > 1]
        if differing:
            ranks = [
                rank for rank, theirs in enumerate(told) if any(theirs.get(n) != told[0].get(n) for n in differing)
            ]
            raise MismatchError(
                f"{', '.join(differing)}: not the same in processes 0 and {', '.join(map(str, ranks))} of {self.world}; nothing "
                "was summed. Every process makes the same call: same weights, same dataset in the same order, same arguments."
            )

    def gather_rows(self, rows: Tensor, count: int) -> Tensor:
        """Rows (len(share), D) of all processes in the order of the ``count`` positions that were shared out."""
        if self.world == 1:
            return rows
        width = rows.shape[1:] if len(rows) else None
        shape = next(w for w in self.gather(width) if w is not None)
        full = torch.zeros(count, *shape, dtype=rows.dtype, device=rows.device)
        if len(rows):
            full[self.rank :: self.world] = rows
        dist.all_reduce(full, group=self.group)
        return full


def refuse_sharded_parameters(model: nn.Module) -> None:
    """Raise where parameters are split over processes (FSDP, tensor parallel): no process could take a product.

    Raises:
        UnsuitableError: with the way out.
    """
    kinds = {type(m).__name__ for m in model.modules()} | {type(p).__name__ for p in model.parameters()}
    found = kinds & {"FullyShardedDataParallel", "DTensor"}
    if found or any(k.startswith("FSDP") for k in kinds):
        raise UnsuitableError(
            f"The model's parameters are split over processes ({', '.join(sorted(found)) or 'FSDP'}): derivatives of "
            "the whole model are taken in every process here. Train with strategy='ddp', or load the full weights "
            "(a consolidated checkpoint) into an ordinary module first."
        )
