"""Inputs that were normalised before the step sees them, in the scale of the data: there radii and boxes mean what they say.

x_model = (x - mean) / std  per channel,        perturbations, their ball and their box are of x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_muter.errors import ArgumentError

_ALLOWED = "(mean, std), numbers or one per channel, e.g. ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"


@dataclass(frozen=True)
class Normalization:
    """What was done to inputs (n, C, ...) or tables (n, C); one number stands for all channels.

    >>> of = Normalization.of((0.5, 0.25))
    >>> of.to_data(torch.tensor([[2.0]])), of.to_model(torch.tensor([[1.0]]))
    (tensor([[1.]]), tensor([[2.]]))
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, given: Any) -> Normalization | None:
        """The normalisation that a user gave, as (mean, std) or as an object.

        Raises:
            ArgumentError: no pair, or a standard deviation that is not above 0.
        """
        if given is None or isinstance(given, cls):
            return given
        try:
            mean, std = (tuple(torch.as_tensor(v, dtype=torch.float64).reshape(-1).tolist()) for v in given)
        except (TypeError, ValueError) as error:
            raise ArgumentError("normalization", given, _ALLOWED) from error
        if not mean or len({len(mean), len(std)} - {1}) > 1 or not all(s > 0 for s in std):
            raise ArgumentError("normalization", given, _ALLOWED)
        return cls(mean, std)

    def to_data(self, x: Tensor) -> Tensor:
        return x * self._shaped(self.std, x) + self._shaped(self.mean, x)

    def to_model(self, x: Tensor) -> Tensor:
        return (x - self._shaped(self.mean, x)) / self._shaped(self.std, x)

    def _shaped(self, values: Sequence[float], x: Tensor) -> Tensor:
        if len(values) not in (1, x.shape[1] if x.dim() > 1 else 1):
            raise ArgumentError(
                "normalization",
                f"{len(values)} channels",
                f"one number or {x.shape[1]} (inputs have shape {tuple(x.shape)})",
            )
        return x.new_tensor(values).reshape(1, -1, *[1] * (x.dim() - 2))


def normalization_in(dataset: Any) -> tuple[Any, Any] | None:
    """Mean and std of the one ``Normalize`` (anything with both) among a dataset's transforms, also below subsets; else None."""
    found: list[Any] = []
    seen: set[int] = set()
    todo = [dataset]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or thing is None or len(seen) > 100:
            continue
        seen.add(id(thing))
        if hasattr(thing, "mean") and hasattr(thing, "std") and not isinstance(thing, Tensor):
            found.append(thing)
            continue
        for name in ("dataset", "transform", "transforms", "normalize_transform", "datasets"):
            below = getattr(thing, name, None)
            todo += list(below) if isinstance(below, (list, tuple)) else [below]
    return (found[0].mean, found[0].std) if len(found) == 1 and not callable(found[0].mean) else None
