"""One request = one transaction over checkpoint, snapshot and ledger, also when the process dies at any instant.

The order of a request, under an exclusive lock:

    pending   a small file says which request is under way and how its new files are called
    writing   checkpoint and snapshot are written beside the old ones and made durable
    checking  the new files are read back and must agree
    entering  the ledger takes the request in: from here on it counts
    switching the new files take the places of the old ones (an atomic rename each)
    closing   receipt files; the ledger notes that the files are in place; the pending file goes

:func:`exclusive` finishes or undoes, before anything else, what a dead process left: undone if the ledger does not hold
the request, finished if it does. An exception before the ledger has it undoes everything at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_muter.deletion.files import Places, pending_request, write_receipts
from lightning_muter.deletion.ledger import Ledger, Switch
from lightning_muter.deletion.witness import tell_witness
from lightning_muter.errors import ArgumentError, CorruptFileError, MuterError, RequestError
from lightning_muter.storage import atomic as files
from lightning_muter.storage.atomic import Writer, file_sha256, fsync_folder, recover_folder, try_lock, write_new
from lightning_muter.storage.fingerprint import DigestKey

STAGES = ("pending", "writing", "checking", "entering", "switching", "closing")
Say = Callable[[str], None]


@contextlib.contextmanager
def exclusive(places: Places, *, wait: float = 0.0, say: Say = print) -> Iterator[None]:
    """Hold the model's lock, after recovering what a dead process left.

    Args:
        wait: seconds to wait for another process before giving up.
        say: told, in one line each, what was recovered.

    Raises:
        RequestError: another process holds the lock, or the folder cannot be written to.
    """
    try:
        descriptor = os.open(places.lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise RequestError(
            f"{places.folder}: cannot be written to ({error.strerror}); nothing was changed. Make it writable, or copy "
            f"the files of {places.stem} elsewhere."
        ) from error
    try:
        deadline = time.monotonic() + wait
        while not try_lock(descriptor):
            if time.monotonic() >= deadline:
                owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
                raise RequestError(
                    f"{places.checkpoint}: another process ({owner or 'unknown'}) is working on it; nothing was "
                    "changed. Try again when it is done, or pass --wait with a number of seconds."
                )
            time.sleep(0.05)
        with contextlib.suppress(OSError):  # only for the message above
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()}\n".encode(), 0)
        for line in recover(places):
            say(line)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def recover(places: Places) -> list[str]:
    """Finish or undo what a dead process left; the caller holds the lock. Returns one line per action."""
    said = recover_folder(places.folder)
    pending = pending_request(places)
    if Ledger.discard_unborn(places.ledger):
        said.append("a process died while it began the ledger: removed, nothing had been entered")
    if places.ledger.exists():
        with Ledger.open(places.ledger) as ledger:
            if unfinished := ledger.unfinished():
                fsync_folder(places.folder)  # that it counts must be on the disk before anything is done about it
            for receipt, switches in unfinished:
                _switch(places, ledger, receipt, switches)
                said.append(
                    f"request {receipt['id']!r} was interrupted after the ledger had taken it: finished now, it counts"
                )
                pending = None if pending == receipt["id"] else pending
            if pending is not None and ledger.find(pending) is not None:
                pending = None  # all done but for the pending file itself
        # Opening has rolled back what was to be; a journal that is still there was cut short and means nothing.
        Path(f"{places.ledger}-journal").unlink(missing_ok=True)
    for stage in _stages(places):
        stage.unlink(missing_ok=True)
    if pending is not None:
        said.append(f"request {pending!r} was interrupted before the ledger had taken it: undone, ask for it again")
    if places.pending.exists():
        places.pending.unlink()
        fsync_folder(places.folder)
    return said


def commit_request(
    places: Places,
    ledger: Ledger,
    content: Mapping[str, Any],
    writers: Mapping[Path, Writer],
    *,
    asked: str,
    key: DigestKey,
    check: Callable[[Mapping[Path, Path]], None] | None = None,
    stage: Say = lambda name: None,
) -> dict[str, Any]:
    """Carry a request through the stages above; the caller is inside :func:`exclusive`. Returns the receipt.

    Args:
        content: the receipt's content; the `sha256` of its `checkpoint` and `snapshot` are filled in here.
        writers: how the new checkpoint, snapshot and key are written, by their final paths.
        asked: digest of what was asked for.
        key: seals the receipt.
        check: gets the new files by final path and raises unless they are sound.
        stage: told the name of each stage as it begins.

    Raises:
        Exception: whatever failed; if it was before the ledger took the request in, everything is as it was.
        RequestError: the ledger took it in but the files could not be switched; the next command will.
    """
    if set(writers) - set(_switched_files(places)):
        raise ArgumentError("writers", [str(path) for path in writers], "checkpoint, snapshot and key")
    stages = {path: files.beside(path, files.STAGE) for path in writers}
    try:
        if ledger.find(content["id"]) is not None:
            raise RequestError(f"request {content['id']!r} is in {places.ledger} already.")
        switches, content = _prepared(places, content, writers, stages, check, stage)
        stage("entering")
        receipt = _entered(places, ledger, content, asked, switches, key)
    except _UndecidedError:
        raise
    except BaseException:
        _undo(places, stages.values())
        raise
    stage("switching")
    _switched(places, ledger, receipt, switches, stage)
    if problem := tell_witness(receipt["sha256"]):
        print(f"note: {problem}")
    return receipt


class _UndecidedError(RequestError):
    """Nobody knows yet whether the ledger took a request in."""


def _prepared(
    places: Places,
    content: Mapping[str, Any],
    writers: Mapping[Path, Writer],
    stages: Mapping[Path, Path],
    check: Callable[[Mapping[Path, Path]], None] | None,
    stage: Say,
) -> tuple[list[Switch], dict[str, Any]]:
    """The new files, written beside the old ones and checked, and the receipt's content with their hashes."""
    stage("pending")
    text = json.dumps({"id": content["id"], "kind": content["kind"], "pid": os.getpid(), "time": content["time"]})
    files.atomic_write(places.pending, lambda file: file.write(text.encode()))
    stage("writing")
    switches = []
    for path, writer in writers.items():
        written = write_new(stages[path], writer, like=path, mode=0o600 if path == places.key else 0o666)
        switches.append(Switch(path.name, stages[path].name, written.sha256))
    fsync_folder(places.folder)
    stage("checking")
    if check is not None:
        check(stages)
    hashes = {switch.target: switch.sha256 for switch in switches}
    named = {
        name: {**content[name], "name": path.name, "sha256": hashes.get(path.name) or _sha256(path)}
        for name, path in (("checkpoint", places.checkpoint), ("snapshot", places.snapshot))
    }
    return switches, {**content, **named}


