"""Losses of one-logit models, ``loss(logits, y, reduction="mean")``; targets 0/1 or -1/+1 (both are read as a sign)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muter.errors import ArgumentError


def signs(y: Tensor, like: Tensor) -> Tensor:
    """Targets 0/1 or -1/+1 as -1/+1 in the dtype of ``like``.

    >>> signs(torch.tensor([0, 1]), torch.zeros(2))
    tensor([-1.,  1.])
    """
    one = torch.ones((), dtype=like.dtype, device=like.device)
    return torch.where(y > 0, one, -one)


def _reduce(terms: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return terms
    if reduction == "mean":
        return terms.mean()
    if reduction == "sum":
        return terms.sum()
    raise ArgumentError("reduction", reduction, "'none', 'mean' or 'sum'")


def _single(logits: Tensor, y: Tensor) -> Tensor:
    if logits.numel() != y.numel():
        raise ArgumentError(
            "logits", tuple(logits.shape), "one logit per sample, (n, 1) or (n,)", "Use cross-entropy for more."
        )
    return logits.reshape(y.shape)


class LogisticLoss(nn.Module):
    r"""``log(1 + exp(-s z))`` with the sign ``s`` of the target: binary cross-entropy of one logit ``z``.

    >>> LogisticLoss()(torch.zeros(1, 1), torch.tensor([1.0]))
    tensor(0.6931)
    """

    def forward(self, logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        z = _single(logits, y)
        return _reduce(F.softplus(-signs(y, z) * z), reduction)


class SquaredLoss(nn.Module):
    r"""``(z - s)^2 / 2`` with the sign ``s`` of the target: the loss of ridge classification.

    Written out, since ``F.mse_loss`` has no forward-over-reverse derivative.

    >>> SquaredLoss()(torch.tensor([[3.0]]), torch.tensor([0]))
    tensor(8.)
    """

    def forward(self, logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        z = _single(logits, y)
        return _reduce((z - signs(y, z)).square() / 2, reduction)
