"""Results that are dear and do not change: trained backbones and retrained references, kept by the hash of what they
depend on, so that methods, jobs and interrupted sweeps share them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_muter.errors import CorruptFileError
from lightning_muter.storage.container import read_container, write_container

log = logging.getLogger(__name__)

Entry = tuple[dict[str, Any], dict[str, Tensor]]


def digest(parts: Any) -> str:
    """Short SHA-256 of plain data (numbers, strings, lists, dicts); the order of keys does not matter.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


class Cache:
    """Files ``<folder>/<kind>/<key>.muter``; None as the folder keeps nothing.

    A file that cannot be read is made again: nothing here is the only copy of anything.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def path(self, kind: str, key: str) -> Path | None:
        return None if self.folder is None else self.folder / kind / f"{key}.muter"

    def get(self, kind: str, key: str) -> Entry | None:
        path = self.path(kind, key)
        if path is None or not path.is_file():
            return None
        try:
            return read_container(path, kind)
        except CorruptFileError as error:
            log.warning("%s cannot be read and is made again (%s)", path, error)
            return None

    def put(self, kind: str, key: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        path = self.path(kind, key)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_container(path, kind, dict(meta), {k: v.detach().cpu().contiguous() for k, v in tensors.items()})

    def get_or_make(self, kind: str, key: str, make: Callable[[], Entry]) -> tuple[Entry, bool]:
        """The stored entry, or a new one; and whether it was there."""
        found = self.get(kind, key)
        if found is not None:
            return found, True
        meta, tensors = make()
        self.put(kind, key, meta, tensors)
        return (dict(meta), dict(tensors)), False
