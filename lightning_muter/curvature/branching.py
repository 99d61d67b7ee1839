"""How far the maximisers found are from the global inner maximum: branch and bound over the simplex of `curvature.dual`.

A cell is {low <= p <= high, sum p = 1}. The bound of G over it is taken around up to three points q: the best maximiser
known, where the ascent from the cell's centre leads, and the centre itself. Most samples are settled by one cell, the whole
range of their probabilities; the others are split until every cell is below the best value known (plus a tolerance), is shown
to hold no stationary point, or the work is spent: then the largest bound left is the answer, still a valid one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.curvature.dual import Dual, linear_maximum

#: Numbers in one temporary of the bounding step.
_CHUNK = 2_000_000


@dataclass
class GlobalMaxima:
    """The best maximisers known (n, D), an upper bound (n,) of what the loss (plus rho) can rise above them, the cells looked at,
    and which samples had their work cut off (n,)."""

    delta: Tensor
    gap: Tensor
    cells: int
    unsettled: Tensor


def global_maxima(dual: Dual, delta: Tensor, *, tolerance: float = 0.0, effort: int = 100) -> GlobalMaxima:
    """The best maximisers and their certified gaps.

    Args:
        delta: (n, D) the maximisers found so far, anywhere in B(x): climbed further first.
        tolerance: per sample: what need not be told apart from 0.
        effort: cells per sample on average at most.
    """
    p, peak = dual.climb(dual.logits(delta).softmax(1), 20)
    gap = torch.zeros_like(p[:, 0])
    unsettled = torch.zeros_like(gap, dtype=torch.bool)
    open_, seen = torch.arange(len(p), device=p.device), 0
    while len(open_):
        search = _Search(dual.take(open_), p[open_], peak[open_], tolerance)
        cut = search.run(effort * len(p) - seen)
        seen += search.seen
        p[open_], peak[open_], gap[open_], unsettled[open_] = search.p, search.peak, search.excess, cut
        # a larger maximum was met on the way: measured against that one
        open_ = open_[search.improved & ~cut]
    value = dual.primal(peak)
    rounding = (
        16 * torch.finfo(gap.dtype).eps * (dual.direction(p).norm(dim=1) * peak.norm(dim=1) + dual.rho.value(peak))
    )
    return GlobalMaxima(peak, dual.loss_gap(value, gap + rounding), seen, unsettled)


@dataclass
class _Cells:
    """Cells of samples; ``excess``: an upper bound of G over the cell, less the value of the sample's maximiser."""

    sample: Tensor
    low: Tensor
    high: Tensor
    excess: Tensor

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, index: Tensor) -> _Cells:
        return _Cells(self.sample[index], self.low[index], self.high[index], self.excess[index])

    @staticmethod
    def join(parts: list[_Cells]) -> _Cells:
        return _Cells(*(torch.cat([getattr(p, f) for p in parts]) for f in ("sample", "low", "high", "excess")))


