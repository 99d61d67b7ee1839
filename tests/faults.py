"""What the fault tests share: file-system calls that fail or kill at a chosen count."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Calls that touch the disk; `unlink` and `mkdir` of pathlib are not counted.
CALLS = [
    "open",
    "write",
    "fsync",
    "replace",
    "link",
    "close",
    "lseek",
    "fdopen",
    "pread",
    "pwrite",
    "ftruncate",
    "scandir",
]


class WatchedOs:
    """Stands in for the module `os`: counts the calls that touch the disk and acts at the n-th."""

    def __init__(self, n: int, act: Callable[[str], object]) -> None:
        self.count, self.n, self.act = 0, n, act

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        if name not in CALLS:
            return call

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count != self.n:
                return call(*args, **kwargs)
            if name == "close":  # a close that fails has closed all the same
                call(*args, **kwargs)
            self.act(name)
            return None

        return watched


def no_space(name: str) -> None:
    raise OSError(28, f"No space left on device (injected into {name})")


def run_killed(work: Callable[[], object]) -> bool:
    """Run `work` in a forked process; True when it was killed, False when it ended by itself."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def listing(folder: Path) -> dict[str, bytes]:
    """Every plain file below a folder, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
