"""Plain values: what torch's restricted reader (`weights_only=True`) opens, and how other values become such.

Kept: numbers, text, bytes, None, tensors, dtypes, devices, and dicts, lists, tuples and sets of them. Converted, for nothing is
lost: OmegaConf and other mappings to dicts, NumPy arrays to tensors and NumPy scalars to numbers, paths to text, dataclasses
and namespaces to dicts, members of str and int enumerations to their values. Anything else would need code to be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

torch.serialization.add_safe_globals([set])  # releases of torch before 2.6 do not know that it is harmless

_AS_THEY_ARE = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    torch.layout,
    Tensor,
    nn.Parameter,
)


class _NotPlain(Exception):
    """This value cannot be written without code."""


@dataclass
class Plain:
    """The plain form of a mapping; by dotted name the types of what was left out, and of what comes back as another type."""

    value: dict[Any, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)


def plain(value: Mapping[Any, Any]) -> Plain:
    """A nested mapping with what a checkpoint may hold; what was left out or changed is named.

    >>> from pathlib import Path
    >>> plain({"root": Path("/data"), "net": {"act": torch.relu, "rates": np.arange(2)}})
    Plain(value={'root': '/data', 'net': {'rates': tensor([0, 1])}}, left_out={'net.act': 'builtin_function_or_method'}, changed={'net.rates': 'ndarray'})
    """  # noqa: E501
    out = Plain()
    out.value = _mapping(value, "", out)
    return out


def _mapping(value: Mapping[Any, Any], name: str, out: Plain) -> dict[Any, Any]:
    found = {}
    for key, item in value.items():
        at = f"{name}.{key}" if name else str(key)
        try:
            found[_plain(key, at, out)] = _plain(item, at, out)
        except (_NotPlain, RecursionError):
            out.left_out[at] = _kind(item)
    return found


def _plain(value: Any, name: str, out: Plain) -> Any:
    """The value as it may be kept, noting what was left out or changed.

    Raises:
        _NotPlain: nothing of it can be kept.
    """
    if type(value) in _AS_THEY_ARE:
        return value
    fields = _fields(value)
    if fields is not None:
        out.changed[name] = type(value).__name__
        return _plain(fields, name, out)
    if isinstance(value, np.generic):
        item = value.item()
        if type(item) is type(value):  # a long double is its own item
            raise _NotPlain(name)
        return _plain(item, name, out)
    if isinstance(value, np.ndarray):
        out.changed[name] = type(value).__name__
        return _array(value, name, out)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return _mapping(value, name, out)
    for kind, kinds in ((list, list), (tuple, tuple), (set, (set, frozenset))):
        if isinstance(value, kinds):
            return kind([_whole(item, name) for item in value])
    for base in (str, int, float):  # subclasses, and members of such enumerations
        if isinstance(value, base):
            return str.__str__(value) if base is str else base(value)
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    raise _NotPlain(name)


def _whole(item: Any, name: str) -> Any:
    """An element of a sequence: with a part missing the others would have other places."""
    inside = Plain()
    found = _plain(item, name, inside)
    if inside.left_out:
        raise _NotPlain(name)
    return found


def _array(value: np.ndarray[Any, Any], name: str, out: Plain) -> Any:
    try:
        return torch.from_numpy(np.ascontiguousarray(value).copy().reshape(value.shape))
    except (TypeError, ValueError):  # text, objects, other byte orders
        return _plain(value.tolist(), name, out)


def _fields(value: Any) -> Any:
    """The content of an OmegaConf container, a namespace or a dataclass; None for anything else.

    Interpolations stay as they are written where the container itself resolves them: resolved ones would put environment
    variables into a file.
    """
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and isinstance(value, omegaconf.Container):
        try:
            return omegaconf.OmegaConf.to_container(value, resolve=value._get_parent() is not None)
        except Exception as error:  # of the user's own resolvers
            raise _NotPlain(str(error)) from error
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return None


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
