"""Several local maxima of an inner problem side by side: which are kept, and what becomes of their weights.

As the weights of the model move, maxima appear and vanish (a maximum meets a saddle). One that vanishes is not forgotten:
the *point* where it was stays among the rivals, frozen. For fixed delta the loss is convex in the head and below phi, so
that its value and gradient are a cut: sum_j p_j grad l_j is an epsilon-subgradient of max_delta l whatever points j stand
for, epsilon what they fall short of it. Without that memory a sample whose maxima exist on one side each of the minimiser is
thrown from one to the other for ever (disaggregated bundle methods: Lemarechal, Nemirovskii and Nesterov, Math.
Programming 69, 1995).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Least weight of a local maximum that was just found, and of one that is tracked.
_FRESH, _FAINT = 0.1, 1e-4
#: Least weight of a maximum that is remembered when it vanishes.
_REMEMBERED = 1e-3


def close(a: Tensor, b: Tensor) -> Tensor:
    """Whether two maximisers are one and the same."""
    return (a - b).norm(dim=-1) <= 0.05 * b.norm(dim=-1)


def ranked(deltas: Tensor, values: Tensor, rivals: int) -> tuple[Tensor, Tensor]:
    """Of candidates (m, n, D) with values (m, n) the best, an earlier one unless a later one wins clearly, and up to ``rivals``
    next best ones that are elsewhere: (1 + rivals, n, D), values (-inf where there is none).
    """
    best = torch.zeros_like(values[0], dtype=torch.long)
    top, rounding = values[0], 1e-9 if deltas.dtype == torch.float64 else 1e-6
    for j in range(1, len(values)):  # equal maxima up to rounding may not change places
        wins = values[j] > top + rounding * (1 + top.abs())
        best, top = torch.where(wins, j, best), torch.where(wins, values[j], top)
    rows = torch.arange(deltas.shape[1], device=deltas.device)
    chosen, kept, left = [deltas[best, rows]], [top], values.clone()
    for _ in range(min(rivals, len(values) - 1)):
        left = left.masked_fill(close(deltas, chosen[-1]), -math.inf)
        pick = left.argmax(0)
        value = left[pick, rows]
        chosen.append(torch.where(torch.isfinite(value)[:, None], deltas[pick, rows], chosen[0]))
        kept.append(value)
    return torch.stack(chosen), torch.stack(kept)


@dataclass
class Several:
    """Places (1 + m, n, D) of local maxima, the best first, with heights (-inf: none), weights and whether they are frozen."""

    places: Tensor
    heights: Tensor
    weights: Tensor = field(init=False)
    frozen: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weights = torch.zeros_like(self.heights)
        self.frozen = torch.zeros_like(self.heights, dtype=torch.bool)

    def merge(self) -> None:
        """Ascents may end at the same maximum: it counts once."""
        for j in range(1, len(self.places)):
            for k in range(j):
                same = close(self.places[j], self.places[k]) & torch.isfinite(self.heights[k])
                self.heights[j] = self.heights[j].masked_fill(same, -math.inf)

    def inherit(
        self,
        before: Tensor,
        ends: Tensor,
        prior: Tensor,
        margin: float,
        value: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        """Hand on the weights ``prior`` (J, n) of tracked maxima, which were at ``before`` (J, n, D) and went up to ``ends``.

        Of those that end at the same maximum the nearest hands its weight on; another one of weight, that was elsewhere, is
        frozen where it was, if ``value`` says how high that is at (rows, points).
        """
        there = torch.isfinite(self.heights)
        gap = (ends[:, None] - self.places[None]).norm(dim=-1).masked_fill(~there, math.inf)  # (J, 1 + m, n)
        home = gap.argmin(1)
        moved = (before - self.places.gather(0, home[:, :, None].expand_as(before))).norm(dim=-1)
        for j in range(len(before)):
            self.weights.scatter_add_(0, home[j][None], prior[j][None])
        if value is None:
            return
        for j in range(len(before)):
            of_weight = (prior[j] > _REMEMBERED) & (prior[j] < 1 - _REMEMBERED)
            rows = of_weight.nonzero()[:, 0]
            if not len(rows):
                continue
            twin = (home[:, rows] == home[j, rows]) & (moved[:, rows] < moved[j, rows]) & (prior[:, rows] > 0)
            elsewhere = ~(close(before[j, rows], self.places[:, rows]) & torch.isfinite(self.heights[:, rows])).any(0)
            rows = rows[twin.any(0) & elsewhere]
            if len(rows):
                self._freeze(rows, before[j, rows], prior[j, rows], home[j, rows], margin, value(rows, before[j, rows]))

    def _freeze(self, rows: Tensor, place: Tensor, weight: Tensor, home: Tensor, margin: float, height: Tensor) -> None:
        """Keep these places in free slots."""
        free = ~torch.isfinite(self.heights[1:, rows])
        room = free.any(0) & (height > self.heights[0, rows] - 2 * margin)
        rows, place, weight, home, height = rows[room], place[room], weight[room], home[room], height[room]
        slot = 1 + free[:, room].to(torch.uint8).argmax(0)
        self.places[slot, rows], self.heights[slot, rows] = place, height
        self.weights[home, rows] -= weight
        self.weights[slot, rows], self.frozen[slot, rows] = weight, True

    def settle(self, *, fresh: bool) -> None:
        """Weights that sum to 1, with a least one for each that is there."""
        there = torch.isfinite(self.heights)
        least = _FRESH if fresh else _FAINT
        weights = torch.where(self.weights <= 0, least, self.weights.clamp(min=_FAINT)) * there
        self.weights = weights / weights.sum(0)
