"""K = d(delta*)/d(dl/dx) of a batch as an operator: how far the maximisers move when the input gradient changes.

`LowRankMotion`    K = S (I + B B^T - n n^T) S,     S diagonal (0 off the free coordinates), n the normal of the ball
`SpectralMotion`   K = V diag(values) V^T
`SeriesMotion`     K = -sum_{j<T} (I - R R^T)^j     (the published series)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.curvature.problem.backbone import Backbone


class Motion(ABC):
    """K (n, D, D), symmetric, never formed."""

    @abstractmethod
    def times(self, v: Tensor) -> Tensor:
        """K_i v_i: (n, D) -> (n, D)."""

    @abstractmethod
    def conjugated(self, jacobian: Tensor | None) -> Tensor:
        """J K J^T (n, f, f) for J (n, f, D), the identity where it is None."""

    @property
    @abstractmethod
    def numbers(self) -> int:
        """How many numbers it holds (to decide whether to keep it)."""


@dataclass
class LowRankMotion(Motion):
    """S (n, D), B (n, D, m), n (n, D) or None."""

    scale: Tensor
    side: Tensor
    normal: Tensor | None

    def times(self, v: Tensor) -> Tensor:
        y = self.scale * v
        out = y + (self.side @ (self.side.mT @ y[:, :, None]))[:, :, 0]
        if self.normal is not None:
            out = out - self.normal * (self.normal * y).sum(1, keepdim=True)
        return self.scale * out

    def conjugated(self, jacobian: Tensor | None) -> Tensor:
        if jacobian is None:
            gram = torch.diag_embed(self.scale.square())
            left = self.side * self.scale[:, :, None]
            minus = None if self.normal is None else self.normal * self.scale
        else:
            scaled = jacobian * self.scale[:, None, :]
            gram = scaled @ scaled.mT
            left = scaled @ self.side
            minus = None if self.normal is None else (scaled @ self.normal[:, :, None])[:, :, 0]
        gram = torch.baddbmm(gram, left, left.mT)
        return gram if minus is None else gram - minus[:, :, None] * minus[:, None, :]

    def sketched(self, backbone: Backbone, at: Tensor, omega: Tensor) -> Tensor:
        """Columns A = J C omega / sqrt(m), (n, f, m), with E[A A^T] = G for Rademacher omega (n, D, m); C C^T = K,

        C = S (I - n n^T + B diag(1 / (1 + sqrt(1 + |B_j|^2))) B^T),    the columns of B being orthogonal to one another and to n.
        """
        omega = omega / omega.shape[2] ** 0.5
        if self.normal is not None:
            omega = omega - self.normal[:, :, None] * (self.normal[:, None, :] @ omega)
        share = 1 / (1 + (1 + self.side.square().sum(1)).sqrt())
        omega = omega + self.side @ (share[:, :, None] * (self.side.mT @ omega))
        return backbone.pushforward(at, omega * self.scale[:, :, None])

    @property
    def numbers(self) -> int:
        return self.scale.numel() * 2 + self.side.numel()


@dataclass
class SpectralMotion(Motion):
    """V (n, D, D), values (n, D)."""

    vectors: Tensor
    values: Tensor

    def times(self, v: Tensor) -> Tensor:
        inner = (self.vectors.mT @ v[:, :, None]) * self.values[:, :, None]
        return (self.vectors @ inner)[:, :, 0]

    def conjugated(self, jacobian: Tensor | None) -> Tensor:
        half = self.vectors if jacobian is None else jacobian @ self.vectors
        return (half * self.values[:, None, :]) @ half.mT

    @property
    def numbers(self) -> int:
        return self.vectors.numel() + self.values.numel()


@dataclass
class SeriesMotion(Motion):
    """R (n, D, m) with d2l/dx2 = R R^T; T terms."""

    root: Tensor
    terms: int

    def times(self, v: Tensor) -> Tensor:
        term, total = v, v
        for _ in range(1, self.terms):
            term = term - (self.root @ (self.root.mT @ term[:, :, None]))[:, :, 0]
            total = total + term
        return -total

    def conjugated(self, jacobian: Tensor | None) -> Tensor:
        if jacobian is None:
            eye = torch.eye(self.root.shape[1], dtype=self.root.dtype, device=self.root.device)
            jacobian = eye.expand(len(self.root), -1, -1)
        columns = [self.times(row) for row in jacobian.unbind(1)]
        return torch.stack(columns, 1) @ jacobian.mT

    @property
    def numbers(self) -> int:
        return self.root.numel()
