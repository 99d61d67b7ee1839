"""The ledger is verified before every request, and what was verified is remembered, so that a long one costs no more.

After a request the ledger's file is as we left it: number of the inode, size and times are noted with the head, sealed under
the key. As long as they are the same nobody else wrote to the file, and the last receipt is all there is to look at. Else (it
was edited, copied, restored) the whole chain is verified once more. So with the folder of the receipt files, which is searched
for missing ones only when it changed. The note is a mere hint: losing it costs that time.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.receipts import seal_problem
from lightning_muter.errors import CorruptFileError
from lightning_muter.storage.atomic import STAGE, beside
from lightning_muter.storage.container import parse_json
from lightning_muter.storage.fingerprint import DigestKey
from lightning_muter.storage.signing import PublicKey


def check_ledger(places: Places, ledger: Ledger, key: DigestKey | None, trusted: list[PublicKey] | None = None) -> None:
    """Insist that the ledger is what the key's owner wrote.

    Args:
        key: the secret key; without it signatures alone are checked, against the `trusted` public keys.

    Raises:
        CorruptFileError: an entry was changed, forged or taken out.
    """
    if ledger.verified_with is not None or len(ledger) == 0:
        return  # by this process, which has the lock
    recalled, now = _recall(places, key) if key is not None else None, _note(places, ledger.head())
    if (
        key is not None
        and recalled is not None
        and recalled["ledger"] == now["ledger"]
        and recalled["head"] == now["head"]
    ):
        if recalled["receipts"] == now["receipts"]:
            ledger.complete_up_to = len(ledger)
        last = ledger.last()
        problem = seal_problem(last, key, [key.public_key]) if last is not None else None
        problems = [] if problem is None else [f"receipt {len(ledger)}: {problem}"]
    else:
        problems = ledger.verify(key, trusted or ())
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CorruptFileError(
            f"{places.ledger}: {problems[0]}{more}. Nothing was changed. `muter audit --verify` lists all; restore the "
            "ledger from a backup."
        )
    ledger.verified_with = key


def remember(places: Places, head: str, key: DigestKey) -> None:
    """Note that the ledger, now closed, was verified up to this head; errors are of no account."""
    note = _note(places, head)
    content = json.dumps({**note, "seal": key.seal(_text(note))}).encode()
    stage = beside(places.verified, STAGE)
    with contextlib.suppress(OSError):
        try:
            stage.write_bytes(content)
            os.replace(stage, places.verified)
        finally:
            stage.unlink(missing_ok=True)


def _recall(places: Places, key: DigestKey) -> dict[str, Any] | None:
    try:
        with open(places.verified, "rb") as file:
            note = parse_json(file.read(1 << 16))
    except (OSError, CorruptFileError):
        return None
    seal = note.pop("seal", None)
    return note if seal == key.seal(_text(note)) else None  # sealed: it has the entries that we gave it


def _note(places: Places, head: str) -> dict[str, Any]:
    return {"head": head, "ledger": _stamp(places.ledger), "receipts": _stamp(places.receipts)}


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _text(note: dict[str, Any]) -> bytes:
    return b"verified ledger\n" + json.dumps(note, sort_keys=True).encode()
