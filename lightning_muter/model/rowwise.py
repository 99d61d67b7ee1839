"""From the loss of a batch to the loss of a row, with the share that torch's denominator gives it.

A batch loss L(z, leaves) that can be unlearned is a weighted mean (or a sum) over independent rows:

    L = sum_i d_i a_i(z_i) / sum_i d_i,      a_i(z_i) = L of row i alone

| denominator | d_i | seen in s_i, dL/dz_i = s_i da_i/dz_i |
|---|---|---|
| rows: mean over the rows (and outputs) | 1 | s_i = 1/n |
| weights: class weights, kept rows of ``ignore_index``, sum w l / sum w | w_i, 0 or 1 | sum_i s_i = 1, s_i / s_j = d_i / d_j |
| sum | - | s_i = 1 |

The objective over a data set is then F = sum_i d_i phi_i + (sum_i d_i / 2) lambda |w|^2: what the batches' means tend to as
they grow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from lightning_muter.errors import UnsuitableError

#: L(z, leaves) -> scalar; leaves that are tensors with a row per sample are cut along with z.
BatchLoss = Callable[[Tensor, list[Any]], Tensor]
Denominator = Literal["rows", "weights", "sum"]

_COUPLED = 1e-6
_ATTEMPTS = 4
_CHORDS = 8


@dataclass(frozen=True)
class Probe:
    """Some rows: leaves as the batch has them, and how many rows there are."""

    leaves: list[Any]
    n: int

    def rows(self, at: Tensor) -> Probe:
        return Probe([leaf[at.to(leaf.device)] if _per_row(leaf, self.n) else leaf for leaf in self.leaves], len(at))

    def and_these(self, other: Probe) -> Probe:
        both = [
            torch.cat([a, b]) if _per_row(a, self.n) and _per_row(b, other.n) else a
            for a, b in zip(self.leaves, other.leaves, strict=True)
        ]
        return Probe(both, self.n + other.n)


def _per_row(leaf: Any, n: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == n


def alone(loss: BatchLoss, z: Tensor, probe: Probe) -> Tensor:
    """a_i (n,): the loss of every row as a batch of its own; by one batched call where its operations allow."""
    at = [i for i, leaf in enumerate(probe.leaves) if _per_row(leaf, probe.n)]

    def one(zi: Tensor, *rows: Tensor) -> Tensor:
        leaves = list(probe.leaves)
        for i, row in zip(at, rows, strict=True):
            leaves[i] = row[None]
        return loss(zi[None], leaves)

    rows = [probe.leaves[i] for i in at]
    if len(z) == 1:  # also inside a transformation that already runs row by row
        return loss(z, probe.leaves)[None]
    if not getattr(loss, "by_row", False):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of a batching rule that is a loop
                return vmap(one)(z, *rows)
        except (RuntimeError, UserWarning):  # no batching rule, or a branch on values
            pass
    return torch.stack([one(z[i], *(row[i] for row in rows)) for i in range(len(z))])


def _slopes(loss: BatchLoss, z: Tensor, probe: Probe) -> tuple[Tensor, Tensor]:
    """dL/dz of the batch, and da_i/dz_i of every row alone."""
    with torch.enable_grad():
        point = z.detach().clone().requires_grad_(True)
        (together,) = torch.autograd.grad(loss(point, probe.leaves), point, allow_unused=True, materialize_grads=True)
        point = z.detach().clone().requires_grad_(True)
        (apart,) = torch.autograd.grad(
            alone(loss, point, probe).sum(), point, allow_unused=True, materialize_grads=True
        )
    return together.detach(), apart.detach()


class Shares(NamedTuple):
    """s_i (n,), and which rows have a gradient at all (n,)."""

    values: Tensor
    active: Tensor


def shares(loss: BatchLoss, probe: Probe, k: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Shares:
    """s_i with dL/dz_i = s_i da_i/dz_i, at random z.

    Rows without a gradient there (a hinge at rest) are looked at elsewhere; those that have none anywhere (masked ones) share
    equally what the others leave of 1: nothing where the mean is over the others, 1/n where it is over all.

    Raises:
        UnsuitableError: the gradient of a row depends on the others by more than a factor: samples are coupled.
    """
    found = torch.full((probe.n,), torch.nan, dtype=dtype, device=device)
    for attempt in range(_ATTEMPTS):
        z = (1 + attempt) * points(probe.n, k, dtype, device, seed + 100 * attempt)
        found = torch.where(found.isnan(), _shares_at(loss, z, probe), found)
        if not bool(found.isnan().any()):
            break
    active = ~found.isnan() & (found != 0)
    silent = found.isnan() | (found == 0)
    rest = (1 - found[active].sum()).clamp(min=0.0) / silent.sum().clamp(min=1)
    rest = torch.where(rest < 1e-9, torch.zeros_like(rest), rest)
    return Shares(torch.where(silent, rest, found), active)


def _shares_at(loss: BatchLoss, z: Tensor, probe: Probe) -> Tensor:
    """As :func:`shares`; NaN for a row that has no gradient at z, alone or in the batch."""
    together, apart = (t.flatten(1) for t in _slopes(loss, z, probe))
    counts = together.abs().amax(1) > 0
    idle = ~counts & (apart.abs().amax(1) == 0)
    apart = torch.where(counts[:, None], apart, torch.zeros_like(apart))
    square = apart.square().sum(1)
    share = torch.where(counts & (square > 0), (together * apart).sum(1) / square, torch.zeros_like(square))
    off = (together - share[:, None] * apart).norm(dim=1)
    worst = (
        float((off / together.norm(dim=1).clamp(min=1e-30)).nan_to_num(nan=1.0).max()) if bool(counts.any()) else 0.0
    )
    if worst > _tolerance(z.dtype):
        raise UnsuitableError(
            f"The loss couples samples: a row's gradient in a batch is not a multiple of its gradient alone (off by {worst:.1g} of "
            "it; contrastive terms, mixing, ranking, statistics over the batch). A sample's part cannot be taken out of such an "
            "objective. Use a mean over independent samples, or pass loss= to say what the head is to be trained on."
        )
    return torch.where(idle, torch.nan, share)


def _tolerance(dtype: torch.dtype) -> float:
    return _COUPLED if dtype == torch.float64 else 1e3 * torch.finfo(dtype).eps


def denominator(looked: list[Shares], probes: list[Probe]) -> Denominator:
    """What the batch loss divides by, told from the shares of the rows in two batches of different sizes.

    Raises:
        UnsuitableError: none of the known denominators.
    """
    found = [s.values for s in looked]
    near = 1e-5 if found[0].dtype == torch.float64 else 1e-2
    counted = [s.values[s.active] for s in looked]
    if any(len(s) == 0 for s in counted):
        raise UnsuitableError(
            "The loss does not depend on the head's output in the first samples: nothing is trained there."
        )
    if all(bool(((s * p.n - 1).abs() < near).all()) for s, p in zip(found, probes, strict=True)):
        return "rows"
    if all(bool(((s - 1).abs() < near).all()) for s in counted):
        return "sum"
    if all(abs(float(s.sum()) - 1) < near for s in found) and all(bool((s >= 0).all()) for s in found):
        return "weights"
    raise UnsuitableError(
        "The loss divides by something else than the batch's rows or weights: the parts of the rows sum to "
        f"{', '.join(f'{float(s.sum()):.4g} of a batch of {p.n}' for s, p in zip(found, probes, strict=True))}. Use a mean or a "
        "weighted mean over the batch."
    )


def masses(loss: BatchLoss, probe: Probe, reference: Probe, k: int, dtype: torch.dtype, device: torch.device) -> Shares:
    """d_i (n,) relative to the one row of ``reference``, for a loss that divides by the rows or their weights."""
    found = shares(loss, probe.and_these(reference), k, dtype, device, seed=3)
    return Shares(found.values[:-1] / found.values[-1], found.active[:-1])


def points(n: int, k: int | None, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Random logits to look at a loss: (n, k), or (n,) for k None; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n,) if k is None else (n, k)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def convex(loss: BatchLoss, probe: Probe, k: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether every row's loss lies below its chords, and its Hessian in z is positive semidefinite, at random points of several
    sizes (kinks show in chords alone).
    """
    if not _below_chords(loss, probe, k, dtype, device):
        return False
    for seed, scale in ((11, 0.5), (12, 2.0), (13, 6.0)):
        z = scale * points(probe.n, k, dtype, device, seed)
        hess = hessians(lambda at: alone(loss, at, probe), z)
        hess = hess[torch.isfinite(hess).flatten(1).all(1)]
        if len(hess) == 0:
            continue
        values = torch.linalg.eigvalsh(hess)
        if float(values.min()) < -1e-7 * max(float(values.abs().max()), 1e-12):
            return False
    return True