def _entered(
    places: Places, ledger: Ledger, content: Mapping[str, Any], asked: str, switches: list[Switch], key: DigestKey
) -> dict[str, Any]:
    """The receipt, once the ledger has it."""
    try:
        return ledger.commit(content, asked, switches, key)
    except BaseException as error:
        # The disk may have it all the same; only a ledger that was read from it anew knows.
        try:
            ledger.reopen()
            found = ledger.find(content["id"])
        except (MuterError, OSError):
            raise _UndecidedError(
                f"request {content['id']!r}: {places.ledger} cannot be used any more ({error}), so it is not known "
                f"whether it counts. The next `muter` command on {places.checkpoint} finds out and acts on it."
            ) from error
        if found is None:
            raise
        return found


def _switched(places: Places, ledger: Ledger, receipt: Mapping[str, Any], switches: list[Switch], stage: Say) -> None:
    """The new files in place of the old ones."""
    try:
        _switch(places, ledger, receipt, switches, stage)
        _remove_pending(places)
    except BaseException as error:
        # It counts already, so going forward is the only way: once more now, else the next command does it.
        try:
            _switch(places, ledger, receipt, switches)
            _remove_pending(places)
        except (MuterError, OSError):
            raise RequestError(
                f"request {receipt['id']!r} is in the ledger and counts, but its files could not be put in place "
                f"({error}). The next `muter` command on {places.checkpoint} finishes it."
            ) from error
        if not isinstance(error, (MuterError, OSError)):
            raise  # an interrupt: the request is complete, the wish to stop is respected


def _switch(
    places: Places, ledger: Ledger, receipt: Mapping[str, Any], switches: list[Switch], stage: Say = lambda name: None
) -> None:
    """Move a committed request's files into place and close it; may be called again after any failure."""
    advice = f"Restore {places.checkpoint.name}, {places.snapshot.name} and {places.ledger.name} from one backup."
    moves = []
    for switch in switches:  # all are looked at before any is moved
        target, source = places.folder / switch.target, places.folder / switch.stage
        if target not in _switched_files(places) or not files.is_stage(source.name, target.name):
            raise CorruptFileError(
                f"{places.ledger}: request {receipt['id']!r} names files that are not its own. {advice}"
            )
        present = source if source.exists() else target
        if (found := _sha256(present)) != switch.sha256:
            raise CorruptFileError(
                f"{present}: SHA-256 {found or 'none, there is no file'}, but request {receipt['id']!r} wrote "
                f"{switch.sha256}: damaged or altered. {advice}"
            )
        moves.append((present, target))
    for source, target in moves:
        if source != target:
            os.replace(source, target)
    fsync_folder(places.folder)
    stage("closing")
    write_receipts(places, ledger)
    ledger.finish(receipt["number"])


def _switched_files(places: Places) -> tuple[Path, ...]:
    return places.checkpoint, places.snapshot, places.key


def _undo(places: Places, stages: Iterable[Path]) -> None:
    """Remove what was written for a request that the ledger does not hold; what resists is left to recovery."""
    for path in (*stages, places.pending):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        fsync_folder(places.folder)


def _remove_pending(places: Places) -> None:
    places.pending.unlink(missing_ok=True)
    fsync_folder(places.folder)


def _stages(places: Places) -> list[Path]:
    """What a dead process left beside this model's files; a killed write of a key leaves its secret."""
    own = (places.checkpoint, places.snapshot, places.ledger, places.key, places.receipts, places.verified)
    return files.half_written(places.folder, [path.name for path in own], files.STAGE, files.TEMP)


def _sha256(path: Path) -> str:
    return file_sha256(path) if path.exists() else ""
