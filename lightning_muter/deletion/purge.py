"""`muter purge`: list, and on request delete, what provably still holds the influence of forgotten samples.

The ledger takes in what is going to be deleted before anything is, and what was deleted afterwards; a purge that died in
between is closed by the next one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_muter.deletion.evidence import Finding, find
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.ledger_access import check_agreement, open_ledger
from lightning_muter.deletion.receipts import content_of_files
from lightning_muter.deletion.request_flow import known_key
from lightning_muter.deletion.requests import asked_digest, new_request_id
from lightning_muter.deletion.transactions import commit_request, exclusive
from lightning_muter.errors import RequestError
from lightning_muter.storage.atomic import file_sha256, fsync_folder
from lightning_muter.storage.fingerprint import DigestKey


def purge_command(
    ckpt_path: str, *, yes: bool, roots: Sequence[str] = (), also: Sequence[str] = (), wait: float = 0.0
) -> int:
    """List what holds removed influence; with `yes` delete what can be deleted and enter that in the ledger."""
    places = Places.of(ckpt_path)
    folders = [Path(root) for root in roots]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise RequestError(f"--root: no such folder: {', '.join(missing)}")
    with exclusive(places, wait=wait, say=lambda line: print(f"recovery: {line}")), open_ledger(places) as ledger:
        check_agreement(places, ledger)
        found = find(places, ledger, folders, also)
        deletable = [finding for finding in found if finding.delete]
        for finding in found:
            links = f" (and {', '.join(map(str, finding.links))})" if finding.links else ""
            print(f"{'delete' if finding.delete else 'look at'}: {finding.path}{links}: {finding.reason}")
        if not found:
            print("nothing found that holds removed influence")
        if yes:
            _close_interrupted(places, ledger)
        if not yes or not deletable:
            if deletable:
                print(f"{len(deletable)} files would be deleted; run again with --yes to do it")
            return 0
        receipt = _carry_out(places, ledger, deletable)
        print(f"{len(deletable)} files deleted; receipt {receipt['number']}. Backups and the disk's free space remain.")
    return 0


def _carry_out(places: Places, ledger: Ledger, deletable: list[Finding]) -> dict[str, Any]:
    """Enter the intent, delete, enter what was deleted; returns the last receipt."""
    key = known_key(places, ledger)
    intended = [_entry(places, finding) for finding in deletable]
    intent = _enter(places, ledger, key, {"intended": intended})
    for finding in deletable:
        for path in (*finding.links, finding.path):
            path.unlink(missing_ok=True)
            fsync_folder(path.parent)
    return _enter(places, ledger, key, {"deleted": intended, "intent": intent["number"]})


def _close_interrupted(places: Places, ledger: Ledger) -> None:
    """Enter the outcome of a purge that died between its two receipts: what it wanted to delete and is gone."""
    receipts = [receipt for receipt in ledger.receipts() if receipt["kind"] == "purge"]
    closed = {receipt["metrics"].get("intent") for receipt in receipts}
    for receipt in receipts:
        intended = receipt["metrics"].get("intended")
        if intended is not None and receipt["number"] not in closed:
            gone = [entry for entry in intended if not os.path.lexists(places.folder / entry["name"])]
            outcome = {"deleted": gone, "intent": receipt["number"]}
            _enter(places, ledger, known_key(places, ledger), outcome)
            print(f"purge {receipt['id']!r} was interrupted; {len(gone)} of its {len(intended)} files are gone")


def _entry(places: Places, finding: Finding) -> dict[str, Any]:
    """A file as the ledger names it: relative to the model's folder."""
    entry: dict[str, Any] = {
        "name": os.path.relpath(finding.path, places.folder.resolve()),
        "sha256": file_sha256(finding.path),
        "reason": finding.reason,
    }
    if others := finding.path.stat().st_nlink - 1:
        entry["other_names"] = others  # hard links: the content stays under them
        print(f"note: {finding.path} has {others} more names (hard links), which keep its content: look for them")
    return entry


def _enter(places: Places, ledger: Ledger, key: DigestKey, metrics: dict[str, Any]) -> dict[str, Any]:
    last = ledger.last()
    assert last is not None  # something was forgotten
    content = content_of_files("purge", new_request_id("purge"), last, metrics)
    return commit_request(places, ledger, content, {}, asked=asked_digest("purge", metrics), key=key)
