"""Where the files of one model lie, and its receipt files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.receipts import canonical, markdown, receipt_name
from lightning_muter.errors import ArgumentError, CorruptFileError
from lightning_muter.storage.atomic import commit_files
from lightning_muter.storage.container import parse_json


@dataclass(frozen=True)
class Places:
    """Where the files of one model lie, all named after one stem in one folder.

    >>> places = Places.of("runs/last.ckpt")
    >>> places.checkpoint.name, places.snapshot.name, places.ledger.name
    ('last.muter.ckpt', 'last.muter.snapshot', 'last.muter.ledger')
    >>> Places.of("runs/last.muter.ckpt") == places
    True
    """

    folder: Path
    stem: str

    @classmethod
    def of(cls, checkpoint: str | os.PathLike[str]) -> Places:
        """The places that belong to a checkpoint `<stem>.ckpt` or `<stem>.muter.ckpt`."""
        path = Path(checkpoint)
        stem = path.name.removesuffix(".ckpt").removesuffix(".muter")
        if not path.name.endswith(".ckpt") or not stem:
            raise ArgumentError("ckpt_path", str(checkpoint), "a file named <name>.ckpt")
        return cls(path.parent, stem)

    def __fspath__(self) -> str:
        return str(self.checkpoint)

    def _named(self, ending: str) -> Path:
        return self.folder / f"{self.stem}.muter.{ending}"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that requests change."""
        return self._named("ckpt")

    @property
    def snapshot(self) -> Path:
        """What unlearning needs to know, tied to the checkpoint by fingerprint."""
        return self._named("snapshot")

    @property
    def ledger(self) -> Path:
        """The requests so far (SQLite)."""
        return self._named("ledger")

    @property
    def key(self) -> Path:
        """The key of the digests (mode 0600)."""
        return self._named("key")

    @property
    def receipts(self) -> Path:
        """The folder of the receipt files."""
        return self._named("receipts")

    @property
    def lock(self) -> Path:
        """Held while a process works on these files; the file itself stays."""
        return self.folder / f".{self.stem}.muter.lock"

    @property
    def pending(self) -> Path:
        """The request under way."""
        return self.folder / f".{self.stem}.muter.pending"


def pending_request(places: Places) -> str | None:
    """The id of the request under way; its file was replaced atomically, so one that cannot be read is not ours."""
    try:
        with open(places.pending, "rb") as file:
            return str(parse_json(file.read(1 << 20)).get("id"))[:200]
    except (OSError, CorruptFileError):
        return None


def write_receipts(places: Places, ledger: Ledger) -> list[Path]:
    """Write those receipts of the ledger that have no files; returns the new JSON files."""
    new = []
    for receipt in ledger.receipts():
        name = receipt_name(receipt)
        path = places.receipts / f"{name}.json"
        if not path.exists() or not path.with_suffix(".md").exists():
            _write_receipt(places, receipt)
            new.append(path)
    return new


def receipt_path(places: Places, receipt: Mapping[str, Any]) -> Path:
    """Where the JSON file of a receipt lies."""
    return places.receipts / f"{receipt_name(receipt)}.json"


def _write_receipt(places: Places, receipt: Mapping[str, Any]) -> None:
    places.receipts.mkdir(exist_ok=True)
    path = receipt_path(places, receipt)
    text, page = canonical(receipt), markdown(receipt).encode()
    page_path = path.parent / f"{receipt_name(receipt)}.md"
    commit_files({path: lambda file: file.write(text), page_path: lambda file: file.write(page)})
