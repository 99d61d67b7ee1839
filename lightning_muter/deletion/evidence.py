"""What lies on the disk and holds removed influence, as far as files prove it.

A file is deleted only where its own content proves that it is an earlier state of this very model: a checkpoint whose
weights have a fingerprint that the ledger knows from before a removal, or a file under this model's key that does not
list what was forgotten. Everything else that may hold influence is named, and left alone. So are, whatever they hold, the
current files of every other model, a fork or an original included.
"""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_muter.deletion.authority import older, record_of
from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint, remembers
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.ledger_access import weights_before_removals
from lightning_muter.deletion.request_flow import load_snapshot
from lightning_muter.errors import ArgumentError, MuterError
from lightning_muter.forgotten.rows import Forgotten

_LEFTOVER = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.muter-(?P<kind>new|old|stage|tmp)")
_LEFTOVER_AGE = 3600.0  # seconds; a younger one may belong to a process at work
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".bak", ".old", ".orig", "~")


@dataclass(frozen=True)
class Finding:
    """A file that holds, or may hold, removed influence; `delete` says whether `--yes` deletes it.

    Attributes:
        path: the file itself; links: other names that lead to it, which go with it.
    """

    path: Path
    reason: str
    delete: bool
    links: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Lineage:
    """What tells whether a file is an earlier state of this model.

    Attributes:
        before: fingerprints of weights that a later removal replaced, with that request's id; after: of all since.
        shapes: of the weights; record: what was forgotten; key_ids: of the keys that signed the ledger.
    """

    places: Places
    before: dict[str, str]
    after: set[str]
    shapes: dict[str, tuple[int, ...]]
    record: Forgotten
    key_ids: set[str]

    @classmethod
    def of(cls, places: Places, ledger: Ledger) -> Lineage | None:
        """None where nothing was forgotten."""
        receipts = ledger.receipts()
        if not any(receipt["forgotten"] for receipt in receipts):
            return None
        current, before = load_checkpoint(places.checkpoint), weights_before_removals(ledger)
        fingerprints = {r["checkpoint"][name] for r in receipts for name in ("fingerprint_before", "fingerprint_after")}
        after = {checkpoint_fingerprint(current), *(fingerprints - set(before))}
        shapes = {name: tuple(tensor.shape) for name, tensor in current["state_dict"].items()}
        record, _ = record_of(places, ledger)
        return cls(places, before, after, shapes, record, {receipt["key_id"] for receipt in receipts})

    def judge(self, path: Path, name: str) -> Finding | None:
        """What the content of a file of this name proves."""
        if path.is_dir():
            return Finding(path, "a folder of weights, which proves nothing of itself", False)
        if name.endswith(".ckpt"):
            return self._checkpoint(path)
        if name.endswith(".muter.snapshot"):
            return self._snapshot(path)
        if name.endswith(_SUFFIXES):
            return Finding(path, "may hold weights or samples; its name and content prove nothing of itself", False)
        return None

    def _checkpoint(self, path: Path) -> Finding | None:
        try:
            checkpoint = load_checkpoint(path)
        except MuterError:
            return Finding(path, "a checkpoint that cannot be read safely", False)
        fingerprint = checkpoint_fingerprint(checkpoint)
        if fingerprint in self.before:
            return Finding(path, f"weights from before request {self.before[fingerprint]!r}", True)
        extra = remembers(checkpoint)
        if fingerprint not in self.after and older(checkpoint, self.record):
            return Finding(path, "weights from before a removal, by the key and the list in it", True)
        if fingerprint in self.after:
            return Finding(path, f"weights after the removals, but with {', '.join(extra)}", True) if extra else None
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        if shapes != self.shapes:
            return None  # another model
        return Finding(path, "weights of the same form as this model's; nothing proves whose, or of which rows", False)

    def _snapshot(self, path: Path) -> Finding | None:
        try:
            snapshot = load_snapshot(path)
        except MuterError:
            return Finding(path, "a snapshot that cannot be read", False)
        if snapshot.key_id not in self.key_ids or Forgotten.of(snapshot).covers(self.record):
            return None
        return Finding(path, "an earlier snapshot: it still counts rows that were forgotten", True)

    def owns(self, path: Path) -> bool:
        """Whether this is one of the model's own files as they are now."""
        own = self.places
        return any(_same(path, mine) for mine in (own.checkpoint, own.snapshot, own.ledger, own.key, own.lock))