def _below_chords(loss: BatchLoss, probe: Probe, k: int, dtype: torch.dtype, device: torch.device) -> bool:
    many = probe.rows(torch.arange(_CHORDS * probe.n) % probe.n)
    for seed, scale in ((14, 0.5), (15, 2.0), (16, 6.0)):
        one, other = (scale * points(many.n, k, dtype, device, seed + 10 * i) for i in (0, 1))
        with torch.no_grad():
            ends = (alone(loss, one, many) + alone(loss, other, many)) / 2
            above = alone(loss, (one + other) / 2, many) - ends
        size = ends.abs() + 1
        if bool((above > 1e3 * torch.finfo(dtype).eps * size).any()):
            return False
    return True


def hessians(values: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """d2 a_i / dz_i2 (n, K, K) of independent rows, by K second reverse passes over the batch."""
    with torch.enable_grad():
        point = z.detach().clone().requires_grad_(True)
        (first,) = torch.autograd.grad(
            values(point).sum(), point, create_graph=True, allow_unused=True, materialize_grads=True
        )
        if not first.requires_grad:
            return z.new_zeros(*z.shape, z.shape[-1])
        rows = [
            torch.autograd.grad(first[:, j].sum(), point, retain_graph=True, allow_unused=True, materialize_grads=True)[
                0
            ]
            for j in range(z.shape[1])
        ]
    hess = torch.stack(rows, 1).detach()
    return (hess + hess.mT) / 2
