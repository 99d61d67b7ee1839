"""Solvers against dense solutions; statuses, residuals, and refusals with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_muter.errors import ArgumentError, SolveError
from lightning_muter.solvers.base import Border, Solver
from lightning_muter.solvers.cg import CG
from lightning_muter.solvers.choose import as_solver
from lightning_muter.solvers.dense import LU, Cholesky, Schur, definite_inverse
from lightning_muter.solvers.neumann import Neumann

EXACT: list[Solver] = [Cholesky(), LU(), CG(), Neumann(tolerance=1e-12), Schur()]


def _matrix(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = (q * torch.tensor(values, dtype=torch.float64)) @ q.T
    return (matrix + matrix.T) / 2, torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("solver", EXACT, ids=repr)
def test_definite_systems_are_solved(solver):
    matrix, rhs = _matrix([0.5, 1.0, 2.0, 3.0, 7.0])
    found = solver.solve(matrix, rhs).require(solver)
    assert found.status == "converged"
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, rhs), rtol=1e-8, atol=1e-9)
    true = float((matrix @ found.value - rhs).norm() / rhs.norm())
    assert found.residual == pytest.approx(true, abs=1e-15)
    assert found.to_dict() == {"status": "converged", "residual": found.residual, "iterations": found.iterations}


@pytest.mark.parametrize("solver", EXACT, ids=repr)
def test_a_zero_right_hand_side_has_the_zero_solution(solver):
    matrix, rhs = _matrix([0.5, 1.0, 2.0])
    found = solver.solve(matrix, 0 * rhs)
    assert found.ok
    assert not found.value.any()


@pytest.mark.parametrize("solver", EXACT, ids=repr)
def test_indefinite_systems_are_refused_with_the_way_out(solver):
    matrix, rhs = _matrix([-0.5, 1.0, 2.0, 3.0, 7.0])
    found = solver.solve(matrix, rhs)
    assert not found.ok
    assert found.status in ("negative curvature", "diverged")
    with pytest.raises(
        SolveError, match=r"solver: .*got|solver: .*status.*residual.*allowed.*Nothing was changed.*Use"
    ):
        found.require(solver)


@pytest.mark.parametrize("solver", EXACT, ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_matrices_that_are_not_finite_are_refused(solver, bad):
    matrix, rhs = _matrix([0.5, 1.0, 2.0])
    matrix[0, 0] = bad
    assert not solver.solve(matrix, rhs).ok
    matrix, rhs = _matrix([0.5, 1.0, 2.0])
    rhs[1] = bad
    assert not solver.solve(matrix, rhs).ok


def test_singular_systems_are_refused():
    matrix, rhs = _matrix([0.0, 1.0, 2.0])
    for solver in (Cholesky(), LU(), CG(max_iter=50), Neumann(terms=200), Schur()):
        assert not solver.solve(matrix, rhs).ok, solver


def test_conjugate_gradients_stop_at_their_limit_and_may_be_taken_early():
    matrix, rhs = _matrix([0.001, 0.01, 0.1, 1.0, 10.0, 100.0])
    capped = CG(max_iter=2).solve(matrix, rhs)
    assert (capped.status, capped.iterations, capped.ok) == ("capped", 2, False)
    with pytest.raises(SolveError, match="max_iter"):
        capped.require(CG(max_iter=2))
    early = CG(max_iter=2, accept_early=True).solve(matrix, rhs)
    assert early.ok
    assert torch.equal(early.value, capped.value)


def test_neumann_is_its_explicit_sum_and_tells_divergence():
    """sum_{j<T} (I - H)^j g: converges iff all eigenvalues lie in (0, 2)."""
    inside, rhs = _matrix([0.2, 0.9, 1.5, 1.9])
    eye = torch.eye(4, dtype=torch.float64)
    found = Neumann(terms=5, scale=1.0, accept_early=True).solve(inside, rhs)
    expected = sum(torch.linalg.matrix_power(eye - inside, j) @ rhs for j in range(5))
    torch.testing.assert_close(found.value, expected, rtol=1e-12, atol=1e-13)
    assert found.status == "capped"
    assert found.ok
    full = Neumann(scale=1.0, tolerance=1e-12).solve(inside, rhs)
    torch.testing.assert_close(full.value, torch.linalg.solve(inside, rhs), rtol=1e-9, atol=1e-10)
    outside, rhs = _matrix([0.2, 0.9, 2.1])
    for solver in (Neumann(scale=1.0), Neumann(scale=1.0, accept_early=True)):
        wild = solver.solve(outside, rhs)
        assert wild.status == "diverged"
        assert not wild.ok
        with pytest.raises(SolveError, match="eigenvalues between 0 and 2"):
            wild.require(solver)


def test_bordered_system_is_the_direct_one():
    """Eliminating alpha gives the direct solution to 1e-8, for indirect parts of either sign."""
    for sign in (1.0, -1.0):
        matrix, rhs = _matrix([0.8, 1.0, 2.0, 3.0, 7.0, 9.0], seed=2)
        u = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gamma = sign * torch.tensor([0.3, 1e-3, 2.0], dtype=torch.float64)
        added = matrix + (u * gamma) @ u.T
        found = Schur().solve(added, rhs, Border(u, gamma)).require(Schur())
        assert (found.value - torch.linalg.solve(matrix, rhs)).norm() < 1e-8 * found.value.norm()


def test_indefinite_answers_come_only_on_request_and_say_so():
    matrix, rhs = _matrix([-0.8, 1.0, 2.0])
    u, gamma = torch.eye(3, dtype=torch.float64)[:, :1], torch.tensor([0.2], dtype=torch.float64)
    added = matrix + (u * gamma) @ u.T
    assert not Schur().solve(added, rhs, Border(u, gamma)).ok
    for found in (
        LU(accept_indefinite=True).solve(matrix, rhs),
        Schur(accept_indefinite=True).solve(added, rhs, Border(u, gamma)),
    ):
        assert found.ok
        assert found.status == "negative curvature"
        torch.testing.assert_close(found.value, torch.linalg.solve(matrix, rhs), rtol=1e-9, atol=1e-10)


def test_a_metric_is_exact_where_it_can_be_and_shifted_where_it_must():
    matrix, v = _matrix([0.5, 1.0, 2.0])
    product, shift = definite_inverse(matrix)
    assert shift == 0
    torch.testing.assert_close(product(v), torch.linalg.solve(matrix, v), rtol=1e-10, atol=1e-12)
    indefinite, v = _matrix([-0.5, 1.0, 2.0])
    product, shift = definite_inverse(indefinite)
    assert shift > 0.5
    assert v @ product(v) > 0
    with pytest.raises(SolveError, match="NaN"):
        definite_inverse(torch.full((2, 2), torch.nan, dtype=torch.float64))


@pytest.mark.parametrize(
    "bad",
    [
        lambda: as_solver("gauss"),
        lambda: CG(max_iter=0),
        lambda: CG(tolerance=0.0),
        lambda: Neumann(terms=0),
        lambda: Neumann(scale=-1.0),
        lambda: Neumann(scale="large"),
    ],
)
def test_wrong_arguments_are_named(bad):
    with pytest.raises(ArgumentError, match=r"got .*; allowed: "):
        bad()


def test_names_stand_for_solvers():
    assert isinstance(as_solver("auto"), Cholesky)
    assert isinstance(as_solver("schur"), Schur)
    mine = CG(max_iter=7)
    assert as_solver(mine) is mine
