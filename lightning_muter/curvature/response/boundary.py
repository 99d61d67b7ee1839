"""What responses on the boundary of a ball share, whatever its norm."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from copy import copy

import torch
from torch import Tensor

from lightning_muter.curvature.problem.backbone import Backbone
from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.base import Response
from lightning_muter.curvature.response.operators import LowRankMotion, Motion, SpectralMotion
from lightning_muter.curvature.response.pullback import DenseGram, Gram
from lightning_muter.curvature.response.sketch import choose_directions, rademacher
from lightning_muter.errors import ArgumentError
from lightning_muter.solvers.eigen import symmetric_eigh

#: Size of the input curvature, over that of the ball's, up to which a sketch takes it to first order.
FIRST_ORDER = 0.3

#: Key of the sketches' random signs; part of the definition of a stored sum.
_SKETCH_KEY = 0x4D55


class Boundary(Response):
    """What the constraint-aware responses share: K = (Pi (A - d2l/dx2) Pi)^+, A diagonal, Pi onto the free directions.

    Piecewise-linear backbones: d2l/dx2 = R R^T with R (D, K), hence with T = Pi A^-1/2 R and T^T T = V diag(b) V^T

        K = A^-1/2 (Pi + T (I - T^T T)^-1 T^T) A^-1/2,       defined iff all b < 1 (a strict maximum)

    Smooth backbones: the dense input Hessian up to ``max_exact`` inputs, beyond it the same formula (Gauss-Newton).
    Where the maximum is not strict, the eigenvalue is lifted to ``damping`` (relative) and the sample counted.

    ``sketch``: G = J K J^T from that many random input directions per sample, unbiased, with an error that falls with
    (samples x directions); 0: exactly, from J; None: as :func:`choose_directions` finds for the number of samples.
    ``directions``: R from so many directions of the logits' curvature, the leading ones; None: from all.
    """

    def __init__(
        self,
        damping: float = 0.05,
        max_exact: int = 1024,
        sketch: int | None = None,
        directions: int | None = None,
    ) -> None:
        if not 0 < damping < 1:
            raise ArgumentError("damping", damping, "a number between 0 and 1", "0.05 is the default.")
        if not (sketch is None or (isinstance(sketch, int) and sketch >= 0)):
            raise ArgumentError("sketch", sketch, "None, 0 or a number of directions", "None takes the cheaper way.")
        if not (directions is None or (isinstance(directions, int) and directions > 0)):
            raise ArgumentError("directions", directions, "None or a number above 0", "None takes all of them.")
        self.damping, self.max_exact, self.sketch, self.directions = damping, max_exact, sketch, directions

    @abstractmethod
    def free(self, local: LocalPoint, counts: Counter[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Free coordinates (n, D) bool, A (n, D), unit normal of the binding ball on them (n, D) or None."""

    def resolved(self, backbone: Backbone, count: int) -> Response:
        if self.sketch is not None:
            return self
        fixed = copy(self)
        fixed.sketch = choose_directions(None, backbone, count)
        return fixed

    def gram(self, local: LocalPoint, counts: Counter[str]) -> Gram | None:
        backbone = local.problem.backbone
        directions = choose_directions(self.sketch, backbone)
        if directions and local.positions is not None and self._gauss_newton(local):
            return self._sketched(local, directions, counts)
        jacobian = None if backbone.identity else local.jacobian
        motion = self.motion(local, counts)
        return None if motion is None else DenseGram(motion.conjugated(jacobian))

    def _gauss_newton(self, local: LocalPoint) -> bool:
        backbone = local.problem.backbone
        return backbone.piecewise_linear or not backbone.curved or local.x.shape[1] > self.max_exact

    def _sketched(self, local: LocalPoint, directions: int, counts: Counter[str]) -> Gram | None:
        """G from random directions: to first order in the input curvature where that will do, else around its root."""
        assert local.positions is not None
        mask, a, normal = self.free(local, counts)
        if not bool(mask.any()):
            return None
        n, width = local.x.shape
        counts["sketched"] += n
        omega = rademacher(_SKETCH_KEY, local.positions.to(a.device), width * directions).reshape(n, width, directions)
        small = self.small_curvature(local, a) if directions > 1 else torch.zeros_like(mask[:, 0])
        counts["first order in the input curvature"] += int(small.sum())
        if bool(small.all()):
            return DenseGram(first_order(local, mask, a, normal, omega))
        f = local.problem.backbone.width
        value = a.new_empty(n, f, f)
        for rows, first in ((small.nonzero()[:, 0], True), ((~small).nonzero()[:, 0], False)):
            if not len(rows):
                continue
            part, at, towards = local.take(rows), (mask[rows], a[rows]), None if normal is None else normal[rows]
            if first:
                value[rows] = first_order(part, *at, towards, omega[rows])
                continue
            if not part.problem.backbone.piecewise_linear:
                counts["Gauss-Newton input curvature"] += len(rows)
            motion = self._low_rank(part, *at, towards, counts)
            columns = motion.sketched(part.problem.backbone, part.at, omega[rows].to(a))
            value[rows] = columns @ columns.mT
        return DenseGram(value)

    def small_curvature(self, local: LocalPoint, a: Tensor) -> Tensor:
        """The samples (n,) whose d2l/dx2 is known, without passes, to be small beside A."""
        return torch.zeros(len(a), dtype=torch.bool, device=a.device)

    def motion(self, local: LocalPoint, counts: Counter[str]) -> Motion | None:
        mask, a, normal = self.free(local, counts)
        if not bool(mask.any()):
            return None
        if self._gauss_newton(local):
            if not local.problem.backbone.piecewise_linear:
                counts["Gauss-Newton input curvature"] += len(mask)
            return self._low_rank(local, mask, a, normal, counts)
        return self._spectral(local, mask, a, normal, counts)

    def _low_rank(
        self, local: LocalPoint, mask: Tensor, a: Tensor, normal: Tensor | None, counts: Counter[str]
    ) -> LowRankMotion:
        inv = _inverse_root(mask, a)
        scaled = local.leading_root(self.directions) * inv[:, :, None]
        if normal is not None:
            scaled = scaled - normal[:, :, None] * (normal[:, None, :] @ scaled)
        b, v = symmetric_eigh(scaled.mT @ scaled)
        counts["not a strict maximum"] += int((b[:, -1] >= 1).sum())
        counts["damped"] += int((b[:, -1] > 1 - self.damping).sum())
        gain = (1 - b).clamp(min=self.damping).reciprocal()
        return LowRankMotion(inv, (scaled @ v) * gain.sqrt()[:, None, :], normal)

    def _spectral(
        self, local: LocalPoint, mask: Tensor, a: Tensor, normal: Tensor | None, counts: Counter[str]
    ) -> SpectralMotion:
        projector = torch.diag_embed(mask.to(a))
        if normal is not None:
            projector = projector - normal[:, :, None] * normal[:, None, :]
        full = torch.diag_embed(a) - local.problem.input_hessian(local.theta, local.at, local.y)
        values, vectors = symmetric_eigh(projector @ full @ projector)
        inside = ((projector @ vectors) * vectors).sum(1) > 0.5
        scale = values.abs().amax(1, keepdim=True)
        floor = self.damping * torch.where(a.amax(1, keepdim=True) > 0, a.amax(1, keepdim=True), scale)
        # nothing pushes and nothing curves (a head at zero): the maximiser is not determined
        inside = inside & (torch.maximum(scale, floor) > torch.finfo(a.dtype).tiny)
        rounding = 1e-12 if local.delta.dtype == torch.float64 else 1e-6
        low = inside & (values < rounding * scale)
        counts["not a strict maximum"] += int(low.any(1).sum())
        values = torch.where(low, floor, values)
        inverse = torch.where(inside, values, torch.ones_like(values)).reciprocal() * inside
        return SpectralMotion(projector @ vectors, inverse)


def _inverse_root(mask: Tensor, a: Tensor) -> Tensor:
    return torch.where(mask & (a > 0), a.clamp(min=torch.finfo(a.dtype).tiny).rsqrt(), torch.zeros_like(a))


def first_order(local: LocalPoint, mask: Tensor, a: Tensor, normal: Tensor | None, omega: Tensor) -> Tensor:
    """G = G_0 + G_0 X G_0 + ..., X = W^T Lambda W and G_0 = J Pi A^-1 Pi J^T, to first order in X and without bias, from the columns
    u_j = J Pi A^-1/2 omega_j alone:  (1/m) sum_j u_j u_j^T + 1/(m (m - 1)) sum_{j != l} u_j (u_j^T X u_l) u_l^T.
    """
    m = omega.shape[2]
    directions = omega.to(a)
    if normal is not None:
        directions = directions - normal[:, :, None] * (normal[:, None, :] @ directions)
    columns = local.problem.backbone.pushforward(local.at, directions * _inverse_root(mask, a)[:, :, None])
    logits = local.weight @ columns
    inner = logits.mT @ local.hess @ logits / (m * (m - 1))
    inner.diagonal(dim1=1, dim2=2).fill_(1 / m)
    return columns @ inner @ columns.mT
