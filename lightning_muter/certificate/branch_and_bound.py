"""How far the maximisers found are from the global inner maximum: branch and bound over the simplex of `curvature.dual`.

A cell is {low <= p <= high, sum p = 1}. The bound of G over it is taken around up to three points q: the best maximiser
known, where the ascent from the cell's centre leads, and the centre itself. Most samples are settled by one cell, the whole
range of their probabilities; the others are split until every cell is below the best value known (plus a tolerance), is shown
to hold no stationary point, or the work is spent: then the largest bound left is the answer, still a valid one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightning_muter.certificate.dual import CUBED, Dual
from lightning_muter.certificate.simplex import centre, linear_maximum, tight
from lightning_muter.solvers.eigen import symmetric_eigh

#: Numbers in one temporary of the bounding step.
_CHUNK = 2_000_000


@dataclass
class GlobalMaxima:
    """The best maximisers known (n, D), an upper bound (n,) of what the loss (plus rho) can rise above them, the cells looked at,
    and which samples had their work cut off (n,).
    """

    delta: Tensor
    gap: Tensor
    cells: int
    unsettled: Tensor


def global_maxima(dual: Dual, delta: Tensor, *, tolerance: float = 0.0, budget: int | None = None) -> GlobalMaxima:
    """The best maximisers and their certified gaps.

    Args:
        delta: (n, D) the maximisers found so far, anywhere in B(x): climbed further first.
        tolerance: per sample: what need not be told apart from 0.
        budget: cells looked at, at most (:func:`default_budget`).
    """
    budget = default_budget(dual) if budget is None else budget
    p, peak = dual.climb(dual.logits(delta).softmax(1), 20)
    gap = torch.zeros_like(p[:, 0])
    unsettled = torch.zeros_like(gap, dtype=torch.bool)
    open_, seen = torch.arange(len(p), device=p.device), 0
    while len(open_):
        search = _Search(dual.take(open_), p[open_], peak[open_], tolerance)
        cut = search.run(budget - seen)
        seen += search.seen
        p[open_], peak[open_], gap[open_], unsettled[open_] = search.p, search.peak, search.excess, cut
        # a larger maximum was met on the way: measured against that one
        open_ = open_[search.improved & ~cut]
    value = dual.primal(peak)
    rounding = (
        16 * torch.finfo(gap.dtype).eps * (dual.direction(p).norm(dim=1) * peak.norm(dim=1) + dual.rho.value(peak))
    )
    return GlobalMaxima(peak, dual.loss_gap(value, gap + rounding), seen, unsettled)


def default_budget(dual: Dual, seconds: float = 60.0) -> int:
    """One cell per sample, and about so many seconds of a processor more (by count: the same everywhere), at most 300 per
    sample. Most samples take one; where the ball is wide a few take hundreds.
    """
    n, m = dual.z.shape
    each = 3e-4 + 5e-8 * m * max(m * m, dual.x.shape[1])
    return n + min(max(299 * n, 3000), int(seconds / each))


@dataclass
class _Cells:
    """Cells of samples; ``excess``: an upper bound of G over the cell, less the value of the sample's maximiser."""

    sample: Tensor
    low: Tensor
    high: Tensor
    excess: Tensor
    axis: Tensor  # (C, m): how much each class moves the direction in which the bound is worst

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, index: Tensor) -> _Cells:
        return _Cells(*(getattr(self, f.name)[index] for f in fields(self)))

    @staticmethod
    def join(parts: list[_Cells]) -> _Cells:
        return _Cells(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(_Cells)))


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
        low, high = tight(*self.dual.region())
        cells = _Cells(
            torch.arange(n, device=low.device),
            low,
            high,
            self.dual.ceiling() - self.value + self.noise,
            torch.ones_like(low),
        )
        wide = max(m * m if m <= CUBED else m, self.dual.x.shape[1])
        size = max(1, _CHUNK // (m * wide))
        quick = True  # most samples are settled at once, before anything costly is done
        cut = torch.zeros_like(self.improved)
        while len(cells):
            cells = self._within(budget - self.seen, cells, cut)
            self.seen += len(cells)
            chunks = torch.arange(len(cells), device=low.device).split(size)
            cells = _Cells.join([self._settle(cells.take(i), quick) for i in chunks])
            cells = cells.take((~self.improved[cells.sample]).nonzero()[:, 0])
            if not quick:
                cells = _split(cells)
            quick = False
        return cut

    def _within(self, budget: int, cells: _Cells, cut: Tensor) -> _Cells:
        """All cells, or where that is more than what is left to spend, those of the samples with the fewest for half of it;
        the others are closed as they are.
        """
        if len(cells) <= budget:
            return cells
        count = torch.bincount(cells.sample, minlength=len(cut))
        order = count.argsort(stable=True)
        kept = torch.zeros_like(cut)
        kept[order] = count[order].cumsum(0) <= budget // 2
        stays = kept[cells.sample]
        rest = cells.take((~stays).nonzero()[:, 0])
        self._close(rest)
        cut[rest.sample] = True
        return cells.take(stays.nonzero()[:, 0])

    def _settle(self, cells: _Cells, quick: bool) -> _Cells:
        """Bound the cells (``quick``: from the maximiser alone); those that remain."""
        dual, ranges = self.dual.take(cells.sample), None
        if not quick:
            for _ in range(2):
                low, high = dual.narrow(cells.low, cells.high)
                cells.low, cells.high = tight(torch.maximum(cells.low, low), torch.minimum(cells.high, high))
        if dual.separable:
            ranges = dual.push(cells.low, cells.high)
        there = (cells.low <= cells.high).all(1) & (cells.low.sum(1) <= 1) & (cells.high.sum(1) >= 1)
        left = there.nonzero()[:, 0]  # an empty cell holds no stationary point of G, hence no maximum
        for trial in range(1 if quick else 3):
            if len(left) == 0:
                break
            part, here = cells.take(left), dual.take(left)
            span = None if ranges is None else (ranges[0][left], ranges[1][left])
            if trial == 0:  # G(q) <= value: only the rise counts, free of cancellation
                q, peak = self.p[part.sample], self.peak[part.sample]
                excess, axis = largest_rise(here, part.low, part.high, q, peak, span)
            else:
                q, peak = here.climb(centre(part.low, part.high), 8 if trial == 1 else 1)
                if trial == 1:
                    self._improve(part.sample, here, q)
                away = here.dual(q, peak)[0] - self.value[part.sample] + self.noise[part.sample]
                excess, axis = largest_rise(here, part.low, part.high, q, peak, span)
                excess = away + excess
            cells.excess[left], cells.axis[left] = torch.minimum(cells.excess[left], excess), axis
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


def largest_rise(
    dual: Dual, low: Tensor, high: Tensor, q: Tensor, peak: Tensor, ranges: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """An upper bound of G(p) - G(q) over the cell, inf where none is known (separable sigma); and the worst direction."""
    slope = dual.dual(q, peak)[1]
    d = ((high + 2 * q) / 3).clamp(min=torch.finfo(q.dtype).tiny)
    matrix = dual.spread(low, high, q, peak, ranges)
    known = (matrix < 1e100).all(2).all(1)
    matrix = torch.where(known[:, None, None], matrix, torch.zeros_like(matrix))
    root = d.sqrt()
    scaled = root[:, :, None] * matrix * root[:, None]
    normal = root / root.norm(dim=1, keepdim=True)  # the tangent of the simplex, scaled, is orthogonal to it
    scaled = scaled - normal[:, :, None] * (normal[:, None] @ scaled)
    scaled = scaled - (scaled @ normal[:, :, None]) * normal[:, None]
    values, vectors = symmetric_eigh((scaled + scaled.mT) / 2)
    values = values[:, -2:].clamp(min=0.0) * (1 + 1e-9) + 1e-9 if values.shape[1] > 1 else values.clamp(min=0.0) + 1e-9
    top, axis = values[:, -1], vectors[:, :, -1] / root
    mean = (slope * d).sum(1, keepdim=True) / d.sum(1, keepdim=True)
    linear = linear_maximum(slope - mean, low, high) - ((slope - mean) * q).sum(1)
    square = (d * (slope - mean).square()).sum(1) / (2 * (1 - top).clamp(min=1e-9))
    reach = torch.maximum((high - q).square(), (q - low).square())
    # the direction in which sigma may win is looked at on its own
    at_q = (axis * q).sum(1)
    along = torch.maximum(linear_maximum(axis, low, high) - at_q, linear_maximum(-axis, low, high) + at_q)
    rest = (values[:, 0] - 1).clamp(min=0.0) * (reach / d).sum(1)
    excess = ((top - 1).clamp(min=0.0) * along.square() + rest) / 2
    rise = torch.where(top < 1, torch.minimum(linear, square), linear + excess)
    lipschitz = torch.full_like(rise, torch.inf) if dual.separable else linear + dual.sway(low, high, q)
    bent = known & (rise <= lipschitz)
    axis = torch.where(bent[:, None], axis.abs(), dual.rows.norm(dim=2))
    return torch.where(bent, rise, lipschitz), axis


def _split(cells: _Cells) -> _Cells:
    """Two halves each, across the class whose range matters most in the worst direction."""
    width = cells.high - cells.low
    k = (width * cells.axis).argmax(1, keepdim=True)
    a, b = cells.low.gather(1, k), cells.high.gather(1, k)
    middle = (a + b) / 2
    low, high = tight(cells.low, cells.high.scatter(1, k, middle))
    first = replace(cells, low=low, high=high)
    low, high = tight(cells.low.scatter(1, k, middle), cells.high)
    return _Cells.join([first, replace(cells, low=low, high=high)])
