"""The response in an L-infinity ball."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.boundary import Boundary


class LinfResponse(Boundary):
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
