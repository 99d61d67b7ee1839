"""The traced loss of a row in the form that the rest of the package takes: ``loss(z, y, reduction="none") -> (n,)``.

Where the loss depends on several leaves of the batch (labels and weights, two targets, ...), y holds them side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.errors import ArgumentError
from lightning_muter.model.leaves import rows
from lightning_muter.model.rowwise import BatchLoss, Probe, alone


def packed(probe: Probe, labels: list[int]) -> Tensor:
    """The leaves that a loss depends on: one as it is, several side by side in float64 (whole numbers up to 2^53 are exact)."""
    at = [i for i in labels if rows(probe.leaves[i], probe.n)]
    if len(at) == 1:
        found: Tensor = probe.leaves[at[0]]
        return found
    if not at:
        return torch.zeros(
            probe.n, dtype=torch.float64, device=next(v.device for v in probe.leaves if isinstance(v, Tensor))
        )
    return torch.cat([probe.leaves[i].reshape(probe.n, -1).to(torch.float64) for i in at], 1)


class RowLoss:
    """The traced loss of every row, from the head's output and what :func:`packed` gave; (n,)."""

    traced = True  # takes z (n, K) and y as they are

    def __init__(self, batch_loss: BatchLoss, example: Probe, labels: list[int], identity: str) -> None:
        self.batch_loss, self.identity = batch_loss, identity
        self.labels = [i for i in labels if rows(example.leaves[i], example.n)]
        self._others = [None if rows(v, example.n) else v for v in example.leaves]
        self._forms = [(tuple(example.leaves[i].shape[1:]), example.leaves[i].dtype) for i in self.labels]

    def __call__(self, logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
        if reduction != "none":
            raise ArgumentError("reduction", reduction, "'none'")
        return alone(self.batch_loss, logits if logits.dim() > 1 else logits[:, None], self._unpacked(y))

    def _unpacked(self, y: Tensor) -> Probe:
        leaves, n = list(self._others), y.shape[0]
        if len(self.labels) == 1:
            leaves[self.labels[0]] = y
        else:
            done = 0
            for i, (shape, dtype) in zip(self.labels, self._forms, strict=True):
                size = int(torch.Size(shape).numel())
                part = y[:, done : done + size]
                leaves[i] = (part if dtype.is_floating_point else part.to(dtype)).reshape(n, *shape)
                done += size
        return Probe(leaves, n)

    def __repr__(self) -> str:
        return self.identity
