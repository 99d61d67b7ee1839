"""Durable file changes: one file or several are replaced entirely or not at all, also when the process dies in between.

A single file: write a temporary file in the same folder, `fsync` it, `os.replace` it over the target, `fsync` the
folder. Several files: a small undo journal in the folder names what is being replaced, so that a later
:func:`recover_folder` puts the old files back after a crash; an exception in between puts them back at once.

Covered: exceptions, full disks, killed processes. Not covered: hardware that acknowledges an `fsync` it did not do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from lightning_muter.errors import ArgumentError

try:  # POSIX; elsewhere files are still replaced atomically, but a live writer cannot be told from a dead one
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

Writer: TypeAlias = "Callable[[BinaryIO], object]"

STAGE = ".muter-stage"  # new files of a request that the ledger has still to take in
TEMP = ".muter-tmp"  # files that the first writer makes, keys for example
_NEW, _OLD, _JOURNAL = ".muter-new", ".muter-old", ".muter-journal"
# The first byte of a journal, rewritten in place (one byte is atomic), says what a recovery has to do.
_WRITING, _SWITCHING, _COMMITTED = b"W", b"S", b"C"
_OWN_NAME = re.compile(r"\.[^/\0]+\.[0-9a-f]{16}\.muter-(new|old)")


@dataclass(frozen=True)
class Written:
    """What was written: the target's path, the SHA-256 of its bytes and their number."""

    path: Path
    sha256: str
    size: int


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return _stream_sha256(stream)


def _stream_sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Make the bytes of a file durable that others than we wrote."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames and deletions in `folder` durable (a no-op where folders cannot be opened)."""
    if not hasattr(os, "O_DIRECTORY"):  # pragma: no cover
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Take an exclusive lock on an open file without waiting; False when another open file description holds it."""
    if fcntl is None:  # pragma: no cover
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def real_target(path: str | os.PathLike[str]) -> Path:
    """The file that a write to `path` changes: links are followed, so that a link stays a link."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ArgumentError("path", str(path), "a file in an existing folder", f"Create {target.parent} first.")
    if target.is_dir():
        raise ArgumentError("path", str(path), "a file, not a folder")
    return target


def beside(target: Path, suffix: str) -> Path:
    """A fresh hidden name in the target's folder."""
    return target.parent / f".{target.name[-150:]}.{secrets.token_hex(8)}{suffix}"


def is_stage(name: str, target: str, *endings: str) -> bool:
    """Whether this is a name that :func:`beside` gives to a file that becomes ``target`` (by default, a stage's)."""
    ending = "|".join(map(re.escape, endings or (STAGE,)))
    return re.fullmatch(rf"\.{re.escape(target[-150:])}\.[0-9a-f]{{16}}({ending})", name) is not None


def half_written(folder: Path, targets: Iterable[str], *endings: str) -> list[Path]:
    """What dead processes left of files in a folder that were to become these."""
    targets = list(targets)
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if any(is_stage(entry.name, t, *endings) for t in targets)]


