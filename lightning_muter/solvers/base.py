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
        value: delta, flattened (m,).
        residual: |H delta - g| / |g|.
        iterations: that it took.
        status: "converged", "capped", "negative curvature", "diverged", "not finite" or "inaccurate".
        accepted: the caller asked for this status to be accepted (published baselines that stop early, say).

    >>> Solution(torch.ones(2), "converged", residual=1e-12, iterations=1).ok
    True
    """

    value: Tensor
    status: str
    residual: float
    iterations: int
    accepted: bool = False

    @property
    def ok(self) -> bool:
        """Whether it may be used: converged or accepted, and finite."""
        return (self.status == "converged" or self.accepted) and bool(torch.isfinite(self.value).all())

    def require(self, solver: object) -> Solution:
        """Itself, if it may be used.

        Args:
            solver: what is named in the error.

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
        """Status, residual and iterations, for results and receipts."""
        return {"status": self.status, "residual": self.residual, "iterations": self.iterations}


@dataclass(frozen=True)
class Border:
    """The last forgotten sample's indirect part, U diag(gamma) U^T, kept out of the matrix.

    Attributes:
        u: U (p, m).
        gamma: (m,), none of them 0.

    >>> border = Border(torch.ones(2, 1), torch.tensor([3.0]))
    >>> (border.u * border.gamma) @ border.u.T
    tensor([[3., 3.],
            [3., 3.]])
    """

    u: Tensor
    gamma: Tensor


class Solver(Extensible, ABC):
    """Solves H delta = g for a symmetric H given as a dense matrix. Extend by subclassing; ``solver=`` takes an object or a name.

    Attributes:
        bordered: the system comes with the last forgotten sample as a border (see :class:`lightning_muter.solvers.dense.Schur`).

    >>> from lightning_muter.solvers.choose import as_solver
    >>> found = as_solver("cholesky").solve(torch.diag(torch.tensor([2.0, 4.0])), torch.tensor([2.0, 2.0]))
    >>> found.value.tolist(), found.status
    ([1.0, 0.5], 'converged')
    """

    bordered = False

    @abstractmethod
    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution:
        """Solve ``matrix x = rhs``; never raises for a bad system, says so in the status.

        Args:
            matrix: H (m, m), symmetric.
            rhs: g (m,).
            border: for solvers that are ``bordered``.

        Returns:
            x (m,) with status and relative residual.
        """


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
