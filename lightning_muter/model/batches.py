"""Where inputs and labels sit in a batch, whatever its structure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_muter.errors import ArgumentError
from lightning_muter.model.leaves import flatten

INPUT_KEYS = ("x", "image", "images", "input", "inputs", "data")
LABEL_KEYS = ("y", "label", "labels", "target", "targets")
_FORMS = (
    "a tuple or list whose first floating tensor is the input and whose next tensor is the label, "
    f"or a dict with a key of {', '.join(INPUT_KEYS)} and one of {', '.join(LABEL_KEYS)}"
)


def split_batch(batch: Any, inputs: Any = None, label: Any = None) -> tuple[Tensor, Tensor, Callable[[Tensor], Any]]:
    """Inputs, labels, and a function that puts other inputs in their place.

    ``inputs``, ``label``: key or position, or ``callable(batch) -> tensor``, where they are to be named.

    Sequences (tuple, named tuple, list): the input is the first floating tensor, the label the next tensor. Mappings:
    by key. Whatever else is in the batch (weights, ids) is left alone. The batch itself is never changed.

    Raises:
        ArgumentError: the batch has another form.

    >>> import torch
    >>> x, y, rebuild = split_batch({"image": torch.zeros(1, 2), "label": torch.tensor([3]), "id": [7]})
    >>> rebuild(x + 1)
    {'image': tensor([[1., 1.]]), 'label': tensor([3]), 'id': [7]}
    """
    if inputs is not None or label is not None:
        return _named(batch, inputs, label)
    if isinstance(batch, Mapping):
        at, key = _only(batch, INPUT_KEYS, "inputs"), _only(batch, LABEL_KEYS, "label")
        x, y = batch[at], batch[key]
        if not (isinstance(x, Tensor) and x.is_floating_point() and isinstance(y, Tensor)):
            raise _refused(batch, _hint(x))

        def rebuild(new: Tensor) -> Any:
            out: Any = copy.copy(batch)
            out[at] = new
            return out

    elif isinstance(batch, (tuple, list)):
        position = next((i for i, v in enumerate(batch) if isinstance(v, Tensor) and v.is_floating_point()), None)
        if position is None:
            raise _refused(batch, _hint(*batch))
        y = next((v for v in batch[position + 1 :] if isinstance(v, Tensor)), None)
        if y is None:
            raise _refused(batch, "No tensor follows the input.")
        x = batch[position]

        def rebuild(new: Tensor) -> Any:
            items = [new if i == position else v for i, v in enumerate(batch)]
            kind: Any = type(batch)
            return kind(*items) if hasattr(batch, "_fields") else kind(items)

    else:
        raise _refused(batch, "")
    if x.dim() == 0 or y.dim() == 0 or x.shape[0] != y.shape[0]:
        raise _refused(batch, f"Inputs have shape {tuple(x.shape)}, labels {tuple(y.shape)}: first sizes must agree.")
    return x, y, rebuild


def _named(batch: Any, inputs: Any, label: Any) -> tuple[Tensor, Tensor, Callable[[Tensor], Any]]:
    """By key, position or callable; the one that is not named is found as without names."""
    if inputs is None or label is None:
        x, y, _ = split_batch(batch)
        x = x if inputs is None else _taken(batch, inputs, "inputs")
        y = y if label is None else _taken(batch, label, "label")
    else:
        x, y = _taken(batch, inputs, "inputs"), _taken(batch, label, "label")
    _, leaves, again = flatten(batch)
    at = next((i for i, leaf in enumerate(leaves) if leaf is x), None)
    if at is None:
        raise _refused(batch, "inputs= must give a tensor that stands in the batch itself.")
    if not x.is_floating_point():
        raise _refused(batch, _hint(x))
    return x, y, lambda new: again([new if i == at else leaf for i, leaf in enumerate(leaves)])


def _taken(batch: Any, place: Any, argument: str) -> Tensor:
    try:
        found = place(batch) if callable(place) else batch[place]
    except (KeyError, IndexError, TypeError) as error:
        raise ArgumentError(argument, place, f"a key or position of the batch, {_describe(batch)}") from error
    if not isinstance(found, Tensor):
        raise ArgumentError(argument, place, f"a tensor of the batch, {_describe(batch)}")
    return found


def _only(batch: Mapping[Any, Any], keys: tuple[str, ...], argument: str) -> Any:
    found = [k for k in batch if isinstance(k, str) and k.lower() in keys]
    if len(found) != 1:
        raise _refused(
            batch,
            f"{len(found)} of the keys {', '.join(keys)} are there: name it with {argument}= (key, position or function).",
        )
    return found[0]


def _hint(*values: Any) -> str:
    nested = [v for v in values if isinstance(v, (Mapping, tuple, list))]
    if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for v in nested for leaf in flatten(v)[1]):
        return (
            "The floating tensors lie inside another list or dict: one tensor is perturbed; put the columns into one, or name it "
            "with inputs= and label= (callable(batch) -> tensor)."
        )
    if any(isinstance(v, Tensor) and not v.is_floating_point() for v in values):
        return "Integer inputs cannot be perturbed: convert them to floats (x / 255) in the dataset."
    return ""


def _refused(batch: Any, advice: str) -> ArgumentError:
    return ArgumentError("batch", _describe(batch), _FORMS, advice)


def _describe(value: Any) -> str:
    """Structure, types and shapes: the values themselves would drown the message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(_describe(v) for v in value)})"
    return type(value).__name__