class _Search:
    """One branch and bound against fixed maximisers (p, peak)."""

    def __init__(self, dual: Dual, p: Tensor, peak: Tensor, tolerance: float) -> None:
        self.dual, self.p, self.peak = dual, p, peak
        self.value = dual.primal(peak)
        self.noise = 64 * torch.finfo(p.dtype).eps * (1 + dual.z.abs().amax(1) + self.value.abs())
        self.tolerance = tolerance + self.noise
        self.excess = torch.zeros_like(self.value)  # largest of the cells settled
        self.improved = torch.zeros_like(self.value, dtype=torch.bool)
        self.seen = 0

    def run(self, budget: int) -> Tensor:
        """Which samples were cut off (n,)."""
        n, m = self.dual.z.shape
        low, high = _tight(*self.dual.region())
        cells = _Cells(torch.arange(n, device=low.device), low, high, self.dual.ceiling() - self.value + self.noise)
        size = max(1, _CHUNK // (m * max(m, self.dual.x.shape[1])))
        while len(cells) and self.seen + len(cells) <= budget:
            self.seen += len(cells)
            parts = [self._settle(cells.take(i)) for i in torch.arange(len(cells), device=low.device).split(size)]
            cells = _Cells.join(parts)
            cells = _split(cells.take((~self.improved[cells.sample]).nonzero()[:, 0]), self.dual)
        self._close(cells)
        cut = torch.zeros_like(self.improved)
        cut[cells.sample] = True
        return cut

    def _settle(self, cells: _Cells) -> _Cells:
        """Bound the cells; those that have to be split."""
        dual, ranges = self.dual.take(cells.sample), None
        if dual.separable:
            for _ in range(2):
                low, high = dual.narrow(*dual.push(cells.low, cells.high))
                cells.low, cells.high = _tight(torch.maximum(cells.low, low), torch.minimum(cells.high, high))
            ranges = dual.push(cells.low, cells.high)
        there = (cells.low <= cells.high).all(1) & (cells.low.sum(1) <= 1) & (cells.high.sum(1) >= 1)
        left = there.nonzero()[:, 0]  # an empty cell holds no stationary point of G, hence no maximum
        for trial in range(3):
            if len(left) == 0:
                break
            part, here = cells.take(left), dual.take(left)
            span = None if ranges is None else (ranges[0][left], ranges[1][left])
            if trial == 0:  # G(q) <= value: only the rise counts, free of cancellation
                q, peak = self.p[part.sample], self.peak[part.sample]
                excess = _rise(here, part.low, part.high, q, peak, span)
            else:
                q, peak = here.climb(_centre(part.low, part.high), 8 if trial == 1 else 0)
                if trial == 1:
                    self._improve(part.sample, here, q)
                away = here.dual(q, peak)[0] - self.value[part.sample] + self.noise[part.sample]
                excess = away + _rise(here, part.low, part.high, q, peak, span)
            cells.excess[left] = torch.minimum(cells.excess[left], excess)
            below = cells.excess[left] <= self.tolerance[part.sample]
            self._close(cells.take(left[below]))
            left = left[~below]
        return cells.take(left)

    def _close(self, cells: _Cells) -> None:
        self.excess.scatter_reduce_(0, cells.sample, cells.excess, "amax")

    def _improve(self, sample: Tensor, dual: Dual, p: Tensor) -> None:
        """Adopt clearly larger maxima; the search for these samples has to begin again."""
        value = dual.primal(dual.peak(dual.direction(p)))
        for i in (value > self.value[sample] + 1e-9 * (1 + value.abs())).nonzero()[:, 0].tolist():
            one, s = torch.tensor([i], device=p.device), sample[i : i + 1]
            q, peak = dual.take(one).climb(p[one], 50)
            best = self.dual.take(s).primal(self.peak[s])
            if bool(dual.take(one).primal(peak) > best):
                self.p[s], self.peak[s], self.improved[s] = q, peak, True


def _tight(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds that sum p = 1 allows."""
    pad = 16 * torch.finfo(low.dtype).eps
    total_low, total_high = low.sum(1, keepdim=True), high.sum(1, keepdim=True)
    return torch.maximum(low, 1 - (total_high - high) - pad), torch.minimum(high, 1 - (total_low - low) + pad)


def _centre(low: Tensor, high: Tensor) -> Tensor:
    width = high - low
    share = (1 - low.sum(1, keepdim=True)) / width.sum(1, keepdim=True).clamp(min=torch.finfo(low.dtype).tiny)
    return low + share.clamp(0.0, 1.0) * width


def _rise(
    dual: Dual, low: Tensor, high: Tensor, q: Tensor, peak: Tensor, ranges: tuple[Tensor, Tensor] | None
) -> Tensor:
    """An upper bound of G(p) - G(q) over the cell; inf where none is known (separable sigma)."""
    slope = dual.dual(q, peak)[1]
    d = ((high + 2 * q) / 3).clamp(min=torch.finfo(q.dtype).tiny)
    matrix = dual.spread(low, high, q, peak, ranges)
    known = torch.isfinite(matrix).all(2).all(1)
    matrix = torch.where(known[:, None, None], matrix, torch.zeros_like(matrix))
    root = d.sqrt()
    scaled = root[:, :, None] * matrix * root[:, None]
    normal = root / root.norm(dim=1, keepdim=True)  # the tangent of the simplex, scaled, is orthogonal to it
    scaled = scaled - normal[:, :, None] * (normal[:, None] @ scaled)
    scaled = scaled - (scaled @ normal[:, :, None]) * normal[:, None]
    top = torch.linalg.eigvalsh((scaled + scaled.mT) / 2)[:, -1].clamp(min=0.0) * (1 + 1e-9) + 1e-9
    mean = (slope * d).sum(1, keepdim=True) / d.sum(1, keepdim=True)
    linear = linear_maximum(slope - mean, low, high) - ((slope - mean) * q).sum(1)
    square = (d * (slope - mean).square()).sum(1) / (2 * (1 - top).clamp(min=1e-9))
    reach = torch.maximum((high - q).square(), (q - low).square())
    excess = (top - 1).clamp(min=0.0) / 2 * (reach / d).sum(1)
    rise = torch.where(top < 1, torch.minimum(linear, square), linear + excess)
    if dual.separable:
        return torch.where(known, rise, torch.full_like(rise, torch.inf))
    rest = linear + dual.sway(low, high, q)
    return torch.where(known, torch.minimum(rise, rest), rest)


def _split(cells: _Cells, dual: Dual) -> _Cells:
    """Two halves each, across the class whose range moves v most."""
    width = cells.high - cells.low
    k = (width * dual.rows.norm(dim=2)[cells.sample]).argmax(1, keepdim=True)
    a, b = cells.low.gather(1, k), cells.high.gather(1, k)
    middle = ((a.sqrt() + b.sqrt()) / 2).square()
    first = _Cells(cells.sample, *_tight(cells.low, cells.high.scatter(1, k, middle)), cells.excess)
    second = _Cells(cells.sample, *_tight(cells.low.scatter(1, k, middle), cells.high), cells.excess.clone())
    return _Cells.join([first, second])
