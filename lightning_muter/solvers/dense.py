"""Exact solutions of dense systems, and the inverse of a matrix as a metric."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_muter.errors import SolveError
from lightning_muter.solvers.base import Border, Product, Solution, Solver, finished

#: Residuals above this are never "converged" for a direct solve.
_DIRECT_RESIDUAL = 1e-6


class Cholesky(Solver):
    """Exact for positive definite H; anything else is "negative curvature".

    >>> Cholesky().solve(torch.diag(torch.tensor([2.0, 4.0])), torch.tensor([2.0, 2.0])).value
    tensor([1.0000, 0.5000])
    """

    name = "cholesky"

    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            status = "negative curvature" if bool(torch.isfinite(matrix).all()) else "not finite"
            return Solution(torch.zeros_like(rhs), status, 1.0, 0)
        value = torch.cholesky_solve(rhs[:, None], factor)[:, 0]
        limit = _DIRECT_RESIDUAL if rhs.dtype == torch.float64 else 1e-3
        return finished(matrix, value, rhs, "converged", 1, limit)


class LU(Solver):
    """The exact solution of any regular system. An indefinite one is a saddle of the objective: only on request.

    Args:
        accept_indefinite: give the answer all the same (for published formulas, measured as they are).
    """

    name = "lu"

    def __init__(self, accept_indefinite: bool = False) -> None:
        self.accept_indefinite = accept_indefinite

    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution:
        definite = int(torch.linalg.cholesky_ex(matrix).info) == 0
        if definite or self.accept_indefinite:
            value, info = torch.linalg.solve_ex(matrix, rhs)
            if int(info) == 0:
                found = finished(matrix, value, rhs, "converged", 1, _DIRECT_RESIDUAL)
                if found.status == "converged" and not definite:
                    return Solution(value, "negative curvature", found.residual, 1, accepted=True)
                return found
        return Solution(torch.zeros_like(rhs), "negative curvature", 1.0, 0)


class Schur(Solver):
    """The system bordered in the last forgotten sample, whose indirect part U diag(gamma) U^T stays outside the matrix:

        [ A     U            ] [delta]   [g]
        [ U^T   diag(1/gamma)] [alpha] = [0]         eliminating alpha gives (A - U diag(gamma) U^T) delta = g

    For the unconstrained response this is the published system (gamma^-1 = -eigenvalues of d2l/dx2).
    The eliminated matrix must be positive definite, else "negative curvature".

    Args:
        accept_indefinite: give the answer all the same (for the published formula, measured as it is).
    """

    name = "schur"
    bordered = True

    def __init__(self, accept_indefinite: bool = False) -> None:
        self.accept_indefinite = accept_indefinite

    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution:
        if border is None or border.u.shape[1] == 0:
            return LU(self.accept_indefinite).solve(matrix, rhs)
        p, m = border.u.shape
        full = matrix.new_zeros(p + m, p + m)
        full[:p, :p], full[:p, p:], full[p:, :p] = matrix, border.u, border.u.T
        full[p:, p:] = torch.diag(border.gamma.reciprocal())
        eliminated = matrix - (border.u * border.gamma) @ border.u.T
        definite = int(torch.linalg.cholesky_ex(eliminated).info) == 0
        if not definite and not self.accept_indefinite:
            return Solution(torch.zeros_like(rhs), "negative curvature", 1.0, 0)
        padded = torch.cat([rhs, rhs.new_zeros(m)])
        solved, info = torch.linalg.solve_ex(full, padded)
        if int(info) != 0:
            return Solution(torch.zeros_like(rhs), "inaccurate", 1.0, 0)
        found = finished(eliminated, solved[:p], rhs, "converged", 1, _DIRECT_RESIDUAL)
        if found.status == "converged" and not definite:
            return Solution(found.value, "negative curvature", found.residual, 1, accepted=True)
        return found


def definite_inverse(matrix: Tensor) -> tuple[Product, float]:
    """v -> H^-1 v for use as a metric, with the shift it took to make H positive definite (0 when it was)."""
    shift = 0.0
    top = float(matrix.diagonal().abs().mean()) or 1.0
    while True:
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        factor, info = torch.linalg.cholesky_ex(matrix + shift * eye if shift else matrix)
        if int(info) == 0:
            return (lambda v, factor=factor: torch.cholesky_solve(v[:, None], factor)[:, 0]), shift
        if shift > 1e6 * top or not math.isfinite(top):
            raise SolveError("The curvature matrix holds NaN or infinity. Check data and weights.")
        shift = 1e-3 * top if shift == 0.0 else 10 * shift
