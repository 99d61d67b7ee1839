"""Several local maxima of nearly equal value: a soft maximum in place of the largest.

    phi_i(w) = T log sum_j q_j exp(l_j / T),    l_j: the values of the local maxima j = 0, 1, ... of sample i
    grad phi  = sum_j p_j grad l_j,             p_j = q_j exp(l_j / T) / sum
    D2 phi    = sum_j p_j D2 l_j + (1/T) sum_j p_j (grad l_j - grad phi) (grad l_j - grad phi)^T

The largest alone has a kink wherever two are equal, and a robust model is trained until they are: at its minimiser the
adversary is indifferent, and no gradient of a single maximum vanishes there. With q <- p after each step (the
exponential method of multipliers: Tseng and Bertsekas, Math. Programming 60, 1993) the minimisers tend, at any T, to
the one of sum_i max_j l_j: in the end p = q, so that all maxima with a weight are equal, and p are the multipliers.
phi <= max_j l_j, with equality there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_muter.curvature.hessian.sums import Sums
from lightning_muter.curvature.inner.ascent import Maximisers
from lightning_muter.curvature.problem.point import LocalPoint

#: A local maximum of a smaller share is left out.
_NEGLIGIBLE = 1e-8
#: Numbers in the gradients of contested samples that are kept for steps across kinks.
MOST = 50_000_000


@dataclass
class Kinks:
    """What contested samples look like to first order: sum_i w_i T log sum_j q_ij exp((l_ij + G_ij d) / T).

    Attributes:
        values: l (c, J), -inf where there is none.     gradients: G (c, J, p).
        prior: q (c, J).                                weight: w (c,).
        rows: their places in the order of the objective (c,).
    """

    values: Tensor
    gradients: Tensor
    prior: Tensor
    weight: Tensor
    rows: Tensor
    temperature: float

    @classmethod
    def joined(cls, parts: list[tuple[int, Kinks]]) -> Kinks | None:
        """Of batches that begin at these places; None if there are none, or too many to keep."""
        if not parts or sum(k.gradients.numel() for _, k in parts) > MOST:
            return None
        most = max(k.values.shape[1] for _, k in parts)

        def wide(t: Tensor, value: float) -> Tensor:
            shape = (t.shape[0], most - t.shape[1], *t.shape[2:])
            return torch.cat([t, t.new_full(shape, value)], 1)

        return cls(
            torch.cat([wide(k.values, -math.inf) for _, k in parts]),
            torch.cat([wide(k.gradients, 0.0) for _, k in parts]),
            torch.cat([wide(k.prior, 0.0) for _, k in parts]),
            torch.cat([k.weight for _, k in parts]),
            torch.cat([k.rows + begin for begin, k in parts]),
            parts[0][1].temperature,
        )

    def take(self, index: Tensor) -> Kinks:
        """Some of the samples."""
        return self._each(lambda t: t[index])

    def to(self, device: torch.device | str) -> Kinks:
        return self._each(lambda t: t.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Kinks:
        values, gradients, prior = change(self.values), change(self.gradients), change(self.prior)
        return Kinks(values, gradients, prior, change(self.weight), change(self.rows), self.temperature)

    def shares(self, moved: Tensor | None = None) -> Tensor:
        """p (c, J) after the values have changed by ``moved`` (c, J)."""
        values = self.values if moved is None else self.values + moved
        return torch.softmax(values / self.temperature + self.prior.log(), 1)

    def total(self, moved: Tensor | None = None) -> Tensor:
        """sum_i w_i phi_i."""
        values = self.values if moved is None else self.values + moved
        return (self.weight * self.temperature * torch.logsumexp(values / self.temperature + self.prior.log(), 1)).sum()

    def gradient(self, shares: Tensor) -> Tensor:
        """sum_i w_i sum_j p_ij G_ij, (p,)."""
        return ((self.weight[:, None] * shares).flatten() @ self.gradients.flatten(0, 1)).contiguous()

    def reweighed(self, temperature: float) -> Kinks:
        """With q <- p, and another T."""
        return replace(self, prior=self.shares(), temperature=temperature)

    def gap(self) -> float:
        """sum_i w_i (max_j l_ij - phi_i): 0 where the multipliers are right, so that all maxima of weight are equal."""
        return float((self.weight * self.values.amax(1)).sum() - self.total())

    def stiffness(self) -> Tensor:
        """The share of the kinks in the Hessian, sum_i (w_i / T) sum_j p_ij (G_ij - G_i)(G_ij - G_i)^T, (p, p)."""
        shares = self.shares()
        spread = self.gradients - (shares[:, :, None] * self.gradients).sum(1, keepdim=True)
        scaled = spread * (self.weight[:, None] * shares / self.temperature).sqrt()[:, :, None]
        flat = scaled.flatten(0, 1)
        return flat.T @ flat

    def step(self, rest: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
        """The minimiser d of  <rest, d> + 1/2 d^T H d + kinks(d), H^-1 given as ``metric``.

        With d = -H^-1 (rest + G^T lam) it is a convex problem in lam (c, J):  A = G H^-1 G^T,  b = -G H^-1 rest,

            1/2 lam^T A lam + kinks(b - A lam),      solved where  lam = w p(b - A lam);   Newton:  (I + S A) D = w p - lam

        with S the Hessian of the soft maxima.
        """
        there = torch.isfinite(self.values)
        g = self.gradients[there]  # (r, p)
        toward = torch.stack([metric(row) for row in g], 1)
        a = g @ toward
        a = (a + a.T) / 2
        start = metric(rest)
        b = -(g @ start)

        def spread(u: Tensor) -> Tensor:
            return torch.zeros_like(self.values).masked_scatter(there, u)

        weights = self.weight[:, None].expand_as(self.values)[there]
        sample = torch.arange(len(self.values), device=a.device)[:, None].expand_as(self.values)[there]
        same = sample[:, None] == sample[None, :]

        def value(lam: Tensor) -> float:
            moved = a @ lam
            return float(lam @ moved / 2 + self.total(spread(b - moved)))

        lam = weights * self.shares()[there]
        now = value(lam)
        eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
        for _ in range(60):
            p = self.shares(spread(b - a @ lam))[there]
            rest_of = weights * p - lam
            if float(rest_of.abs().max()) <= 1e-10 * float(weights.max()):
                break
            hess = (torch.diag(p) - torch.where(same, p[:, None] * p[None, :], 0.0)) * weights / self.temperature
            direction = torch.linalg.solve(eye + hess @ a, rest_of)
            t, better = 1.0, False
            while t > 1e-6:
                trial = value(lam + t * direction)
                if trial < now:
                    lam, now, better = lam + t * direction, trial, True
                    break
                t /= 2
            if not better:
                break
        return -(start + toward @ lam)


@dataclass
class Contest:
    """The local maxima of a batch, their weights q and shares p.

    Attributes:
        delta: (1 + m, n, D).       values, prior, share: (1 + m, n), values -inf where there is none.
        frozen: which of them are fixed points, not maxima (1 + m, n).
    """

    delta: Tensor
    values: Tensor
    prior: Tensor
    share: Tensor | None
    temperature: float
    frozen: Tensor | None = None
    _seen: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, found: Maximisers, temperature: float) -> Contest:
        """``share`` is None where the largest stands alone for every sample."""
        if not temperature or found.rivals is None or found.rival_values is None or found.prior is None:
            return cls(found.delta[None], found.value[None], torch.ones_like(found.value)[None], None, temperature)
        delta = torch.cat([found.delta[None], found.rivals])
        values = torch.cat([found.value[None], found.rival_values.to(found.value)])
        share = torch.softmax(values / temperature + found.prior.log(), 0)
        share = torch.where(share < _NEGLIGIBLE, 0.0, share)
        share = share / share.sum(0)
        alone = not bool(torch.isfinite(values[1:]).any())
        frozen = None
        if found.frozen is not None and bool(found.frozen.any()):
            frozen = torch.cat([torch.zeros_like(found.frozen[:1]), found.frozen])
        return cls(delta, values, found.prior, None if alone else share, temperature, frozen)

    @property
    def contested(self) -> Tensor:
        return torch.isfinite(self.values).sum(0) > 1

    def points(self) -> Iterator[tuple[int, slice | Tensor, Tensor, Tensor | None, bool]]:
        """(which of the maxima, rows, delta (n, D), shares of the rows, whether they are frozen)."""
        if self.share is None:
            yield 0, slice(None), self.delta[0], None, False
            return
        for j, (delta, share, value) in enumerate(zip(self.delta, self.share, self.values, strict=True)):
            there = torch.isfinite(value)
            kinds = [(there, False)]
            if self.frozen is not None:
                kinds = [(there & ~self.frozen[j], False), (there & self.frozen[j], True)]
            for mask, frozen in kinds:
                rows = mask.nonzero()[:, 0]
                if len(rows):
                    yield j, rows, delta, share[rows], frozen

    def saw(self, which: int, rows: slice | Tensor, local: LocalPoint) -> None:
        """Keep the gradients r phi^T of contested samples."""
        if self.share is None or isinstance(rows, slice):
            return
        some = self.contested[rows]
        gradient = local.terms.r[some, :, None] * local.problem.augment(local.phi[some])[:, None, :]
        self._seen.append((which, rows[some], gradient.flatten(1)))

    def close(self, sums: Sums, weight: Tensor | None) -> Kinks | None:
        """Add what the single maxima do not give: the relative entropy to the value, the spread of the gradients to the Hessian."""
        if self.share is None:
            return None
        scale = torch.ones_like(self.share[0]) if weight is None else weight.to(self.share)
        tiny = torch.finfo(self.prior.dtype).tiny  # weights may be 0 in single precision
        entropy = -torch.special.xlogy(self.share, self.share / self.prior.clamp(min=tiny)).sum(0)
        sums.value += self.temperature * (scale * entropy).sum()
        contested = self.contested
        sums.counts["contested"] += int(contested.sum())
        sums.count -= int(torch.isfinite(self.values).sum()) - len(contested)
        rows = contested.nonzero()[:, 0]
        index = torch.cumsum(contested, 0) - 1
        width = self._seen[0][2].shape[1]
        gradients = self._seen[0][2].new_zeros(len(rows), len(self.values), width)
        for j, at, gradient in self._seen:
            gradients[index[at], j] = gradient
        kinks = Kinks(
            self.values[:, rows].T.to(gradients), gradients, self.prior[:, rows].T.to(gradients),
            scale[rows].to(gradients), rows, self.temperature,
        )  # fmt: skip
        if sums.hessian is not None:
            sums.hessian.add_outer(kinks.shares(), gradients, kinks.weight / self.temperature)
        return kinks
