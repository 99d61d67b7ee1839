"""Direct part of the Hessian: second derivatives of the loss in the weights at fixed inputs.

hessian, ggn    Lambda_i (x) phi_i phi_i^T         (the head is linear: Gauss-Newton is exact; "ggn" cuts negative curvature)
fisher          r_i r_i^T (x) phi_i phi_i^T        (empirical Fisher)
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_muter.errors import ArgumentError
from lightning_muter.solvers.eigen import symmetric_eigh

Curvature = Literal["hessian", "ggn", "fisher"]


def direct_core(curvature: Curvature, r: Tensor, hess: Tensor) -> Tensor:
    """The (n, K, K) factor that stands before phi phi^T."""
    if curvature == "hessian":
        return hess
    if curvature == "ggn":
        values, vectors = symmetric_eigh(hess)
        return (vectors * values.clamp(min=0.0)[:, None, :]) @ vectors.mT
    if curvature == "fisher":
        return r[:, :, None] * r[:, None, :]
    raise ArgumentError("curvature", curvature, "'hessian', 'ggn' or 'fisher'", "Use 'hessian'.")
