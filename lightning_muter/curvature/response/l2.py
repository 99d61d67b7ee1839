"""The response on an L2 ball."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.boundary import FIRST_ORDER, Boundary


class L2Response(Boundary):
    """Response on an L2 ball cut by the input box, the four cases of the boundary: ball binds, ball slack, vertex, interior.

    mu = |g_F| / |delta_F| on the free coordinates F; a coordinate is on a face iff it is at a bound of the box and the force
    g_j - mu delta_j points outward.
    """

    name = norm = "l2"
    uses_gradient = True

    def small_curvature(self, local: LocalPoint, a: Tensor) -> Tensor:
        """The eigenvalues b of d2l/dx2 / mu, root mean square, as if J were a multiple of an isometry: its scale is the one by
        which it takes W^T r to the input gradient. Second order in b is left out where that is small.
        """
        if local.c is not None:
            return super().small_curvature(local, a)
        square = local.weight @ local.weight.T
        heights = (local.terms.r * (local.terms.r @ square)).sum(1)
        stretched = local.hess @ square
        size = (stretched * stretched.mT).sum((1, 2)).clamp(min=0.0).sqrt()
        steep = local.input_gradient.square().sum(1)
        return size * steep <= FIRST_ORDER * heights * a[:, 0]

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


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom > 0, top / bottom.clamp(min=torch.finfo(top.dtype).tiny), torch.zeros_like(top))
