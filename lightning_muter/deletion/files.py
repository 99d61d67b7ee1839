"""Where the files of one model lie, and its receipt files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.receipts import markdown, readable, receipt_name
from lightning_muter.errors import ArgumentError, CorruptFileError
from lightning_muter.storage.atomic import STAGE, beside, fsync_folder, write_new
from lightning_muter.storage.container import parse_json
from lightning_muter.storage.signing import read_public_keys, write_public_keys


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

    @classmethod
    def named(cls, path: str | os.PathLike[str]) -> Places:
        """The places of a `<stem>.muter.snapshot`, or of a checkpoint."""
        path = Path(path)
        if path.name.endswith(".muter.snapshot"):
            return cls(path.parent, path.name.removesuffix(".muter.snapshot"))
        return cls.of(path)

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
    def public_key(self) -> Path:
        """What checks the signatures of the receipts (PEM)."""
        return self._named("pub")

    @property
    def receipts(self) -> Path:
        """The folder of the receipt files."""
        return self._named("receipts")

    @property
    def lock(self) -> Path:
        """Held while a process works on these files; the file itself stays."""
        return self.folder / f".{self.stem}.muter.lock"

    @property
    def verified(self) -> Path:
        """Up to where the ledger was verified last (see :mod:`lightning_muter.deletion.verified`)."""
        return self.folder / f".{self.stem}.muter.verified"

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


def pending_process(places: Places) -> int | None:
    """The process whose request is under way, if it still lives (or one that got its number)."""
    try:
        with open(places.pending, "rb") as file:
            process = int(parse_json(file.read(1 << 20)).get("pid", 0))
        os.kill(process, 0) if process > 0 else None
    except PermissionError:  # somebody else's
        return process
    except (OSError, OverflowError, CorruptFileError, TypeError, ValueError):
        return None
    return process if process > 0 else None


def write_receipts(places: Places, ledger: Ledger) -> list[Path]:
    """Write those receipts of the ledger that have no files, and the public key; returns the new JSON files."""
    after = ledger.complete_up_to
    there = set(os.listdir(places.receipts)) if places.receipts.is_dir() and not after else set()
    new = []
    for number, request_id in ledger.names(after):
        name = receipt_name({"number": number, "id": request_id})
        if not there >= {f"{name}.json", f"{name}.md"} and (receipt := ledger.find(request_id)) is not None:
            _write_receipt(places, receipt)
            new.append(receipt_path(places, receipt))
    if new:
        fsync_folder(places.receipts)
    _publish_key(places, ledger)
    return new


def _publish_key(places: Places, ledger: Ledger) -> None:
    last = ledger.last()
    if last is None or "public_key" not in last:
        return
    try:
        known = read_public_keys(places.public_key)[-1].hex
    except CorruptFileError:  # lost or damaged: written anew
        known = None
    if known != last["public_key"]:
        write_public_keys(places.public_key, ledger.public_keys())


def receipt_path(places: Places, receipt: Mapping[str, Any]) -> Path:
    """Where the JSON file of a receipt lies."""
    return places.receipts / f"{receipt_name(receipt)}.json"


def _write_receipt(places: Places, receipt: Mapping[str, Any]) -> None:
    """Both files appear complete or not at all; what a dead process leaves lies beside the model's other leftovers."""
    places.receipts.mkdir(exist_ok=True)
    path = receipt_path(places, receipt)
    page = path.parent / f"{receipt_name(receipt)}.md"
    for target, text in ((path, readable(receipt)), (page, markdown(receipt).encode())):
        stage = beside(places.receipts, STAGE)
        write_new(stage, lambda file, text=text: file.write(text))  # type: ignore[misc]
        os.replace(stage, target)
