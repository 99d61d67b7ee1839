"""Sums of per-sample total Hessians of a head, in packed symmetric blocks.

With u(v) = d2l/dwdx v = r a^T + (Lambda W a) phi^T, a = J v (rows: logits; the bias row of a is 0), the indirect part
u K u^T of one sample has for the logits k, l the block

    r_k r_l G + r_k E_l phi^T + phi (r_l E_k)^T + (E^T W^T Lambda)_kl phi phi^T,        G = J K J^T,  E = G W^T Lambda

so that the whole sum is a few weighted matrix products. No per-sample matrix of the size of the parameters is ever formed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.curvature.direct import Curvature, direct_core
from lightning_muter.curvature.response import LocalPoint, Response

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
        for p, (k, m) in enumerate(self.pairs.T.tolist()):
            out[k, :, m, :] = self.blocks[p]
            out[m, :, k, :] = self.blocks[p].T
        return out.reshape(self.size, self.size)

    def add_outer(self, shares: Tensor, vectors: Tensor, scale: Tensor) -> None:
        """Add sum_i scale_i sum_j shares_ij (v_ij - v_i)(v_ij - v_i)^T, v_i = sum_j shares_ij v_ij; vectors (c, J, K q)."""
        spread = vectors - (shares[:, :, None] * vectors).sum(1, keepdim=True)
        rows = (spread * (shares * scale[:, None]).sqrt()[:, :, None]).reshape(-1, self.n_logits, self.width)
        for p, (k, m) in enumerate(self.pairs.T.tolist()):
            self.blocks[p] += rows[:, k].T @ rows[:, m]

    def minus(self, other: BlockSymmetric) -> BlockSymmetric:
        return BlockSymmetric(self.n_logits, self.width, self.blocks - other.blocks)

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
    per_sample = 8 * k * q  # W^T Lambda, E and copies of them
    if response.forms_squares:
        per_sample = max(per_sample, local.problem.backbone.width**2 * 3, local.x.shape[1] * (q + 2 * k))
    step = max(1, _WORKSPACE // per_sample)
    for begin in range(0, n, step):
        at = slice(begin, begin + step)
        part = LocalPoint(
            local.problem,
            local.theta,
            local.threat,
            local.x[at],
            local.y[at],
            local.delta[at],
            None if local.c is None else local.c[at],
            None if local.positions is None else local.positions[at],
        )
        _add_chunk(sums, part, response, curvature, None if weight is None else weight[at])


def _add_chunk(sums: Sums, local: LocalPoint, response: Response, curvature: Curvature, weight: Tensor | None) -> None:
    target = sums.hessian
    assert target is not None
    problem, r, hess = local.problem, local.terms.r, local.hess
    scale = torch.ones(len(r), dtype=r.dtype, device=r.device) if weight is None else weight.to(r)
    phi = problem.augment(local.phi)
    left, right = target.pairs
    core = direct_core(curvature, r, hess)
    gram = response.gram(local, sums.counts)
    f = problem.backbone.width
    if gram is not None:
        through = local.weight.T @ hess  # W^T Lambda, (n, f, K)
        moved = gram.times(through)  # E
        core = core + hess @ local.weight @ moved
        core = (core + core.mT) / 2
        # a few blocks at a time: temporaries stay small beside the matrix
        step = max(1, min(problem.n_logits, _WORKSPACE // (8 * f * f)))
        for at in range(0, len(left), step):
            some = slice(at, at + step)
            target.blocks[some, :f, :f] += gram.outer_sum(scale[:, None] * r[:, left[some]] * r[:, right[some]])
        n, k = r.shape
        flat = moved.mT.reshape(n, -1)
        firsts, seconds = left.tolist(), right.tolist()
        for row in range(k):
            cross = ((phi * (scale * r[:, row])[:, None]).T @ flat).reshape(-1, k, f)  # r_row phi E_l^T for all l
            for p, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
                if first == row:
                    target.blocks[p, :f, :] += cross[:, second].T
                if second == row:
                    target.blocks[p, :, :f] += cross[:, first]
    packed = scale[:, None] * core[:, left, right]
    for p in range(packed.shape[1]):
        target.blocks[p] += (phi * packed[:, p, None]).T @ phi
