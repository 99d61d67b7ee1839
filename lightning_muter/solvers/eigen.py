"""Eigenvalues of symmetric matrices that depend on data: with an answer wherever the matrix is finite.

LAPACK's divide and conquer (``torch.linalg.eigh``) gives up on some finite matrices most of whose rows are zero, such as the
input Hessians of images with blank pixels at maximisers most of whose coordinates are at their bounds.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_muter.errors import SolveError

_Failed: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A = V diag(values) V^T for A (..., n, n): values (..., n) rising, V (..., n, n) orthogonal.

    As ``torch.linalg.eigh``; where that fails, one matrix at a time on the CPU in float64, scaled to a largest entry of 1, rows that
    are zero left out.

    Raises:
        SolveError: the matrix holds NaN or infinity.

    >>> symmetric_eigh(torch.diag(torch.tensor([3.0, 0.0, 1.0])))[0]
    tensor([0., 1., 3.])
    """
    try:
        return torch.linalg.eigh(matrix)
    except _Failed:
        _require_finite(matrix)
    pairs = [_one(square) for square in matrix.reshape(-1, *matrix.shape[-2:])]
    values, vectors = (torch.stack(part).to(matrix) for part in zip(*pairs, strict=True))
    return values.reshape(matrix.shape[:-1]), vectors.reshape(matrix.shape)


def symmetric_eigenvalues(matrix: Tensor) -> Tensor:
    """The eigenvalues alone, rising, (..., n): as :func:`symmetric_eigh`."""
    try:
        return torch.linalg.eigvalsh(matrix)
    except _Failed:
        return symmetric_eigh(matrix)[0]


def _require_finite(matrix: Tensor) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise SolveError(
            f"A curvature matrix {tuple(matrix.shape)} holds NaN or infinity. Check data and weights for them (in 16-bit "
            "precision: for values beyond its range), and take a new snapshot."
        )


def _one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    square = matrix.detach().double().cpu()
    scale = square.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    used = square.any(0)
    block = square[used][:, used] / scale
    try:
        inner, basis = torch.linalg.eigh(block)
    except _Failed:  # numpy brings a LAPACK of its own
        inner, basis = (torch.from_numpy(part) for part in np.linalg.eigh(block.numpy()))
    values, vectors = torch.zeros(len(square), dtype=square.dtype), torch.zeros_like(square)
    count = len(inner)
    values[:count] = inner * scale
    vectors[used, :count] = basis
    vectors[~used, count:] = torch.eye(len(square) - count, dtype=square.dtype)
    order = values.argsort()
    return values[order], vectors[:, order]
