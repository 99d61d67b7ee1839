"""The robust objective of a head over several processes: each evaluates its share, sums are reduced once per pass.

Every process then holds the same sums, and the same kinks between local maxima, so that polish, refine and solvers take the
same steps everywhere without further communication.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.hessian.sums import Sums
from lightning_muter.curvature.objective.base import Met
from lightning_muter.curvature.objective.head import RobustObjective, Tick
from lightning_muter.curvature.objective.soft_maximum import MOST, Kinks
from lightning_muter.model.distributed import Shards


@dataclass
class ShardedObjective(RobustObjective):
    """A `RobustObjective` whose ``positions`` are shared out; ``delta`` holds this process's maximisers only.

    Attributes:
        shards: this process's share.
    """

    shards: Shards = field(default_factory=Shards.current)

    @property
    def own(self) -> Sequence[int]:
        return self.shards.share(self.everything)

    def added(self, values: Tensor) -> Tensor:
        out = values.clone()
        self.shards.sum_([out])
        return out

    def largest(self, values: Tensor) -> Tensor:
        return self.shards.largest(values)

    def places_of(self, kinks: Kinks) -> tuple[Tensor, Tensor]:
        which = (kinks.rows % self.shards.world == self.shards.rank).nonzero()[:, 0]
        return which, kinks.rows[which] // self.shards.world

    @contextmanager
    def ticking(self, tick: Tick) -> Iterator[None]:
        """Tell of samples as they are read."""
        self.tick = tick
        try:
            yield
        finally:
            self.tick = None

    def starts_as_found(self, as_found: bool) -> None:
        """Whether maximisers are taken as polish left them."""
        self.inner = replace(self.inner, as_found=as_found)

    def joined(self, total: Sums) -> Sums:
        """Sums of parts as those of one pass; what local maxima it met is not kept."""
        self.passes += 1
        self.met = Met()
        return self.reduced(total)

    def sums(self, theta: Tensor, **options: Any) -> tuple[Sums, Tensor]:
        sums, delta = super().sums(theta, **options)
        return self.reduced(sums), delta

    def reduced(self, sums: Sums) -> Sums:
        """Sums of this process's share, added up over the processes in place; its kinks, put beside those of the others."""
        if self.shards.world == 1:
            return sums
        kinks = Kinks.joined(self.met.kinks)
        contested = sum(k.gradients.numel() for _, k in self.met.kinks)
        told = self.shards.gather((sorted(sums.counts), contested))
        names = sorted({name for theirs, _ in told for name in theirs})
        counts = torch.tensor([sums.count, *(sums.counts[n] for n in names)], dtype=torch.float64)
        counts = counts.to(sums.value.device, sums.value.dtype)
        tensors = [sums.value, sums.gradient, sums.gradient_scale, counts]
        if sums.hessian is not None:
            tensors.append(sums.hessian.blocks)
        self.shards.sum_(tensors)
        found = [round(c) for c in counts.tolist()]
        sums.count, sums.counts = found[0], Counter(dict(zip(names, found[1:], strict=True)))
        self.met.kinks = self._gathered(kinks) if 0 < sum(size for _, size in told) <= MOST else []
        return sums

    def _gathered(self, kinks: Kinks | None) -> list[tuple[int, Kinks]]:
        """The kinks of all processes, in the order of ``everything``."""
        device = self.problem.device
        mine = None
        if kinks is not None:
            mine = replace(kinks, rows=kinks.rows * self.shards.world + self.shards.rank).to("cpu")
        together = Kinks.joined([(0, k) for k in self.shards.gather(mine) if k is not None])
        return [] if together is None else [(0, together.take(together.rows.argsort()).to(device))]

    def stored_starts(self) -> Tensor | None:
        """Of all positions, in every process."""
        mine = super().stored_starts()
        return None if mine is None else self.shards.gather_rows(mine, self.count)

    def restore(self, stored: Tensor) -> None:
        """Track what :meth:`stored_starts` gave, this process its own."""
        self._track(stored[self.shards.share(range(self.count))])
