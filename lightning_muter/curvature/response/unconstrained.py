"""The published response: as if nothing constrained the maximiser."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.base import Response
from lightning_muter.curvature.response.operators import Motion, SeriesMotion
from lightning_muter.curvature.response.pullback import DenseGram, Gram, HeadGram
from lightning_muter.errors import ArgumentError
from lightning_muter.solvers.eigen import symmetric_eigenvalues, symmetric_eigh


class Unconstrained(Response):
    """The published response, K = -(d2l/dx2)^-1 by T terms of its Neumann series; T = 3 for linear models, 100 for heads.

    Its premise, dl/dx = 0 at the maximiser, fails on the boundary of the norm ball. In features
    d2l/dphi2 = W^T Lambda W is rank-deficient, and the series gives T on its null space:

        sum_{j<T} (I - W^T Lambda W)^j = T I + W^T Gamma_T W,   Gamma_1 = 0,  Gamma_{t+1} = Gamma_t - t Lambda - Lambda W W^T Gamma_t

    Args:
        terms: T, at least 1.
        space: "features" (the paper's choice for heads) or "inputs".
    """

    name = "unconstrained"

    def __init__(self, terms: int = 3, space: str = "features") -> None:
        if not (isinstance(terms, int) and terms >= 1):
            raise ArgumentError(
                "terms", terms, "a whole number from 1", "The paper uses 3 (linear models) and 100 (heads)."
            )
        if space not in ("features", "inputs"):
            raise ArgumentError("space", space, "'features' or 'inputs'")
        self.terms, self.space = terms, space

    @property
    def forms_squares(self) -> bool:
        return self.space == "inputs"

    def gram(self, local: LocalPoint, counts: Counter[str]) -> Gram | None:
        weight, hess = local.weight, local.hess
        if self.space == "inputs" and not local.problem.backbone.identity:
            jacobian = local.problem.backbone.jacobian(local.at)
            through = weight @ jacobian  # (n, K, D)
            core = self._core(hess, through @ through.mT)
            square = jacobian @ jacobian.mT
            return DenseGram(-(self.terms * square + square @ weight.T @ core @ weight @ square))
        core = self._core(hess, (weight @ weight.T).expand_as(hess))
        _count_series(hess, weight, counts)
        return HeadGram(-float(self.terms), weight, -core)

    def motion(self, local: LocalPoint, counts: Counter[str]) -> Motion | None:
        if self.space == "features":
            raise ArgumentError(
                "response", self, "a response in inputs beyond the head", "Use Unconstrained(terms, space='inputs')."
            )
        return SeriesMotion(local.root, self.terms)

    def _core(self, hess: Tensor, square: Tensor) -> Tensor:
        core = torch.zeros_like(hess)
        for t in range(1, self.terms):
            core = core - t * hess - hess @ square @ core
        return (core + core.mT) / 2


def _count_series(hess: Tensor, weight: Tensor, counts: Counter[str]) -> None:
    values, vectors = symmetric_eigh(hess)
    root = vectors * values.clamp(min=0.0).sqrt()[:, None, :]
    inner = root.mT @ (weight @ weight.T) @ root
    counts["series diverges"] += int((symmetric_eigenvalues(inner)[:, -1] > 2).sum())
    counts["rank-deficient"] += len(hess) if weight.shape[1] >= weight.shape[0] else 0
