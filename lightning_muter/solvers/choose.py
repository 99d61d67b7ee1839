"""Which solver a name stands for."""

from __future__ import annotations

from lightning_muter.solvers.base import Solver
from lightning_muter.solvers.cg import CG
from lightning_muter.solvers.dense import LU, Cholesky, Schur
from lightning_muter.solvers.neumann import Neumann

__all__ = ["CG", "LU", "Cholesky", "Neumann", "Schur", "Solver", "as_solver"]


def as_solver(solver: str | Solver) -> Solver:
    """The solver a name stands for ("auto" is Cholesky).

    Raises:
        ArgumentError: no solver has this name.
    """
    if isinstance(solver, Solver):
        return solver
    made: Solver = Cholesky() if solver == "auto" else Solver.named(solver)()
    return made
