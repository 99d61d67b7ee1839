"""The adversarial examples of the last epoch, found again by the content of their samples.

A worst perturbation that training found is a cut of the robust objective (`minimise.cuts`), free of charge. Batches come shuffled
and know no positions, so each is kept under a hash of its clean input; an augmented sample is not found again, and does no harm.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Bytes of perturbations kept per epoch; beyond them none are.
_MOST = 1 << 29


class LastExamples:
    """Perturbations (in half precision) of the epoch at hand and of the one before: a fit may stop within an epoch."""

    def __init__(self) -> None:
        self._epochs: list[list[tuple[Tensor, Tensor]]] = [[]]
        self._bytes = 0

    def next_epoch(self) -> None:
        self._epochs, self._bytes = [self._epochs[-1], []], 0

    @torch.no_grad()
    def add(self, x: Tensor, found: Tensor) -> None:
        """Keep the perturbations of a batch."""
        if x.shape != found.shape:
            return
        delta = (found - x).flatten(1).to(torch.float16)
        self._bytes += delta.numel() * delta.element_size()
        if self._bytes <= _MOST:
            self._epochs[-1].append((content_keys(x), delta))

    @torch.no_grad()
    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Perturbations (n, D) of these samples, and which of them are known (n,); 0 where none is."""
        delta = torch.zeros(len(x), x[0].numel(), dtype=torch.float16, device=x.device)
        known = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        parts = [part for epoch in self._epochs for part in epoch]
        width = {part[1].shape[1] for part in parts}
        if not parts or width != {delta.shape[1]}:
            return delta, known
        keys, deltas = torch.cat([p[0] for p in parts]).to(x.device), torch.cat([p[1] for p in parts]).to(x.device)
        order = keys.sort(stable=True)  # of equal keys the last one is the newest
        wanted = content_keys(x)
        at = torch.searchsorted(order.values, wanted, right=True) - 1
        known = (at >= 0) & (order.values[at.clamp(min=0)] == wanted)
        delta = torch.where(known[:, None], deltas[order.indices[at.clamp(min=0)]], delta)
        return delta, known


def content_keys(x: Tensor) -> Tensor:
    """A 64-bit hash of each sample's numbers (n,), the same for any batch and device: whole-number arithmetic wraps around.

    >>> both = content_keys(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    >>> torch.equal(both[1:], content_keys(torch.tensor([[2.0, 1.0]]))), bool(both[0] == both[1])
    (True, False)
    """
    bits = x.detach().flatten(1).to(torch.float64).contiguous().view(torch.int64)
    generator = torch.Generator().manual_seed(0)
    odd = 2 * torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator) + 1
    mixed = (bits ^ (bits >> 29)) * odd.to(x.device)
    return (mixed ^ (mixed >> 32)).sum(1)