def write_new(path: Path, writer: Writer, *, like: Path | None = None, mode: int = 0o666) -> Written:
    """Write and `fsync` the new file `path`; nothing is left of it when `writer` fails.

    It gets the permissions of `like` if that exists, else `mode` as far as the umask lets it. Its folder is not synced.
    Raises FileExistsError if there is one.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w+b") as stream:
            if like is not None and like.exists() and hasattr(os, "fchmod"):
                os.fchmod(stream.fileno(), like.stat().st_mode & 0o7777)
            writer(stream)
            stream.flush()
            os.fsync(stream.fileno())
            stream.seek(0)  # hash what really lies in the file, in whatever order it was written
            return Written(path, _stream_sha256(stream), os.fstat(stream.fileno()).st_size)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def create_once(path: Path, writer: Writer, *, mode: int = 0o666) -> None:
    """Write `path` unless somebody else was first; whoever sees it sees all of it, however many begin at once."""
    temp = beside(path, TEMP)
    write_new(temp, writer, mode=mode)
    try:
        os.link(temp, path)
    except FileExistsError:
        pass
    except FileNotFoundError:  # another process took it for a dead one's leftover: once more
        if not path.exists():
            create_once(path, writer, mode=mode)
    except OSError:  # no hard links here: the window between looking and renaming stays open
        if not path.exists():
            os.rename(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    fsync_folder(path.parent)


def atomic_write(path: str | os.PathLike[str], writer: Writer) -> Written:
    """Replace `path` by what `writer(file)` writes, or leave it as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = atomic_write(f"{folder}/a.txt", lambda file: file.write(b"new"))
    ...     written.size, written.path.read_bytes(), len(os.listdir(folder))
    (3, b'new', 1)
    """
    return next(iter(commit_files({path: writer}).values()))


def commit_files(writers: Mapping[str | os.PathLike[str], Writer]) -> dict[Path, Written]:
    """Replace files of one folder together: all of them, or none when anything fails.

    A process killed in between leaves a journal; :func:`recover_folder` then restores the old files. Returns what was
    written by (link-resolved) path. Raises whatever a writer or the file system raised, after everything was undone.
    """
    targets = {real_target(path): writer for path, writer in writers.items()}
    if len(targets) != len(writers) or len({target.parent for target in targets}) != 1:
        raise ArgumentError("writers", [str(path) for path in writers], "different files in one folder")
    folder = next(iter(targets)).parent
    entries = [
        _Entry(target.name, beside(target, _NEW).name, beside(target, _OLD).name if target.exists() else None)
        for target in targets
    ]
    journal = folder / f".{secrets.token_hex(8)}{_JOURNAL}"
    descriptor = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    committed = False
    try:
        with contextlib.suppress(OSError):  # file systems without locks: only a recovery at the same time would mind
            try_lock(descriptor)
        os.write(descriptor, _WRITING + json.dumps([vars(entry) for entry in entries]).encode())
        os.fsync(descriptor)
        fsync_folder(folder)
        result = {}
        for entry, (target, writer) in zip(entries, targets.items(), strict=True):
            written = write_new(folder / entry.new, writer, like=target)
            result[target] = Written(target, written.sha256, written.size)
            if entry.old is not None:
                _keep(target, folder / entry.old)
        fsync_folder(folder)
        _set_state(descriptor, _SWITCHING)
        for entry, target in zip(entries, targets, strict=True):
            os.replace(folder / entry.new, target)
        fsync_folder(folder)
        _set_state(descriptor, _COMMITTED)
        committed = True
    finally:
        # If this fails too, the journal stays and the next recovery does it.
        with contextlib.suppress(OSError):
            if not committed:
                _undo_commit(descriptor)
            _settle(journal, descriptor)
        with contextlib.suppress(OSError):
            os.close(descriptor)
    return result


def recover_folder(folder: str | os.PathLike[str]) -> list[str]:
    """Undo what dead processes left half done in `folder`; live ones are not disturbed. Returns a line per action."""
    said = []
    for journal in sorted(Path(folder).glob(f".*{_JOURNAL}")):
        try:
            descriptor = os.open(journal, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except OSError:  # finished by its own process meanwhile, or not ours to touch
            continue
        try:
            if try_lock(descriptor) and journal.exists():
                said.extend(_settle(journal, descriptor))
        finally:
            os.close(descriptor)
    return said


@dataclass(frozen=True)
class _Entry:
    """One file of a group: its name, that of its new content, that under which its old content is kept (if any)."""

    target: str
    new: str
    old: str | None

    def __post_init__(self) -> None:
        # Journals come from the disk: names of another form than we give are refused, so that a planted journal reaches
        # no file outside its folder.
        if Path(self.target).name != self.target or not all(
            name is None or _OWN_NAME.fullmatch(name) for name in (self.new, self.old)
        ):
            raise ValueError(f"not an entry of ours: {self}")


def _keep(target: Path, backup: Path) -> None:
    """Keep the old bytes under a second name: a hard link where there are any, else a copy."""
    try:
        os.link(target, backup)
    except OSError:
        with open(target, "rb") as old:
            write_new(backup, lambda new: shutil.copyfileobj(old, new), like=target)


def _set_state(descriptor: int, state: bytes) -> None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, state)
    os.fsync(descriptor)


def _undo_commit(descriptor: int) -> None:
    """Take back a commit whose `fsync` failed: nobody was told of it, so the old files come back."""
    if os.pread(descriptor, 1, 0) == _COMMITTED:
        _set_state(descriptor, _SWITCHING)


def _settle(journal: Path, descriptor: int) -> list[str]:
    """Bring the files of one journal to rest: undo unless it says committed; then forget the journal."""
    content = os.pread(descriptor, 1 << 20, 0)
    folder, said = journal.parent, []
    for entry in _entries(content[1:]):
        target, new = folder / entry.target, folder / entry.new
        old = folder / entry.old if entry.old else None
        if content[:1] == _SWITCHING and not new.exists():
            if old is None:
                target.unlink(missing_ok=True)
                said.append(f"removed the unfinished {entry.target}")
            elif old.exists():
                os.replace(old, target)
                said.append(f"restored {entry.target} from before an interrupted write")
        for path in (new, old):
            if path is not None:
                path.unlink(missing_ok=True)
    fsync_folder(folder)
    journal.unlink(missing_ok=True)
    fsync_folder(folder)
    return said


def _entries(content: bytes) -> list[_Entry]:
    """The journal's entries; none when it was cut short, for then nothing else had been done yet."""
    try:
        return [_Entry(**entry) for entry in json.loads(content)]
    except (ValueError, TypeError, RecursionError):
        return []
