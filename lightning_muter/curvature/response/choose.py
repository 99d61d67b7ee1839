"""Responses of the inner maximiser: K = d(delta*)/d(dl/dx), so that d(delta*)/dw = K d2l/dxdw.

A head's total Hessian needs K only through the head's input: G = J K J^T (f, f), J = d phi/dx. Every response gives a
*Gram* of the samples at hand, `None` where delta* does not move.

`none`          K = 0
`unconstrained` K = -(d2l/dx2)^-1 by the truncated series sum_{j<T} (I - d2l/dx2)^j (Liu et al., MUter, ICCV 2023)
`l2`            ball and box: K = (P (mu I - d2l/dx2) P)^+, P onto the free coordinates and, where the ball binds, across delta
`linf`          K = (C_FF - d2l/dx2_FF)^-1 on the coordinates F inside their range, C of `curvature.inner`; where the input
                curvature is diagonal this is  K_jj = width_j kappa(s_j),  kappa the box kernel of the switch s_j
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from copy import copy
from typing import ClassVar

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.problem.head import Backbone
from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.operators import LowRankMotion, Motion, SeriesMotion, SpectralMotion
from lightning_muter.curvature.response.pullback import DenseGram, Gram, HeadGram
from lightning_muter.curvature.response.sketch import choose_directions, rademacher
from lightning_muter.errors import ArgumentError
from lightning_muter.extension import Extensible
from lightning_muter.solvers.eigen import symmetric_eigenvalues, symmetric_eigh


class Response(Extensible, ABC):
    """How the maximisers move with the weights. ``counts`` collects what happened.

    Extend by subclassing, with a ``name`` of its own and every argument of its constructor kept as an attribute: snapshots store
    both, and whoever loads one imports the module of the subclass first.
    """

    @property
    def forms_squares(self) -> bool:
        """Whether :meth:`gram` holds a matrix of the size of features x features (or inputs) for every sample."""
        return True

    @abstractmethod
    def gram(self, local: LocalPoint, counts: Counter[str]) -> Gram | None:
        """The Gram of these samples, `None` if no maximiser moves."""

    @abstractmethod
    def motion(self, local: LocalPoint, counts: Counter[str]) -> Motion | None:
        """K itself, as an operator on inputs: what scopes beyond the head need."""

    def resolved(self, backbone: Backbone, count: int) -> Response:
        """With every choice made that depends on the number of samples: what is stored with their sums."""
        return self

    #: Input gradients are asked for.
    uses_gradient: ClassVar[bool] = False
    #: The norm whose constraint it knows; None: it knows of none.
    norm: ClassVar[str | None] = None


class NoResponse(Response):
    """K = 0: the direct Hessian alone (ordinary second-order unlearning)."""

    name = "none"

    @property
    def forms_squares(self) -> bool:
        return False

    def gram(self, local: LocalPoint, counts: Counter[str]) -> Gram | None:
        return None

    def motion(self, local: LocalPoint, counts: Counter[str]) -> Motion | None:
        return None


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


#: Size of the input curvature, over that of the ball's, up to which a sketch takes it to first order.
_FIRST_ORDER = 0.3

#: Key of the sketches' random signs; part of the definition of a stored sum.
_SKETCH_KEY = 0x4D55


class _Boundary(Response):
    """What the constraint-aware responses share: K = (Pi (A - d2l/dx2) Pi)^+, A diagonal, Pi onto the free directions.

    Piecewise-linear backbones: d2l/dx2 = R R^T with R (D, K), hence with T = Pi A^-1/2 R and T^T T = V diag(b) V^T

        K = A^-1/2 (Pi + T (I - T^T T)^-1 T^T) A^-1/2,       defined iff all b < 1 (a strict maximum)

    Smooth backbones: the dense input Hessian up to ``max_exact`` inputs, beyond it the same formula (Gauss-Newton).
    Where the maximum is not strict, the eigenvalue is lifted to ``damping`` (relative) and the sample counted.

    ``sketch``: G = J K J^T from that many random input directions per sample, unbiased, with an error that falls with
    (samples x directions); 0: exactly, from J; None: as :func:`choose_directions` finds for the number of samples.
    """

    def __init__(self, damping: float = 0.05, max_exact: int = 1024, sketch: int | None = None) -> None:
        if not 0 < damping < 1:
            raise ArgumentError("damping", damping, "a number between 0 and 1", "0.05 is the default.")
        if not (sketch is None or (isinstance(sketch, int) and sketch >= 0)):
            raise ArgumentError("sketch", sketch, "None, 0 or a number of directions", "None takes the cheaper way.")
        self.damping, self.max_exact, self.sketch = damping, max_exact, sketch

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
        scaled = local.root * inv[:, :, None]
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
    u_j = J Pi A^-1/2 omega_j alone:  (1/m) sum_j u_j u_j^T + 1/(m (m - 1)) sum_{j != l} u_j (u_j^T X u_l) u_l^T."""
    m = omega.shape[2]
    directions = omega.to(a)
    if normal is not None:
        directions = directions - normal[:, :, None] * (normal[:, None, :] @ directions)
    columns = local.problem.backbone.pushforward(local.at, directions * _inverse_root(mask, a)[:, :, None])
    logits = local.weight @ columns
    inner = logits.mT @ local.hess @ logits / (m * (m - 1))
    inner.diagonal(dim1=1, dim2=2).fill_(1 / m)
    return columns @ inner @ columns.mT


