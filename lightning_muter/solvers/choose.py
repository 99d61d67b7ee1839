"""Linear systems H delta = g, each answered with a status and a residual, and the preconditioned L-BFGS of polish and refine.

Nothing here decides what is written to a model: callers look at :attr:`Solution.ok`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.errors import ArgumentError, SolveError

Product = Callable[[Tensor], Tensor]

#: Residuals above this are never "converged" for a direct solve.
_DIRECT_RESIDUAL = 1e-6

_WAY_OUT = {
    "negative curvature": "Use a constraint-aware response ('auto'), a larger weight decay, or curvature='ggn'.",
    "capped": "Allow more iterations (max_iter), loosen tolerance, or use solver='cholesky'.",
    "diverged": "Use solver='cholesky' or 'cg': the series converges only for eigenvalues between 0 and 2 * scale.",
    "not finite": "Check data and weights for NaN or infinity and take a new snapshot.",
    "inaccurate": "The system is singular to working precision: give every parameter of the head a weight decay.",
}


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        value: delta, flattened.         residual: |H delta - g| / |g|.
        status: "converged", "capped", "negative curvature", "diverged", "not finite" or "inaccurate".
        accepted: the caller asked for this status to be accepted (published baselines that stop early, say).
    """

    value: Tensor
    status: str
    residual: float
    iterations: int
    accepted: bool = False

    @property
    def ok(self) -> bool:
        return (self.status == "converged" or self.accepted) and bool(torch.isfinite(self.value).all())

    def require(self, solver: object) -> Solution:
        """Itself, if it may be used.

        Raises:
            SolveError: with status, residual and the way out.
        """
        if self.ok:
            return self
        raise SolveError(
            f"solver: {solver!r} ended with status {self.status!r}, relative residual {self.residual:.2e} after "
            f"{self.iterations} iterations; allowed: 'converged'. Nothing was changed. {_WAY_OUT.get(self.status, '')}"
        )

    def to_dict(self) -> dict[str, str | float | int]:
        return {"status": self.status, "residual": self.residual, "iterations": self.iterations}


@dataclass(frozen=True)
class Border:
    """The last forgotten sample's indirect part, U diag(gamma) U^T, kept out of the matrix: U (p, m), gamma (m,) != 0."""

    u: Tensor
    gamma: Tensor


class Solver(ABC):
    """Solves H delta = g for a symmetric H given as a dense matrix."""

    #: The system comes with the last forgotten sample as a border (see :class:`Schur`).
    bordered = False

    @abstractmethod
    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


def _finish(
    matrix: Tensor | Product, value: Tensor, rhs: Tensor, status: str, iterations: int, limit: float
) -> Solution:
    product = matrix(value) if callable(matrix) else matrix @ value
    residual = float((product - rhs).norm() / rhs.norm().clamp(min=torch.finfo(rhs.dtype).tiny))
    if not math.isfinite(residual):
        status = "not finite"
    elif status == "converged" and residual > limit:
        status = "inaccurate"
    return Solution(value, status, residual, iterations)


class Cholesky(Solver):
    """Exact for positive definite H; anything else is "negative curvature".

    >>> Cholesky().solve(torch.diag(torch.tensor([2.0, 4.0])), torch.tensor([2.0, 2.0])).value
    tensor([1.0000, 0.5000])
    """

    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            status = "negative curvature" if bool(torch.isfinite(matrix).all()) else "not finite"
            return Solution(torch.zeros_like(rhs), status, 1.0, 0)
        value = torch.cholesky_solve(rhs[:, None], factor)[:, 0]
        limit = _DIRECT_RESIDUAL if rhs.dtype == torch.float64 else 1e-3
        return _finish(matrix, value, rhs, "converged", 1, limit)


class LU(Solver):
    """The exact solution of any regular system. An indefinite one is a saddle of the objective: only on request.

    Args:
        accept_indefinite: give the answer all the same (for published formulas, measured as they are).
    """

    def __init__(self, accept_indefinite: bool = False) -> None:
        self.accept_indefinite = accept_indefinite

    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution:
        definite = int(torch.linalg.cholesky_ex(matrix).info) == 0
        if definite or self.accept_indefinite:
            value, info = torch.linalg.solve_ex(matrix, rhs)
            if int(info) == 0:
                found = _finish(matrix, value, rhs, "converged", 1, _DIRECT_RESIDUAL)
                if found.status == "converged" and not definite:
                    return Solution(value, "negative curvature", found.residual, 1, accepted=True)
                return found
        return Solution(torch.zeros_like(rhs), "negative curvature", 1.0, 0)


