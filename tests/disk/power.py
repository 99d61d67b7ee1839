"""Power cuts, replayed: what a disk may hold when the current goes, given the calls that were made until then.

What was not synced may be lost: the content of a file since its last fsync, the names in a folder since the folder's. Nothing
says in which order the rest arrives, so each of these is tried at every instant: all of it lost; names there, content lost;
content there, names lost; some of each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Call:
    kind: str
    path: str
    other: str
    offset: int
    inode: int
    data: bytes


def read_log(text: bytes) -> list[Call]:
    calls, at = [], 0
    while at < len(text):
        end = text.index(b"\n", at)
        kind, path, other, offset, inode, size = text[at:end].decode().split("\t")
        data = text[end + 1 : end + 1 + int(size)]
        calls.append(Call(kind, path, other, int(offset), int(inode), data))
        at = end + int(size) + 2
    return calls


@dataclass
class Disk:
    """Names and contents, as programs see them and as they are sure to survive."""

    names: dict[str, int] = field(default_factory=dict)  # path -> file
    content: dict[int, bytes] = field(default_factory=dict)
    safe_names: dict[str, int] = field(default_factory=dict)
    safe_content: dict[int, bytes] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    safe_folders: set[str] = field(default_factory=set)
    pending: list[tuple[str, str, int | None]] = field(
        default_factory=list
    )  # changes of names since their folder's sync
    _numbers: dict[int, int] = field(default_factory=dict)  # inodes are used again, our numbers are not

    @classmethod
    def of(cls, folder: Path) -> Disk:
        disk = cls()
        for path in sorted(folder.rglob("*")):
            if path.is_dir():
                disk.folders.add(str(path))
            else:
                number = disk._number(path.stat().st_ino)
                disk.names[str(path)], disk.content[number] = number, path.read_bytes()
        disk.safe_names, disk.safe_content = dict(disk.names), dict(disk.content)
        disk.safe_folders = set(disk.folders)
        return disk

    def _number(self, inode: int, *, fresh: bool = False) -> int:
        if fresh or inode not in self._numbers:
            self._numbers[inode] = len(self.content) + 1
            self.content[self._numbers[inode]] = b""
        return self._numbers[inode]

    def apply(self, call: Call) -> None:
        kind, path = call.kind, call.path
        if kind == "create":
            self._rename("", path, self._number(call.inode, fresh=True))
        elif kind == "write":
            number = self._number(call.inode)
            old = self.content[number].ljust(call.offset, b"\0")
            self.content[number] = old[: call.offset] + call.data + old[call.offset + len(call.data) :]
        elif kind == "truncate":
            number = self._number(call.inode)
            self.content[number] = self.content[number][: call.offset].ljust(call.offset, b"\0")
        elif kind == "sync":
            number = self._number(call.inode)
            self.safe_content[number] = self.content[number]
        elif kind == "syncdir":
            for names, safe in ((self.names, self.safe_names),):
                for name in [n for n in safe if _parent(n) == path and n not in names]:
                    del safe[name]
                safe.update({n: number for n, number in names.items() if _parent(n) == path})
            self.safe_folders |= {f for f in self.folders if _parent(f) == path}
            self.pending = [change for change in self.pending if _parent(change[1] or change[0]) != path]
        elif kind == "rename":
            if path in self.names:
                self._rename(path, call.other, self.names[path])
        elif kind == "link":
            source = path if path in self.names else next((n for n in self.names if n.endswith(path)), None)
            if source is not None:
                self._rename("", call.other, self.names[source])
        elif kind == "unlink":
            self._rename(path, "", None)
        elif kind == "mkdir":
            self.folders.add(path)

    def _rename(self, old: str, new: str, number: int | None) -> None:
        change = (old, new, number)
        self.pending.append(change)
        _apply(self.names, change)

    def after_a_cut(self, draw: random.Random) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The states that the disk may be found in, by relative chance of what survives."""

        def state(names: dict[str, int], content: dict[int, bytes], folders: set[str]) -> dict[str, bytes]:
            return {n: content.get(i, b"") for n, i in names.items() if _parent(n) in folders or _root(n, self.folders)}

        yield "all unsynced lost", state(self.safe_names, self.safe_content, self.safe_folders)
        yield "names ahead", state(self.names, self.safe_content, self.folders)
        yield "content ahead", state(self.safe_names, self.content, self.safe_folders)
        yield "nothing lost", state(self.names, self.content, self.folders)
        for _ in range(2):
            mixed = dict(self.safe_names)  # a change of a name is whole or not at all, a rename too
            for change in self.pending:
                if draw.random() < 0.5:
                    _apply(mixed, change)
            contents = {i: draw.choice((self.content, self.safe_content)).get(i, b"") for i in self.content}
            yield "some lost", state(mixed, contents, self.folders)


def _apply(names: dict[str, int], change: tuple[str, str, int | None]) -> None:
    """Give a file the new name, if it has the old one."""
    old, new, number = change
    if old and names.pop(old, None) is None:
        return
    if new and number is not None:
        names[new] = number


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _root(path: str, folders: set[str]) -> bool:
    return not any(path.startswith(f"{folder}/") for folder in folders)