class L2Response(_Boundary):
    """Response on an L2 ball cut by the input box, the four cases of the boundary: ball binds, ball slack, vertex, interior.

    mu = |g_F| / |delta_F| on the free coordinates F; a coordinate is on a face iff it is at a bound of the box and the force
    g_j - mu delta_j points outward.
    """

    name = norm = "l2"
    uses_gradient = True

    def small_curvature(self, local: LocalPoint, a: Tensor) -> Tensor:
        """The eigenvalues b of d2l/dx2 / mu, root mean square, as if J were a multiple of an isometry: its scale is the one by
        which it takes W^T r to the input gradient. Second order in b is left out where that is small."""
        if local.c is not None:
            return super().small_curvature(local, a)
        square = local.weight @ local.weight.T
        heights = (local.terms.r * (local.terms.r @ square)).sum(1)
        stretched = local.hess @ square
        size = (stretched * stretched.mT).sum((1, 2)).clamp(min=0.0).sqrt()
        steep = local.input_gradient.square().sum(1)
        return size * steep <= _FIRST_ORDER * heights * a[:, 0]

    def free(self, local: LocalPoint, counts: Counter[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        threat, delta, g = local.threat, local.delta.to(local.phi), local.input_gradient
        tol = 1e-7 if local.delta.dtype == torch.float64 else 1e-4
        mask = torch.ones_like(delta, dtype=torch.bool)
        if threat.box is not None:
            lo, hi = threat.box[0] - local.x.to(delta), threat.box[1] - local.x.to(delta)
            edge = tol * threat.eps
            at_lo, at_hi = delta <= lo + edge, delta >= hi - edge
            inside = ~(at_lo | at_hi)
            mu = _ratio((g * inside).norm(dim=1), (delta * inside).norm(dim=1))[:, None]
            force = g - mu * delta
            weak = 1e-9 * g.abs().amax(1, keepdim=True)
            mask = inside | (at_lo & (force >= -weak)) | (at_hi & (force <= weak))
            counts["on faces"] += int((~mask).any(1).sum())
            counts["weakly active"] += int(((mask & ~inside) & (g != 0)).any(1).sum())
        dm, gm = delta * mask, g * mask
        binds = delta.norm(dim=1) >= threat.eps * (1 - tol)
        mu = torch.where(binds, _ratio(gm.norm(dim=1), dm.norm(dim=1)), torch.zeros_like(binds, dtype=g.dtype))
        # flat: no force on the free coordinates and no ball to hold them; the maximiser is not determined
        flat = (mu <= 0) & local.problem.backbone.piecewise_linear
        counts["vertex"] += int((~mask.any(1)).sum())
        counts["ball slack"] += int((~binds & mask.any(1)).sum())
        counts["flat"] += int((flat & mask.any(1)).sum())
        mask = mask & ~flat[:, None]
        normal = torch.where(binds[:, None] & mask, dm, torch.zeros_like(dm))
        normal = normal / normal.norm(dim=1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
        a = mu[:, None].expand_as(g)
        return mask, a if local.c is None else a + local.c, normal


class LinfResponse(_Boundary):
    """Response inside an L-infinity ball and box: the coordinates strictly inside their range, with the curvature of rho."""

    name = norm = "linf"

    def free(self, local: LocalPoint, counts: Counter[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        delta = local.delta.to(local.phi)
        lo, hi = local.threat.bounds(local.x.to(delta))
        edge = (1e-9 if local.delta.dtype == torch.float64 else 1e-5) * local.threat.eps
        mask = (delta > lo + edge) & (delta < hi - edge)
        a = torch.zeros_like(delta) if local.c is None else local.c.to(delta)
        if local.problem.backbone.piecewise_linear:
            mask = mask & (a > 0)
        counts["vertex"] += int((~mask.any(1)).sum())
        counts["switching coordinates"] += int(mask.sum())
        return mask, a, None


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom > 0, top / bottom.clamp(min=torch.finfo(top.dtype).tiny), torch.zeros_like(top))


def as_response(response: str | Response, threat: ThreatModel) -> Response:
    """The response a name stands for; "auto" is the constraint-aware one of the threat model.

    Raises:
        ArgumentError: unknown name, or one of another norm than the threat model's.
    """
    chosen: Response
    if isinstance(response, Response):
        chosen = response
    else:
        chosen = Response.named(threat.ball.response if response == "auto" else response)()
    if chosen.norm not in (None, threat.norm):
        raise ArgumentError(
            "response", chosen.name, f"'{threat.norm}' for this threat model", "Use 'auto', or change the threat model."
        )
    return NoResponse() if threat.eps == 0 and chosen.norm is not None else chosen
