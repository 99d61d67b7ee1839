"""What a linear solver is: H delta = g, answered with a status and a residual.

Nothing here decides what is written to a model: callers look at :attr:`Solution.ok`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.errors import SolveError
from lightning_muter.extension import Extensible

Product = Callable[[Tensor], Tensor]

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


class Solver(Extensible, ABC):
    """Solves H delta = g for a symmetric H given as a dense matrix. Extend by subclassing; ``solver=`` takes an object or a name."""

    #: The system comes with the last forgotten sample as a border (see :class:`Schur`).
    bordered = False

    @abstractmethod
    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution:
        """x of ``matrix x = rhs`` (m, m), (m,) with status and relative residual; never raises for a bad system, says so."""


def finished(
    matrix: Tensor | Product, value: Tensor, rhs: Tensor, status: str, iterations: int, limit: float
) -> Solution:
    """The solution with its true residual: "not finite", or "inaccurate" where a converged one misses ``limit``."""
    product = matrix(value) if callable(matrix) else matrix @ value
    residual = float((product - rhs).norm() / rhs.norm().clamp(min=torch.finfo(rhs.dtype).tiny))
    if not math.isfinite(residual):
        status = "not finite"
    elif status == "converged" and residual > limit:
        status = "inaccurate"
    return Solution(value, status, residual, iterations)