def find(places: Places, ledger: Ledger, roots: Sequence[Path] = (), also: Sequence[str] = ()) -> list[Finding]:
    """Everything below the checkpoint's folder and `roots` that holds removed influence, as far as files can tell."""
    lineage = Lineage.of(places, ledger)
    found = [finding for path in _walk([places.folder, *roots]) if (finding := _leftover(places, path)) is not None]
    if lineage is None:
        return found
    for path, names in _files(_walk([places.folder, *roots])).items():
        finding = None if lineage.owns(path) else _first(lineage.judge(path, name.name) for name in (path, *names))
        if finding is None:
            continue
        owner = _first(other_model(name, places) for name in (path, *names))
        if owner is not None and finding.delete:
            told = (
                f"{finding.reason}; but it is a current file of {owner.stem}: forget there too, or delete it yourself"
            )
            finding = Finding(path, told, False)
        found.append(Finding(path, finding.reason, finding.delete, tuple(names)))
    found += _named(lineage, also)
    if extra := remembers(load_checkpoint(places.checkpoint)):
        found.append(Finding(places.checkpoint, f"holds more than weights ({', '.join(extra)})", False))
    receipts = ledger.receipts()
    last_removal = max(r["number"] for r in receipts if r["forgotten"])
    if last_removal > max((r["number"] for r in receipts if r["kind"] in ("snapshot", "refresh")), default=0):
        reason = "its reference point is from before the last removal: run `muter refresh`"
        found.append(Finding(places.snapshot, reason, False))
    return found


def other_model(path: Path, places: Places) -> Places | None:
    """The model, another one than `places`, whose current file this is: one with a snapshot or ledger of its own."""
    stem = path.name.removesuffix(".ckpt").removesuffix(".muter")
    stem = re.sub(r"\.muter\.(snapshot|ledger|key)$", "", stem)
    theirs = Places(path.parent, stem)
    if _same(theirs.checkpoint, places.checkpoint):
        return None
    whole = theirs.checkpoint.exists() and theirs.snapshot.exists()
    return theirs if stem != path.name and (whole or theirs.ledger.exists()) else None


def _named(lineage: Lineage, also: Sequence[str]) -> Iterator[Finding]:
    """The files that the caller names; never a model's current ones."""
    for pattern in also:
        for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
            real = path.resolve()
            owner = _first(other_model(name, lineage.places) for name in (path, real))
            if lineage.owns(real) or owner is not None:
                raise ArgumentError(
                    "--also", pattern, "files other than those of a model", f"{path} is a current file of one."
                )
            if path.is_file():
                yield Finding(real, "named with --also", True, () if real == path.absolute() else (path,))


def _leftover(places: Places, path: Path) -> Finding | None:
    """What a killed write left: secrets and statistics under hidden names."""
    found = _LEFTOVER.fullmatch(path.name)
    if found is None:
        return None
    own = _same(path.parent, places.folder) and found["target"].startswith(f"{places.stem}.muter.")
    secret = found["target"].endswith(".muter.key")
    old = time.time() - path.lstat().st_mtime > _LEFTOVER_AGE
    what = "left by an interrupted write" + (" of a key" if secret else "")
    # No process works on this model's own files now (the caller has its lock), and a key is made in one instant.
    return Finding(path, what if old or own else f"{what}, or being written now", old or (own and secret))


def _walk(folders: Iterable[Path]) -> list[Path]:
    """All files below the folders, and folders named like a checkpoint, each once; links to folders are not followed."""
    found: dict[str, Path] = {}
    for folder in folders:
        for parent, inner, names in os.walk(folder):
            sharded = [name for name in inner if name.endswith(".ckpt")]
            linked = [name for name in inner if Path(parent, name).is_symlink()]
            for name in [*names, *sharded, *linked]:
                path = Path(parent, name)
                found.setdefault(os.path.abspath(path), path)
    return [found[name] for name in sorted(found)]


def _files(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    """The files behind these names, links resolved, and the links to each; dangling links are left out."""
    behind: dict[Path, list[Path]] = {}
    for path in paths:
        real = path.resolve()
        if real.exists() and not _LEFTOVER.fullmatch(path.name):
            behind.setdefault(real, []).append(path)
    found = {}
    for real, names in behind.items():
        shown = next((name for name in names if not name.is_symlink()), real)
        found[shown] = [name for name in names if name.is_symlink()]
    return found


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)
