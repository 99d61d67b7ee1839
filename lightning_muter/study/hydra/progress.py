"""A progress bar over named steps of unequal length: it counts what is finished and names what is running."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm

from lightning_muter.watching import watched

BAR = "{desc} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


class Progress:
    """Context manager; ``begin(what)`` ends the running step and starts the next.

    Args:
        total: number of steps known so far.
        shown: False for no bar; in logs there is none in any case.
    """

    def __init__(self, total: int, *, shown: bool = True) -> None:
        self.bar = tqdm(total=total, disable=not watched(shown), bar_format=BAR, mininterval=0)
        self._running = False
        self.began = time.perf_counter()

    def extend(self, steps: int) -> None:
        """That many more steps will come."""
        self.bar.total += steps

    def begin(self, what: str) -> None:
        self._finish()
        self._running = True
        self.bar.set_description_str(f"{what:<40.40}")

    def _finish(self) -> None:
        if self._running:
            self.bar.update()
        self._running = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
            self.bar.set_description_str(f"{'done':<40}")
        self.bar.close()
