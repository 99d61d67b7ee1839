"""Numbers as people write them: 8/255 as text, NumPy and torch scalars, fractions and decimals."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor


def as_number(value: Any) -> float | None:
    """The number that a value stands for, or None. One that was rounded to 32 bits is read as it is written.

    >>> import torch
    >>> as_number("8/255") == 8 / 255, as_number(np.float32(0.03)), as_number(torch.tensor(0.03)), as_number("pgd")
    (True, 0.03, 0.03, None)
    """
    if isinstance(value, Tensor):
        value = _numpy(value)
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size == 1 else None
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, np.floating) and value.itemsize < 8:
        return float(str(value))
    if isinstance(value, (Real, Decimal)):
        return float(value)
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            return None
    return None


def _numpy(value: Tensor) -> Any:
    if value.numel() != 1 or value.is_complex():
        return None
    item = value.detach().cpu().item()
    return np.float32(item) if value.is_floating_point() and value.element_size() < 8 else item
