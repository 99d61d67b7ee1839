"""SIGTERM ends what follows a fit as Ctrl-C does: at once, wherever it is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException


@contextmanager
def stopped_by_sigterm(trainer: pl.Trainer) -> Iterator[None]:
    """SIGTERM raises inside, also one that came just before.

    Lightning's own handler takes note of the signal for the training loop to see between two batches; when a fit has ended
    nothing looks any more. It is still called first.

    Raises:
        SIGTERMException: which Lightning's trainer takes for what it is.
    """
    if trainer.received_sigterm:
        raise SIGTERMException
    if threading.current_thread() is not threading.main_thread():  # signals are not ours to handle
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def stop(number: int, frame: Any) -> None:
        if callable(before):
            before(number, frame)
        raise SIGTERMException

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
