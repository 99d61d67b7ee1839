"""The robust objective of a head over several processes: each evaluates its share, sums are reduced once per pass.

Every process then holds the same sums, so that polish, refine and solvers take the same steps everywhere without
further communication.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.objective import RobustObjective
from lightning_muter.curvature.total import Sums
from lightning_muter.distributed import Shards


@dataclass
class ShardedObjective(RobustObjective):
    """A `RobustObjective` whose ``positions`` are shared out; ``delta`` holds this process's maximisers only.

    Attributes:
        shards: this process's share.
    """

    shards: Shards = field(default_factory=Shards.current)
    _count: int = 0

    def __post_init__(self) -> None:
        everything: Sequence[int] = range(self.source.n) if self.positions is None else self.positions
        self._count = len(everything)
        self.positions = self.shards.share(everything)

    @property
    def count(self) -> int:
        """Samples of all processes."""
        return self._count

    def sums(self, theta: Tensor, **options: Any) -> tuple[Sums, Tensor]:
        sums, delta = super().sums(theta, **options)
        return self.reduced(sums), delta

    def reduced(self, sums: Sums) -> Sums:
        """Sums of this process's share, added up over the processes in place."""
        if self.shards.world > 1:  # kinks are known to the process that met them, and all must take the same steps
            self._met.kinks.clear()
        names = _names(self.shards, sums.counts)
        counts = torch.tensor([sums.count, *(sums.counts[n] for n in names)], dtype=torch.float64)
        counts = counts.to(sums.value.device, sums.value.dtype)
        tensors = [sums.value, sums.gradient, sums.gradient_scale, counts]
        if sums.hessian is not None:
            tensors.append(sums.hessian.blocks)
        self.shards.sum_(tensors)
        found = [round(c) for c in counts.tolist()]
        sums.count, sums.counts = found[0], Counter(dict(zip(names, found[1:], strict=True)))
        return sums


def _names(shards: Shards, counts: Counter[str]) -> list[str]:
    """The cases met anywhere, in one order for all."""
    if shards.world == 1:
        return sorted(counts)
    import torch.distributed as dist

    met: list[Any] = [None] * shards.world
    dist.all_gather_object(met, sorted(counts), group=shards.group)
    return sorted({name for names in met for name in names})
