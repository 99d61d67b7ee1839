"""What a module's attributes hold, put back after a trial: numbers, tensors, containers in containers, meters of one's own."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LIBRARIES = (
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "torchmetrics",
    "torchattacks",
    "numpy",
    "lightning_muter",
)
_DEEP = 6
_BYTES = 1 << 26  # larger tensors are data, which steps do not write to


class Kept:
    """States of objects, taken when they are named and put back by :meth:`put_back`."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._back: list[Callable[[], None]] = []

    def attributes(self, thing: Any, leave: Iterable[str] = (), depth: int = 0) -> None:
        """Every attribute of an object but those named, and what is inside."""
        own = {k: v for k, v in vars(thing).items() if k not in leave}

        def back() -> None:
            for name in [k for k in vars(thing) if k not in own and k not in leave]:
                del vars(thing)[name]
            vars(thing).update(own)

        self._back.append(back)
        for value in own.values():
            self._inside(value, depth + 1)

    def put_back(self) -> None:
        for back in self._back:
            back()

    def _inside(self, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth > _DEEP or isinstance(value, (nn.Module, type)):
            return
        self._seen[id(value)] = value
        if isinstance(value, (dict, list, set, deque)):
            self._container(value, depth)
        elif isinstance(value, tuple):
            for one in value:
                self._inside(one, depth + 1)
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            if value.numel() * value.element_size() <= _BYTES:
                self._tensor(value)
        elif isinstance(value, np.ndarray) and value.nbytes <= _BYTES and value.flags.writeable:
            before = value.copy()
            self._back.append(lambda: np.copyto(value, before))
        elif hasattr(value, "__dict__") and not callable(value) and not _of_a_library(value):
            self.attributes(value, depth=depth)

    def _container(self, value: Any, depth: int) -> None:
        content = copy.copy(value)

        def back() -> None:
            value.clear()
            value.extend(content) if isinstance(value, (list, deque)) else value.update(content)

        self._back.append(back)
        for one in content.values() if isinstance(content, dict) else content:
            self._inside(one, depth + 1)

    def _tensor(self, value: Tensor) -> None:
        before, version = value.detach().clone(), value._version

        def back() -> None:
            if value._version != version:
                with torch.no_grad():
                    value.copy_(before)

        self._back.append(back)


def _of_a_library(value: Any) -> bool:
    return type(value).__module__.split(".")[0] in _LIBRARIES
