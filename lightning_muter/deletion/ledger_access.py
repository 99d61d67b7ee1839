"""The ledger of a model: opened to write or to look, checked against the files, copied to go on elsewhere."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_muter.deletion.files import Places, pending_request
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.verified import remember
from lightning_muter.errors import MismatchError, MuterError, RequestError
from lightning_muter.storage.atomic import STAGE, beside, file_sha256, fsync_folder, write_new


@contextlib.contextmanager
def open_ledger(places: Places) -> Iterator[Ledger]:
    """The model's ledger; it goes again unless a request is entered in it."""
    empty, key = False, None
    try:
        with Ledger.open(places.ledger, create=True) as ledger:
            try:
                yield ledger
            finally:
                with contextlib.suppress(MuterError):  # on a disk that fails the request's own error says more
                    empty = len(ledger) == 0
                    head, key = ledger.head(), ledger.verified_with if ledger.changed else None
        if key is not None:
            remember(places, head, key)
    finally:
        if empty:
            Ledger.remove(places.ledger)


@contextlib.contextmanager
def reading(places: Places) -> Iterator[Ledger | None]:
    """The ledger (if there is one) to look at, without lock or any writing.

    Raises:
        RequestError: a request is under way, or was interrupted and waits to be finished or undone.
    """
    waiting = pending_request(places)
    with contextlib.ExitStack() as stack:
        begun = places.ledger.exists() and not Ledger.unborn(places.ledger)
        ledger = stack.enter_context(Ledger.open(places.ledger, readonly=True)) if begun else None
        if ledger is not None and (unfinished := ledger.unfinished()):
            waiting = unfinished[0][0]["id"]
        if waiting is not None:
            raise RequestError(
                f"{places.checkpoint}: request {waiting!r} is under way, or was interrupted. The next `muter unlearn`, "
                "`refresh` or `purge` (even one without --yes) finishes or undoes it."
            )
        yield ledger


@contextlib.contextmanager
def fork(source: Places, target: Places) -> Iterator[None]:
    """Begin `target` as a copy of `source`: checkpoint, snapshot, key and ledger, so that a request can go on there.

    The caller holds both locks. When the block fails and nothing was entered, the copies go again.

    Raises:
        RequestError: there is a model under the target's name already.
    """
    copies = [(source.snapshot, target.snapshot), (source.key, target.key), (source.checkpoint, target.checkpoint)]
    if any(new.exists() and file_sha256(new) != file_sha256(old) for old, new in copies) or (
        target.ledger.exists() and _last(target) != _last(source)
    ):
        raise RequestError(f"{target.checkpoint}: there is a model under this name already; choose another for --out.")
    # What exists now was left by a process that died before it had entered anything: the same copies are made again.
    entered, before = False, _last(source)
    try:
        if source.ledger.exists():
            half = beside(target.ledger, STAGE)
            with Ledger.open(source.ledger) as ledger:
                ledger.copy_to(half)
            os.replace(half, target.ledger)
        for old, new in copies:
            half = beside(new, STAGE)
            with open(old, "rb") as file:  # never readable for others than the old one, which matters for the key
                write_new(half, functools.partial(shutil.copyfileobj, file), like=old)
            os.replace(half, new)
        fsync_folder(target.folder)
        try:
            yield
        finally:
            entered = _last(target) != before
    finally:
        if not entered:
            for path in (*(new for _, new in copies), target.ledger):
                path.unlink(missing_ok=True)


def _last(places: Places) -> dict[str, Any] | None:
    if not places.ledger.exists():
        return None
    with Ledger.open(places.ledger) as ledger:
        return ledger.last()


def weights_before_removals(ledger: Ledger) -> dict[str, str]:
    """Fingerprints of weights that a later removal replaced, and the id of that request; those current since left out."""
    receipts = ledger.receipts()
    removals = [receipt for receipt in receipts if receipt["forgotten"]]
    before: dict[str, str] = {}
    since = set()
    for receipt in receipts:
        old, new = (receipt["checkpoint"][name] for name in ("fingerprint_before", "fingerprint_after"))
        for fingerprint, number in ((old, receipt["number"]), (new, receipt["number"] + 1)):
            removal = next((r["id"] for r in removals if r["number"] >= number), None)
            if removal is None:
                since.add(fingerprint)
            else:
                before.setdefault(fingerprint, removal)
    return {fingerprint: by for fingerprint, by in before.items() if fingerprint not in since}


@contextlib.contextmanager
def ledgers_near(checkpoint: Path) -> Iterator[list[Ledger]]:
    """The ledgers of all models in a checkpoint's folder, in the one above, and where a link leads, to look at: a copy under
    another name has none of its own.

    Raises:
        MuterError: one of them cannot be read, so that it cannot be told what it knows of the checkpoint.
    """
    homes = [path.parent.resolve() for path in (checkpoint, checkpoint.resolve())]
    folders = dict.fromkeys(folder for home in homes for folder in (home, home.parent))
    paths = [path for folder in folders for path in sorted(folder.glob("*.muter.ledger")) if not Ledger.unborn(path)]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Ledger.open(path, readonly=True)) for path in paths]


def check_agreement(places: Places, ledger: Ledger | None) -> None:
    """Insist that checkpoint and snapshot are the files that the ledger's last receipt names.

    Raises:
        MismatchError: one of them is missing or another one; both sides are printed.
    """
    last = ledger.last() if ledger is not None else None
    for name, path in (("checkpoint", places.checkpoint), ("snapshot", places.snapshot)):
        if not path.exists():
            raise MismatchError(f"{path}: there is no such file. `muter snapshot --ckpt_path …` makes it.")
        if last is not None and (found := file_sha256(path)) != last[name]["sha256"]:
            raise MismatchError(
                f"{path}: SHA-256 {found}, but receipt {last['number']} ({last['time']}) left "
                f"{last[name]['sha256']}. The file was changed or replaced since; restore it, or, if it was trained "
                "further on the retained rows, take a new snapshot of it with `muter snapshot`."
            )
