"""Sums of per-sample total Hessians of a head, in packed symmetric blocks (`curvature.grams` says what is in a block)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.curvature.hessian.direct import Curvature, direct_core
from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.choose import Response
from lightning_muter.curvature.response.pullback import HeadTerms, add_direct, pairs_of

#: Numbers in the largest temporary of one accumulation step (float64: 256 MiB).
_WORKSPACE = 32_000_000


@dataclass
class BlockSymmetric:
    """A symmetric (K q, K q) matrix as its K (K + 1) / 2 upper blocks (q, q), in the order of ``torch.triu_indices``.

    >>> m = BlockSymmetric.zeros(2, 1, torch.float64)
    >>> m.blocks += torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    >>> m.dense()
    tensor([[1., 2.],
            [2., 3.]], dtype=torch.float64)
    """

    n_logits: int
    width: int
    blocks: Tensor

    @classmethod
    def zeros(cls, n_logits: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> BlockSymmetric:
        pairs = n_logits * (n_logits + 1) // 2
        return cls(n_logits, width, torch.zeros(pairs, width, width, dtype=dtype, device=device))

    @property
    def size(self) -> int:
        return self.n_logits * self.width

    @property
    def pairs(self) -> Tensor:
        return torch.triu_indices(self.n_logits, self.n_logits, device=self.blocks.device)

    def dense(self) -> Tensor:
        """The full symmetric matrix."""
        out = self.blocks.new_empty(self.n_logits, self.width, self.n_logits, self.width)
        for p, (k, m) in enumerate(pairs_of(self.n_logits)):
            out[k, :, m, :] = self.blocks[p]
            out[m, :, k, :] = self.blocks[p].T
        return out.reshape(self.size, self.size)

    def add_outer(self, shares: Tensor, vectors: Tensor, scale: Tensor) -> None:
        """Add sum_i scale_i sum_j shares_ij (v_ij - v_i)(v_ij - v_i)^T, v_i = sum_j shares_ij v_ij; vectors (c, J, K q)."""
        spread = vectors - (shares[:, :, None] * vectors).sum(1, keepdim=True)
        rows = (spread * (shares * scale[:, None]).sqrt()[:, :, None]).reshape(-1, self.n_logits, self.width)
        for p, (k, m) in enumerate(pairs_of(self.n_logits)):
            self.blocks[p] += rows[:, k].T @ rows[:, m]

    def minus(self, other: BlockSymmetric, *, reuse: bool = False) -> BlockSymmetric:
        """The difference; ``reuse``: in the memory of ``other``, which is then gone."""
        blocks = other.blocks.neg_().add_(self.blocks) if reuse else self.blocks - other.blocks
        return BlockSymmetric(self.n_logits, self.width, blocks)

    def clone(self) -> BlockSymmetric:
        return BlockSymmetric(self.n_logits, self.width, self.blocks.clone())


@dataclass
class Sums:
    """Sums over samples at one theta: robust objective, gradient, total Hessian, and what was met on the way.

    Attributes:
        value: sum phi_i.                 gradient: sum d phi_i / d theta, (K, q).
        gradient_scale: sum |d phi_i|.    hessian: sum of D2 phi_i, or None where not asked for.
        counts: how many samples met which case, converged or not.
    """

    value: Tensor
    gradient: Tensor
    gradient_scale: Tensor
    hessian: BlockSymmetric | None
    count: int
    counts: Counter[str]

    @classmethod
    def zeros(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *, hessian: bool) -> Sums:
        zero = torch.zeros((), dtype=dtype, device=device)
        block = BlockSymmetric.zeros(shape[0], shape[1], dtype, device) if hessian else None
        return cls(zero.clone(), torch.zeros(shape, dtype=dtype, device=device), zero.clone(), block, 0, Counter())


def add_gradient(sums: Sums, local: LocalPoint, weight: Tensor | None, extra_value: Tensor | None = None) -> None:
    """Add the first-order terms of these samples (``extra_value``: rho of the inner objective)."""
    loss, r = local.terms.loss, local.terms.r
    if extra_value is not None:
        loss = loss + extra_value.to(loss)
    phi = local.problem.augment(local.phi)
    norms = r.norm(dim=1) * phi.norm(dim=1)
    if weight is not None:
        loss, r, norms = loss * weight, r * weight[:, None], norms * weight
    sums.value += loss.sum()
    sums.gradient += r.T @ phi
    sums.gradient_scale += norms.sum()
    sums.count += len(r)


def add_hessian(
    sums: Sums, local: LocalPoint, response: Response, curvature: Curvature, weight: Tensor | None = None
) -> None:
    """Add the total Hessians of these samples, in chunks whose temporaries stay below the workspace."""
    n, (k, q) = len(local.x), local.problem.shape
    per_sample = 4 * (q + k * k)
    if response.forms_squares:
        per_sample += max(local.problem.backbone.width**2 * 3, local.x.shape[1] * (2 * q + 2 * k)) + 4 * k * q
    step = max(1, _WORKSPACE // per_sample)
    for begin in range(0, n, step):
        at = slice(begin, begin + step)
        part = local if step >= n else local.take(at)
        _add_chunk(sums, part, response, curvature, None if weight is None else weight[at])


def _add_chunk(sums: Sums, local: LocalPoint, response: Response, curvature: Curvature, weight: Tensor | None) -> None:
    target = sums.hessian
    assert target is not None
    gram = response.gram(local, sums.counts)
    r, hess = local.terms.r, local.hess
    terms = HeadTerms(
        local.problem.augment(local.phi),
        r,
        hess,
        local.weight,
        torch.ones_like(r[:, 0]) if weight is None else weight.to(r),
        direct_core(curvature, r, hess),
    )
    if gram is None:
        add_direct(target.blocks, terms)
    else:
        gram.add(target.blocks, terms)
