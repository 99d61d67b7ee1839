"""Eigenvalues where LAPACK's first choice gives up."""

from __future__ import annotations

import pytest
import torch

from lightning_muter.errors import SolveError
from lightning_muter.solvers import eigen


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """``torch.linalg.eigh`` that does not converge on matrices with a zero row, as on input Hessians with blank pixels."""
    real, sizes = torch.linalg.eigh, []

    def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not bool(matrix.any(-1).all()) or not bool(torch.isfinite(matrix).all()):
            raise eigen._Failed("linalg.eigh: the algorithm failed to converge")
        sizes.append(matrix.shape[-1])
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: eigh(matrix)[0])
    return sizes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_zero_rows_are_left_out(failing: list[int], batch: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(*batch, 7, 7, dtype=dtype)
    matrix = (matrix + matrix.mT) * 1e-6
    matrix[..., 2:6, :], matrix[..., :, 2:6] = 0, 0
    values, vectors = eigen.symmetric_eigh(matrix)
    assert set(failing) == {3}
    assert values.shape == matrix.shape[:-1]
    assert values.dtype == dtype
    assert bool((values.diff(dim=-1) >= 0).all())
    rounding = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close((vectors * values[..., None, :]) @ vectors.mT, matrix, rtol=0, atol=1e-6 * rounding)
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(7, dtype=dtype).expand_as(matrix), rtol=0, atol=rounding)
    assert torch.equal(eigen.symmetric_eigenvalues(matrix), values)


def test_nothing_but_zeros(failing: list[int]) -> None:
    values, vectors = eigen.symmetric_eigh(torch.zeros(2, 4, 4))
    assert not values.any()
    assert torch.equal(vectors, torch.eye(4).expand(2, -1, -1))


def test_what_is_not_finite_is_refused_by_name(failing: list[int]) -> None:
    with pytest.raises(SolveError, match="NaN or infinity"):
        eigen.symmetric_eigh(torch.full((2, 2), float("nan")))
