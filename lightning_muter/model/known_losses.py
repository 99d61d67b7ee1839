"""Losses with closed forms, recognised by what they do and not by their name: a row's loss equal to c_i times one of them.

What is recognised keeps its fast paths (and its certificate); everything else stays the traced function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_muter.model.losses import Loss, per_sample
from lightning_muter.model.rowwise import BatchLoss, Probe, alone, points

Label = Callable[[list[Any]], Tensor]

_SEEDS = (1, 2)


@dataclass(frozen=True)
class Known:
    """``alone(row) = c_i * loss(z_i, label_i)``."""

    loss: Loss
    label: Label
    k: int

    def factors(self, batch: BatchLoss, probe: Probe, counts: Tensor, dtype: torch.dtype) -> Tensor | None:
        """c_i (n,) of these rows (0 where ``counts`` is False), or None where the loss is not this one after all."""
        y = self.label(probe.leaves)
        found = [self._compared(batch, probe, y, counts, dtype, seed) for seed in _SEEDS]
        if any(f is None for f in found):
            return None
        first, second = found
        near = 1e-6 if dtype == torch.float64 else 1e-3
        assert first is not None
        assert second is not None
        if bool(((first - second).abs() > near * first.abs().clamp(min=1e-12)).any()):
            return None
        return first

    def _compared(
        self, batch: BatchLoss, probe: Probe, y: Tensor, counts: Tensor, dtype: torch.dtype, seed: int
    ) -> Tensor | None:
        near = 1e-6 if dtype == torch.float64 else 1e-3
        z = points(probe.n, self.k, dtype, y.device, seed)
        with torch.enable_grad():
            point = z.clone().requires_grad_(True)
            values = alone(batch, point, probe)
            (slope,) = torch.autograd.grad(values.sum(), point)
            other = z.clone().requires_grad_(True)
            known = per_sample(self.loss, other, y)
            (like,) = torch.autograd.grad(known.sum(), other)
        slope, like = (torch.where(counts[:, None], t, torch.zeros_like(t)) for t in (slope, like))
        factor = (slope * like).sum(1) / like.square().sum(1).clamp(min=1e-300)
        off = (slope - factor[:, None] * like).norm(dim=1) > near * slope.norm(dim=1)
        apart = (values - factor * known).abs() > near * (values.abs() + known.abs())
        if bool((counts & (off | apart | ~(factor >= 0))).any()):
            return None
        return torch.where(counts, factor, torch.zeros_like(factor)).detach()


def recognise(
    batch: BatchLoss, probe: Probe, uses: list[int], k: int, counts: Tensor, dtype: torch.dtype
) -> Known | None:
    """The closed form that a batch loss's rows are multiples of, or None.

    Args:
        uses: leaves that the loss depends on.     k: outputs of the head.
        counts: rows that enter the loss at all (not those that ``ignore_index`` leaves out), (n,) bool.
    """
    smoothed = functools.partial(_smoothing, batch, probe, k=k, counts=counts, dtype=dtype)
    for loss, label in candidates(probe, uses, k, counts, smoothed):
        known = Known(loss, label, k)
        try:
            if known.factors(batch, probe, counts, dtype) is not None:
                return known
        except (RuntimeError, ValueError, IndexError):  # labels of another form
            continue
    return None


def candidates(
    probe: Probe, uses: list[int], k: int, counts: Tensor, smoothed: Callable[[Label], float | None] | None = None
) -> Iterator[tuple[Loss, Label]]:
    """Closed forms whose labels one of these leaves could be; ``smoothed``: what label smoothing the loss would have with it."""
    for i in uses:
        leaf = probe.leaves[i]
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != probe.n:
            continue
        classes: Label | None = None
        if k > 1 and leaf.numel() == probe.n and _classes(leaf, k, counts):
            classes = functools.partial(_indices, i, k)
        elif k > 1 and tuple(leaf.shape[1:]) == (k,) and _one_hot(leaf):
            classes = functools.partial(_hottest, i)
        if classes is not None:
            yield F.cross_entropy, classes
            smoothing = smoothed(classes) if smoothed is not None else None
            if smoothing is not None:
                yield functools.partial(F.cross_entropy, label_smoothing=smoothing), classes
        if k > 1 and tuple(leaf.shape[1:]) == (k,):
            yield F.cross_entropy, functools.partial(_targets, i)
        if leaf.numel() == probe.n * k:
            numbers = functools.partial(_flat, i) if k == 1 else functools.partial(_targets, i)
            yield F.binary_cross_entropy_with_logits, numbers
            yield F.mse_loss, numbers
            yield F.huber_loss, numbers


def _one_hot(leaf: Tensor) -> bool:
    return bool(((leaf == 0) | (leaf == 1)).all()) and bool((leaf.sum(1) == 1).all())


def _classes(leaf: Tensor, k: int, counts: Tensor) -> bool:
    """Whether the rows that count hold class indices."""
    values = leaf.reshape(-1)[counts]
    whole = values == values.round() if values.is_floating_point() else torch.ones_like(values, dtype=torch.bool)
    return bool((whole & (values >= 0) & (values < k)).all())


def _indices(i: int, k: int, leaves: list[Any]) -> Tensor:
    y = leaves[i].reshape(-1).long()
    return torch.where((y >= 0) & (y < k), y, torch.zeros_like(y))  # ignored rows have weight 0


def _hottest(i: int, leaves: list[Any]) -> Tensor:
    found: Tensor = leaves[i].argmax(1)
    return found


def _targets(i: int, leaves: list[Any]) -> Tensor:
    found: Tensor = leaves[i]
    return found if found.is_floating_point() else found.to(torch.get_default_dtype())


def _flat(i: int, leaves: list[Any]) -> Tensor:
    return _targets(i, leaves).reshape(-1)


def _smoothing(
    batch: BatchLoss, probe: Probe, label: Label, k: int, counts: Tensor, dtype: torch.dtype
) -> float | None:
    """epsilon of label smoothing if the rows' gradients are c_i (p - (1 - epsilon) e_y - epsilon / K)."""
    at = counts.nonzero()[:1, 0]
    row = probe.rows(at)
    z = points(1, k, dtype, at.device, 5)
    with torch.enable_grad():
        point = z.clone().requires_grad_(True)
        value = alone(batch, point, row)
        (slope,) = torch.autograd.grad(value.sum(), point)
    y = label(row.leaves)
    p = z.softmax(1)
    # value = c (logsumexp(z) - <t, z>), slope = c (p - t): a shift of all outputs leaves both as they are, so c comes from the value
    base = torch.logsumexp(z, 1) - (p * z).sum(1)
    scale = (value.detach() - (slope * z).sum(1)) / base
    target = p - slope / scale[:, None]
    rest = torch.ones_like(target, dtype=torch.bool)
    rest[0, y[0]] = False
    smoothing = float(target[rest].mean() * k)
    return round(smoothing, 9 if dtype == torch.float64 else 4) if 0 < smoothing < 1 else None