class CG(Solver):
    """Conjugate gradients with a Jacobi preconditioner.

    Stops with "negative curvature" at the first direction with p^T H p <= 0 and with "capped" at ``max_iter``.

    Args:
        tolerance: on |H delta - g| / |g|.
        accept_early: take the iterate of a capped or negative-curvature stop (the published method runs 10-20 steps).
    """

    def __init__(self, max_iter: int = 1000, tolerance: float = 1e-10, accept_early: bool = False) -> None:
        if max_iter < 1 or not 0 < tolerance < 1:
            raise ArgumentError("max_iter, tolerance", (max_iter, tolerance), "max_iter >= 1 and 0 < tolerance < 1")
        self.max_iter, self.tolerance, self.accept_early = max_iter, tolerance, accept_early

    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution:
        scale = matrix.diagonal().clone()
        scale[scale <= 0] = 1.0
        found = self.iterate(lambda v: matrix @ v, rhs, lambda v: v / scale)
        return found

    def iterate(self, product: Product, rhs: Tensor, precondition: Product | None = None) -> Solution:
        """The same for a matrix known by its products."""
        precondition = precondition or (lambda v: v)
        value = torch.zeros_like(rhs)
        residual = rhs.clone()
        z = precondition(residual)
        direction = z.clone()
        rz = float(residual @ z)
        limit = self.tolerance * float(rhs.norm())
        status, steps = "capped", 0
        if float(residual.norm()) <= limit:
            status = "converged"
        while status == "capped" and steps < self.max_iter:
            image = product(direction)
            curvature = float(direction @ image)
            if not math.isfinite(curvature):
                status = "not finite"
                break
            if curvature <= 0:
                status = "negative curvature"
                break
            alpha = rz / curvature
            value = value + alpha * direction
            residual = residual - alpha * image
            steps += 1
            if float(residual.norm()) <= limit:
                status = "converged"
                break
            z = precondition(residual)
            rz, old = float(residual @ z), rz
            direction = z + (rz / old) * direction
        found = _finish(product, value, rhs, status, steps, 100 * self.tolerance)
        early = self.accept_early and steps > 0 and found.status in ("capped", "negative curvature")
        return Solution(found.value, found.status, found.residual, steps, accepted=early)


class Neumann(Solver):
    """delta = (1/s) sum_{j<T} (I - H/s)^j g, the truncated series; converges iff all eigenvalues of H lie in (0, 2s).

    Args:
        terms: T at most; it stops earlier at ``tolerance``.
        scale: s; "auto" takes 1.05 times the largest eigenvalue (power iteration), the published form is 1.
        accept_early: take the truncated sum at T terms though it has not converged (never if it grows).
    """

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
        found = _finish(matrix, value, rhs, status, steps, 100 * self.tolerance)
        accepted = self.accept_early and found.status == "capped"
        return Solution(found.value, found.status, found.residual, steps, accepted=accepted)


class Schur(Solver):
    """The system bordered in the last forgotten sample, whose indirect part U diag(gamma) U^T stays outside the matrix:

        [ A     U            ] [delta]   [g]
        [ U^T   diag(1/gamma)] [alpha] = [0]         eliminating alpha gives (A - U diag(gamma) U^T) delta = g

    For the unconstrained response this is the published system (gamma^-1 = -eigenvalues of d2l/dx2).
    The eliminated matrix must be positive definite, else "negative curvature".

    Args:
        accept_indefinite: give the answer all the same (for the published formula, measured as it is).
    """

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
        found = _finish(eliminated, solved[:p], rhs, "converged", 1, _DIRECT_RESIDUAL)
        if found.status == "converged" and not definite:
            return Solution(found.value, "negative curvature", found.residual, 1, accepted=True)
        return found


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


_CHOICES: dict[str, type[Solver]] = {"cholesky": Cholesky, "cg": CG, "neumann": Neumann, "schur": Schur}


def as_solver(solver: str | Solver) -> Solver:
    """The solver a name stands for ("auto" is Cholesky)."""
    if isinstance(solver, Solver):
        return solver
    if solver == "auto":
        return Cholesky()
    if solver not in _CHOICES:
        raise ArgumentError("solver", solver, f"'auto', {', '.join(map(repr, _CHOICES))} or a Solver", "Use 'auto'.")
    return _CHOICES[solver]()


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
