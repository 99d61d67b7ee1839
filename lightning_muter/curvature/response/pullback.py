"""G_i = J_i K_i J_i^T of a batch, and the sums of total Hessians that are made of it, block by block.

With u(v) = d2l/dwdx v = r a^T + (Lambda W a) phi^T, a = J v (rows: logits; the bias row of a is 0), the indirect part
u K u^T of one sample has for the logits k, l the block

    r_k r_l G + r_k E_l phi^T + phi (r_l E_k)^T + (E^T W^T Lambda)_kl phi phi^T,        G = J K J^T,  E = G W^T Lambda

so that the whole sum is a few weighted matrix products, accumulated in place. No per-sample matrix of the size of the
parameters is ever formed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

#: Numbers in the largest temporary beside the blocks (float64: 32 MiB).
_TEMPORARY = 4_000_000


@dataclass
class HeadTerms:
    """What the blocks of a batch are made of.

    Attributes:
        phi: features with a 1 for the bias, (n, q).        r, hess: dl/dz (n, K) and Lambda (n, K, K).
        weight: W (K, f).       scale: sample weights (n,).
        core: the factor before phi phi^T, (n, K, K).
    """

    phi: Tensor
    r: Tensor
    hess: Tensor
    weight: Tensor
    scale: Tensor
    core: Tensor


def pairs_of(n_logits: int) -> list[tuple[int, int]]:
    """(k, l) of the upper blocks, in the order of ``torch.triu_indices``."""
    return [(k, m) for k in range(n_logits) for m in range(k, n_logits)]


def add_direct(blocks: Tensor, terms: HeadTerms) -> None:
    """Add sum_i scale_i core_i,kl phi_i phi_i^T to the blocks (P, q, q)."""
    for block, (k, m) in zip(blocks, pairs_of(terms.r.shape[1]), strict=True):
        block.addmm_((terms.phi * (terms.scale * terms.core[:, k, m])[:, None]).T, terms.phi)


class Gram(ABC):
    """G_i = J_i K_i J_i^T of a batch, in whatever form is cheapest to sum."""

    @abstractmethod
    def add(self, blocks: Tensor, terms: HeadTerms) -> None:
        """Add direct and indirect parts to the blocks (P, q, q)."""

    @abstractmethod
    def times(self, columns: Tensor) -> Tensor:
        """G_i C_i: (n, f, K) -> (n, f, K)."""


@dataclass
class DenseGram(Gram):
    """G (n, f, f) itself."""

    value: Tensor

    def times(self, columns: Tensor) -> Tensor:
        return self.value @ columns

    def add(self, blocks: Tensor, terms: HeadTerms) -> None:
        phi, r, hess = terms.phi, terms.r, terms.hess
        n, f, _ = self.value.shape
        pairs = pairs_of(r.shape[1])
        scaled = r * terms.scale[:, None]
        flat = self.value.reshape(n, f * f)
        step = max(1, _TEMPORARY // (f * f))
        for at in range(0, len(pairs), step):
            weights = torch.stack([scaled[:, k] * r[:, m] for k, m in pairs[at : at + step]])
            blocks[at : at + step, :f, :f] += (weights @ flat).reshape(-1, f, f)
        moved = self.times(terms.weight.T @ hess)  # E
        core = _symmetric(hess @ terms.weight @ moved) + terms.core
        rows = moved.mT.contiguous()
        for block, (k, m) in zip(blocks, pairs, strict=True):
            share = terms.scale * core[:, k, m]
            if k == m:  # half of a symmetric block
                half = phi * (share / 2)[:, None]
                half[:, :f] += rows[:, k] * scaled[:, k, None]
                product = half.T @ phi
                block += product
                block += product.T
                continue
            both = phi * share[:, None]
            both[:, :f] += rows[:, m] * scaled[:, k, None]
            block.addmm_(both.T, phi)
            block[:, :f].addmm_((phi * scaled[:, m, None]).T, rows[:, k])


@dataclass
class HeadGram(Gram):
    """G_i = t I + W^T Gamma_i W: sums work in K dimensions, with E = W^T (t Lambda + Gamma W W^T Lambda)."""

    scale: float
    weight: Tensor  # (K, f)
    core: Tensor  # (n, K, K)

    def times(self, columns: Tensor) -> Tensor:
        return self.scale * columns + self.weight.T @ (self.core @ (self.weight @ columns))

    def add(self, blocks: Tensor, terms: HeadTerms) -> None:
        phi, r, hess, weight = terms.phi, terms.r, terms.hess, self.weight
        (n, k_all), f = r.shape, weight.shape[1]
        square = weight @ weight.T
        inner = self.scale * hess + self.core @ (square @ hess)  # E = W^T inner
        core = _symmetric(hess @ square @ inner) + terms.core
        scaled = r * terms.scale[:, None]
        through = [(phi * scaled[:, k, None]).T @ inner.reshape(n, -1) for k in range(k_all)]  # sum r_k phi inner^T
        pairs = pairs_of(k_all)
        weights = torch.stack([scaled[:, k] * r[:, m] for k, m in pairs])
        gammas = (weights @ self.core.reshape(n, -1)).reshape(-1, k_all, k_all)
        totals = self.scale * weights.sum(1)
        for block, gamma, total, (k, m) in zip(blocks, gammas, totals, pairs, strict=True):
            block.addmm_((phi * (terms.scale * core[:, k, m])[:, None]).T, phi)
            right = through[m].reshape(-1, k_all, k_all)[:, :, k].clone()
            right[:f] += weight.T @ gamma
            block[:, :f].addmm_(right, weight)
            block[:f, :].addmm_(weight.T, through[k].reshape(-1, k_all, k_all)[:, :, m].T)
            block[:f, :f].diagonal().add_(total)


def _symmetric(square: Tensor) -> Tensor:
    return (square + square.mT) / 2
