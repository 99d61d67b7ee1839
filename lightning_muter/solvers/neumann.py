"""The published solver: a truncated Neumann series."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_muter.errors import ArgumentError
from lightning_muter.solvers.base import Border, Solution, Solver, finished


class Neumann(Solver):
    """delta = (1/s) sum_{j<T} (I - H/s)^j g, the truncated series; converges iff all eigenvalues of H lie in (0, 2s).

    Args:
        terms: T at most; it stops earlier at ``tolerance``.
        scale: s; "auto" takes 1.05 times the largest eigenvalue (power iteration), the published form is 1.
        accept_early: take the truncated sum at T terms though it has not converged (never if it grows).
    """

    name = "neumann"

    def __init__(
        self, terms: int = 10_000, scale: float | str = "auto", tolerance: float = 1e-8, accept_early: bool = False
    ) -> None:
        if terms < 1 or not (scale == "auto" or (isinstance(scale, (int, float)) and scale > 0)):
            raise ArgumentError("terms, scale", (terms, scale), "terms >= 1 and scale > 0 or 'auto'")
        self.terms, self.scale, self.tolerance, self.accept_early = terms, scale, tolerance, accept_early

    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution:
        scale = 1.05 * _largest_eigenvalue(matrix) if self.scale == "auto" else float(self.scale)
        value = torch.zeros_like(rhs)
        term = rhs / scale
        first = float(term.norm())
        status, steps = "capped", 0
        for _ in range(self.terms):
            value = value + term
            steps += 1
            term = term - (matrix @ term) / scale
            size = float(term.norm())
            if not math.isfinite(size) or size > 10 * first:
                status = "diverged"
                break
            if size <= self.tolerance * first:
                status = "converged"
                break
        found = finished(matrix, value, rhs, status, steps, 100 * self.tolerance)
        accepted = self.accept_early and found.status == "capped"
        return Solution(found.value, found.status, found.residual, steps, accepted=accepted)


def _largest_eigenvalue(matrix: Tensor, steps: int = 100) -> float:
    """By power iteration from a fixed start; the Frobenius norm bounds it from above if it has not settled."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(matrix), generator=generator, dtype=torch.float64).to(matrix)
    v, value = v / v.norm(), 0.0
    for _ in range(steps):
        image = matrix @ v
        new = float(image.norm())
        if new == 0:
            break
        v = image / new
        if abs(new - value) <= 1e-4 * new:
            return new
        value = new
    return float(matrix.norm())
