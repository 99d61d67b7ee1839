"""A batch of any structure as a flat list of leaves, and back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Rebuild = Callable[[list[Any]], Any]


def flatten(batch: Any) -> tuple[list[str], list[Any], Rebuild]:
    """Names (``"[0]"``, ``"['image']"``), leaves, and what puts other leaves into a copy of the structure.

    Tuples, named tuples, lists, mappings of any class and dataclasses are opened, anything else is a leaf, and so is a list of
    names or numbers.

    >>> names, leaves, rebuild = flatten({"x": 1, "more": ({"y": 2}, ["a", "b"])})
    >>> names, rebuild([4, 5, ["c"]])
    (["['x']", "['more'][0]['y']", "['more'][1]"], {'x': 4, 'more': ({'y': 5}, ['c'])})
    """
    parts = _opened(batch)
    if parts is None:
        return [""], [batch], lambda leaves: leaves[0]
    keys, values, close = parts
    inner = [flatten(v) for v in values]
    names = [f"[{key!r}]" + name for key, (below, _, _) in zip(keys, inner, strict=True) for name in below]
    sizes = [len(below) for below, _, _ in inner]

    def rebuild(leaves: list[Any]) -> Any:
        out, done = [], 0
        for size, (_, _, again) in zip(sizes, inner, strict=True):
            out.append(again(leaves[done : done + size]))
            done += size
        return close(out)

    return names, [leaf for _, below, _ in inner for leaf in below], rebuild


def _opened(batch: Any) -> tuple[list[Any], list[Any], Callable[[list[Any]], Any]] | None:
    if isinstance(batch, (tuple, list)) and any(_holds_more(v) for v in batch):
        kind: Any = type(batch)
        close = (lambda out: kind(*out)) if hasattr(batch, "_fields") else (lambda out: kind(out))
        return list(range(len(batch))), list(batch), close
    if isinstance(batch, Mapping):
        return list(batch), list(batch.values()), lambda out: _mapping_like(batch, out)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [f.name for f in dataclasses.fields(batch)]
        return (
            fields,
            [getattr(batch, f) for f in fields],
            lambda out: dataclasses.replace(batch, **dict(zip(fields, out, strict=True))),
        )
    return None


def _holds_more(value: Any) -> bool:
    """A list of names or numbers, one per sample, is a leaf as a whole."""
    return isinstance(value, (Tensor, tuple, list, Mapping)) or dataclasses.is_dataclass(value)


def _mapping_like(batch: Any, values: list[Any]) -> Any:
    out: Any = copy.copy(batch)
    for key, value in zip(list(batch), values, strict=True):
        out[key] = value
    return out


def rows(leaf: Any, n: int) -> bool:
    """Whether a leaf is a tensor with a row per sample."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == n
