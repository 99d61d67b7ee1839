"""Conjugate gradients for systems known by their products, stopped when the model they minimise has stopped falling.

q(d) = 1/2 d^T H d - g^T d,        Martens (2010): stop once  (q_k - q_{k-m}) / q_k < m * flatness,  m = max(window, k/10)

Stopping early is more than thrift: the steps left out go along directions of little curvature, where the model holds least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.errors import ArgumentError
from lightning_muter.solvers.choose import Product, Solution


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
        precondition = precondition or (lambda v: v)
        value, residual = torch.zeros_like(rhs), rhs.clone()
        z = precondition(residual)
        direction, rz = z.clone(), float(residual @ z)
        size = float(rhs.norm())
        model = [0.0]
        status, steps = ("converged" if size == 0 else "capped"), 0
        while status == "capped" and steps < self.max_iter:
            image = product(direction)
            curvature = float(direction @ image)
            if not math.isfinite(curvature):
                status = "not finite"
                break
            if curvature <= 0:
                status = "negative curvature"
                if steps == 0:
                    value = direction
                break
            alpha = rz / curvature
            value = value + alpha * direction
            residual = residual - alpha * image
            steps += 1
            model.append(-0.5 * float(value @ (rhs + residual)))
            relative = float(residual.norm()) / size
            if on_step is not None:
                on_step(steps, relative)
            back = max(self.window, steps // 10)
            if relative <= self.tolerance:
                status = "converged"
            elif steps > back and (model[-1] - model[-1 - back]) / model[-1] < back * self.flatness:
                status = "flat"
            z = precondition(residual)
            rz, old = float(residual @ z), rz
            direction = z + (rz / old) * direction
        relative = float(residual.norm()) / size if size else 0.0
        return Solution(value, status, relative, steps, accepted=status in ("flat", "capped")), -model[-1]
