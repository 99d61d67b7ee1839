"""Conjugate gradients: one loop, for dense systems and for systems known by their products.

The latter stop when the model that they minimise has stopped falling,

    q(d) = 1/2 d^T H d - g^T d,        Martens (2010): once  (q_k - q_{k-m}) / q_k < m * flatness,  m = max(window, k/10)

Stopping early is more than thrift: the steps left out go along directions of little curvature, where the model holds least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.errors import ArgumentError
from lightning_muter.solvers.base import Border, Product, Solution, Solver, finished


@dataclass
class _Descent:
    """Where the loop stands: H value ~ rhs with ``residual`` left, and the model q after every step."""

    value: Tensor
    residual: Tensor
    direction: Tensor
    model: list[float]
    relative: float
    status: str = "capped"

    @property
    def steps(self) -> int:
        return len(self.model) - 1


def _descend(
    product: Product,
    rhs: Tensor,
    precondition: Product,
    max_iter: int,
    tolerance: float,
    flat: Callable[[list[float]], bool] = lambda model: False,
    on_step: Callable[[int, float], None] | None = None,
) -> _Descent:
    """Until |H d - g| <= tolerance |g| ("converged"), the model is ``flat``, p^T H p <= 0 ("negative curvature") or ``max_iter``."""
    size = float(rhs.norm())
    z = precondition(rhs)
    now = _Descent(torch.zeros_like(rhs), rhs.clone(), z.clone(), [0.0], 1.0)
    if size == 0:
        now.status, now.relative = "converged", 0.0
        return now
    rz = float(rhs @ z)
    for step in range(1, max_iter + 1):
        image = product(now.direction)
        curvature = float(now.direction @ image)
        if not math.isfinite(curvature) or curvature <= 0:
            now.status = "negative curvature" if curvature <= 0 and math.isfinite(curvature) else "not finite"
            return now
        alpha = rz / curvature
        now.value = now.value + alpha * now.direction
        now.residual = now.residual - alpha * image
        now.model.append(-0.5 * float(now.value @ (rhs + now.residual)))
        now.relative = float(now.residual.norm()) / size
        if on_step is not None:
            on_step(step, now.relative)
        if now.relative <= tolerance or flat(now.model):
            now.status = "converged" if now.relative <= tolerance else "flat"
            return now
        z = precondition(now.residual)
        rz, old = float(now.residual @ z), rz
        now.direction = z + (rz / old) * now.direction
    return now


class CG(Solver):
    """Conjugate gradients with a Jacobi preconditioner.

    Stops with "negative curvature" at the first direction with p^T H p <= 0 and with "capped" at ``max_iter``.

    Args:
        tolerance: on |H delta - g| / |g|.
        accept_early: take the iterate of a capped or negative-curvature stop (the published method runs 10-20 steps).
    """

    name = "cg"

    def __init__(self, max_iter: int = 1000, tolerance: float = 1e-10, accept_early: bool = False) -> None:
        if max_iter < 1 or not 0 < tolerance < 1:
            raise ArgumentError("max_iter, tolerance", (max_iter, tolerance), "max_iter >= 1 and 0 < tolerance < 1")
        self.max_iter, self.tolerance, self.accept_early = max_iter, tolerance, accept_early

    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution:
        scale = matrix.diagonal().clone()
        scale[scale <= 0] = 1.0
        run = _descend(lambda v: matrix @ v, rhs, lambda v: v / scale, self.max_iter, self.tolerance)
        found = finished(matrix, run.value, rhs, run.status, run.steps, 100 * self.tolerance)
        early = self.accept_early and run.steps > 0 and found.status in ("capped", "negative curvature")
        return Solution(found.value, found.status, found.residual, run.steps, accepted=early)


@dataclass(frozen=True)
class TruncatedCG:
    """Stops at ``tolerance`` ("converged"), where the model is flat ("flat"), at ``max_iter`` ("capped"), or at
    negative curvature (the iterate so far, a descent direction; the gradient itself at the first step).

    Args:
        max_iter: products at most.        tolerance: on |H d - g| / |g|.
        flatness: relative fall of the model per step below which going on is not worth it; 0 never stops.
        window: steps over which the fall is averaged.
    """

    max_iter: int = 50
    tolerance: float = 1e-6
    flatness: float = 0.03
    window: int = 3

    def __post_init__(self) -> None:
        if self.max_iter < 1 or not 0 < self.tolerance < 1 or not 0 <= self.flatness < 1 or self.window < 1:
            raise ArgumentError(
                "cg",
                self,
                "max_iter >= 1, 0 < tolerance < 1, 0 <= flatness < 1 and window >= 1",
                "The defaults suit networks.",
            )

    def solve(
        self,
        product: Product,
        rhs: Tensor,
        precondition: Product | None = None,
        on_step: Callable[[int, float], None] | None = None,
    ) -> tuple[Solution, float]:
        """d with H d ~ g, and the fall -q(d) > 0 that the model predicts."""
        run = _descend(product, rhs, precondition or torch.clone, self.max_iter, self.tolerance, self._flat, on_step)
        value = run.direction if run.status == "negative curvature" and not run.steps else run.value
        accepted = run.status in ("flat", "capped")
        return Solution(value, run.status, run.relative, run.steps, accepted=accepted), -run.model[-1]

    def _flat(self, model: list[float]) -> bool:
        back = max(self.window, (len(model) - 1) // 10)
        return len(model) - 1 > back and (model[-1] - model[-1 - back]) / model[-1] < back * self.flatness
