"""Arithmetic in configuration files: ``${number:8/255}`` and ``${product:0.25,${attack.eps}}``."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from omegaconf import Container, ListConfig, OmegaConf, open_dict

from lightning_muter.errors import ArgumentError

_FRACTION = re.compile(r"\s*[-+]?\d+(\.\d*)?\s*/\s*\d+(\.\d*)?\s*")


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


def with_numbers(config: Any) -> Any:
    """Every fraction in a configuration becomes a number, wherever it was overridden (``attack.build.alpha=2/255``).

    >>> with_numbers(OmegaConf.create({"eps": "8/255", "many": ["1/2", "a/b"], "name": "x"}))
    {'eps': 0.03137254901960784, 'many': [0.5, 'a/b'], 'name': 'x'}
    """
    pairs = enumerate(config) if isinstance(config, ListConfig) else config.items_ex(resolve=False)
    for key, _ in list(pairs):
        node = config._get_node(key)
        if isinstance(node, Container):
            if not (node._is_none() or node._is_missing() or node._is_interpolation()):
                with_numbers(node)
        elif isinstance(value := node._value(), str) and _FRACTION.fullmatch(value):
            with open_dict(config):
                config[key] = number(value)
    return config


def register() -> None:
    """Make the resolvers known to OmegaConf (once; repeated calls change nothing)."""
    for resolver in (number, product):
        if not OmegaConf.has_resolver(resolver.__name__):
            OmegaConf.register_new_resolver(resolver.__name__, resolver)
