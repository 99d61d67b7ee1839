"""L(z, leaves) of a step that is not traced: at the first need, or never."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.own_step import WAY_OUT
from lightning_muter.model.rowwise import BatchLoss


class Later:
    """L(z, leaves), traced at the first need."""

    def __init__(self, trace: Callable[[], BatchLoss]) -> None:
        self._trace = trace
        self._found: BatchLoss | None = None

    @property
    def by_row(self) -> bool:
        return getattr(self._loss(), "by_row", False)

    def _loss(self) -> BatchLoss:
        if self._found is None:
            self._found = self._trace()
        return self._found

    def __call__(self, z: Tensor, leaves: list[Any]) -> Tensor:
        return self._loss()(z, leaves)


class Replayed:
    """L(z, leaves) by the step itself."""

    by_row = True

    def __init__(self, step: Callable[..., Tensor], dtype: torch.dtype) -> None:
        self.step, self.dtype = step, dtype

    def __call__(self, z: Tensor, leaves: list[Any]) -> Tensor:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of small batches
                return self.step(z.to(self.dtype), *leaves).to(z.dtype)
        except UnsuitableError:
            raise
        except Exception as error:
            raise UnsuitableError(
                f"training_step looks at values and fails on a batch of {len(z)} of the same rows ({type(error).__name__}: "
                f"{str(error)[:200]}): its loss cannot be read row by row. {WAY_OUT}"
            ) from error
