"""Arithmetic in configuration files: ``${number:8/255}`` and ``${product:0.25,${attack.eps}}``."""

from __future__ import annotations

import math
from fractions import Fraction

from omegaconf import OmegaConf

from lightning_muter.errors import ArgumentError


def number(value: object) -> float:
    """A number, or text such as ``8/255`` or ``1e-3``, as a float.

    >>> number("8/255") == 8 / 255, number(0.25)
    (True, 0.25)
    """
    try:
        parsed = float(value) if isinstance(value, (int, float)) else float(Fraction(str(value).replace(" ", "")))
    except (ValueError, ZeroDivisionError) as error:
        raise ArgumentError("number", value, "a number or a fraction such as 8/255") from error
    if not math.isfinite(parsed):
        raise ArgumentError("number", value, "a finite number")
    return parsed


def product(*values: object) -> float:
    """Product of numbers and fractions.

    >>> product(2, "1/8")
    0.25
    """
    return math.prod(number(value) for value in values)


def register() -> None:
    """Make the resolvers known to OmegaConf (once; repeated calls change nothing)."""
    for resolver in (number, product):
        if not OmegaConf.has_resolver(resolver.__name__):
            OmegaConf.register_new_resolver(resolver.__name__, resolver)
