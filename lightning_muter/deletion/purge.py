"""`muter purge`: find, and on request delete, what still holds the influence of forgotten samples."""

from __future__ import annotations

import calendar
import glob
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint, remembers
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.ledger_access import check_agreement, open_ledger
from lightning_muter.deletion.request_flow import known_key, load_snapshot
from lightning_muter.deletion.requests import asked_digest, new_request_id
from lightning_muter.deletion.transactions import commit_request, exclusive
from lightning_muter.errors import CorruptFileError, MuterError, RequestError
from lightning_muter.storage.atomic import file_sha256, fsync_folder
from lightning_muter.storage.fingerprint import versions

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.muter-(new|old|stage)")
_LEFTOVER_AGE = 3600.0  # seconds; a younger one may belong to a process at work


@dataclass(frozen=True)
class Finding:
    """A file that holds, or may hold, removed influence; `delete` says whether `--yes` deletes it."""

    path: Path
    reason: str
    delete: bool


def find(places: Places, ledger: Ledger, roots: Sequence[Path] = (), also: Sequence[str] = ()) -> list[Finding]:
    """Everything below the checkpoint's folder and `roots` that holds removed influence, as far as files can tell."""
    removals = [receipt for receipt in ledger.receipts() if receipt["forgotten"]]
    if not removals:
        return []
    current = load_checkpoint(places.checkpoint)
    shapes = _shapes(current)
    history = {
        receipt["checkpoint"]["fingerprint_before"]: receipt["id"]
        for receipt in reversed(ledger.receipts())
        if receipt["number"] <= removals[-1]["number"]
    }
    removed_at = float(calendar.timegm(time.strptime(removals[-1]["time"], "%Y-%m-%dT%H:%M:%SZ")))
    forgotten = set(ledger.forgotten())
    known = checkpoint_fingerprint(current)
    clean = {known} | {
        receipt["checkpoint"]["fingerprint_after"]
        for receipt in ledger.receipts()
        if receipt["number"] >= removals[-1]["number"]
    }
    found: list[Finding] = []
    for path in _walk([places.folder, *roots]):
        if path.name.endswith(".ckpt") and not _same(path, places.checkpoint):
            finding = _checkpoint(path, shapes, clean, history, removed_at)
        elif path.name.endswith(".muter.snapshot") and not _same(path, places.snapshot):
            finding = _snapshot(path, places, forgotten)
        elif _LEFTOVER.fullmatch(path.name):
            old = time.time() - path.lstat().st_mtime > _LEFTOVER_AGE
            finding = Finding(path, f"left by an interrupted write{'' if old else ' (or being written now)'}", old)
        else:
            finding = None
        if finding is not None:
            found.append(finding)
    found += [
        Finding(Path(name), "named with --also", True)
        for pattern in also
        for name in sorted(glob.glob(pattern, recursive=True))
        if Path(name).is_file()
    ]
    if extra := remembers(current):
        found.append(Finding(places.checkpoint, f"holds more than weights ({', '.join(extra)})", False))
    last_clean = max((r["number"] for r in ledger.receipts() if r["kind"] in ("snapshot", "refresh")), default=0)
    if removals[-1]["number"] > last_clean:
        reason = "its reference point is from before the last removal: run `muter refresh`"
        found.append(Finding(places.snapshot, reason, False))
    return found


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
            print(f"{'delete' if finding.delete else 'look at'}: {finding.path}: {finding.reason}")
        if not found:
            print("nothing found that holds removed influence")
        if not yes or not deletable:
            if deletable:
                print(f"{len(deletable)} files would be deleted; run again with --yes to do it")
            return 0
        key = known_key(places, ledger)
        deleted = []
        for finding in deletable:
            digest = file_sha256(finding.path)
            finding.path.unlink()
            fsync_folder(finding.path.parent)
            deleted.append({"name": finding.path.name, "sha256": digest, "reason": finding.reason})
        receipt = commit_request(
            places, ledger, _content(ledger, deleted), {}, asked=asked_digest("purge", {"deleted": deleted}), key=key
        )
        print(f"{len(deleted)} files deleted; receipt {receipt['number']}. Backups and the disk's free space remain.")
    return 0


def _content(ledger: Ledger, deleted: list[dict[str, str]]) -> dict[str, Any]:
    last = ledger.last()
    assert last is not None  # something was forgotten
    fingerprint = last["checkpoint"]["fingerprint_after"]
    return {
        "id": new_request_id("purge"),
        "kind": "purge",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "method": "purge",
        "scope": last["scope"],
        "forgotten": [],
        "users": [],
        "n_retained": last["n_retained"],
        "checkpoint": {"fingerprint_before": fingerprint, "fingerprint_after": fingerprint},
        "snapshot": {},
        "metrics": {"deleted": deleted},
        "warnings": [],
        "versions": versions(),
    }


def _walk(folders: Iterable[Path]) -> list[Path]:
    """All files below the folders, each once; links to folders are not followed."""
    found: dict[str, Path] = {}
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                found.setdefault(os.path.abspath(path), path)
    return [found[name] for name in sorted(found)]


def _same(a: Path, b: Path) -> bool:
    return os.path.abspath(a) == os.path.abspath(b)


def _shapes(checkpoint: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}


def _checkpoint(
    path: Path, shapes: dict[str, Any], clean: set[str], history: dict[str, str], removed_at: float
) -> Finding | None:
    try:
        checkpoint = load_checkpoint(path)
    except MuterError:
        return Finding(path, "a checkpoint that cannot be read safely", False)
    if _shapes(checkpoint) != shapes:
        return None  # another model
    fingerprint = checkpoint_fingerprint(checkpoint)
    if fingerprint in clean:
        extra = remembers(checkpoint)
        return Finding(path, f"weights after the removals, but with {', '.join(extra)}", True) if extra else None
    if fingerprint in history:
        return Finding(path, f"weights from before request {history[fingerprint]!r}", True)
    if path.lstat().st_mtime < removed_at:
        return Finding(path, "weights of the same model, older than the last removal", True)
    return Finding(path, "weights of the same model, newer than the last removal: of retained rows only?", False)


def _snapshot(path: Path, places: Places, forgotten: set[int]) -> Finding | None:
    try:
        snapshot, mine = load_snapshot(path), load_snapshot(places.snapshot)
    except CorruptFileError:
        return Finding(path, "a snapshot that cannot be read", False)
    if snapshot.n_total != mine.n_total or forgotten <= {int(index) for index in snapshot.forgotten}:
        return None
    return Finding(path, "an earlier snapshot: it still counts rows that were forgotten", True)
