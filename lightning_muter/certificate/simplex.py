"""Cells {low <= p <= high, sum p = 1} of the probability simplex; the last dimension is m, the number of classes."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_maximum(slope: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """max <slope, p> over low <= p <= high, sum p = 1: the largest slopes are filled first. Last dimension: m.

    >>> linear_maximum(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    """
    slope, low, high = torch.broadcast_tensors(slope, low, high)
    ordered, index = slope.sort(-1, descending=True)
    width = (high - low).gather(-1, index)
    room = 1 - low.sum(-1, keepdim=True)
    filled = torch.minimum(width, (room - (width.cumsum(-1) - width)).clamp(min=0.0))
    return (slope * low).sum(-1) + (ordered * filled).sum(-1)


def centre(low: Tensor, high: Tensor) -> Tensor:
    """A point of the cell, sum p = 1, as far into every range as into the others."""
    width = high - low
    share = (1 - low.sum(1, keepdim=True)) / width.sum(1, keepdim=True).clamp(min=torch.finfo(low.dtype).tiny)
    return low + share.clamp(0.0, 1.0) * width


def odds_range(most: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of softmax, from the largest values (n, m, m) of every difference z_k - z_l."""
    pad = 64 * torch.finfo(most.dtype).eps
    high = 1 / (-most).exp().sum(2)
    low = 1 / most.exp().sum(1)
    return low * (1 - pad), (high * (1 + pad)).clamp(max=1.0)


def tight(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds that sum p = 1 allows."""
    pad = 16 * torch.finfo(low.dtype).eps
    total_low, total_high = low.sum(1, keepdim=True), high.sum(1, keepdim=True)
    return torch.maximum(low, 1 - (total_high - high) - pad), torch.minimum(high, 1 - (total_low - low) + pad)
