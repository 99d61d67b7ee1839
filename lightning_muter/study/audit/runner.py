"""All worlds of an audit, in several processes; each finished world is in the cache at once, so that a killed audit goes on."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from lightning_muter.errors import ArgumentError
from lightning_muter.study.audit.worlds import Plan, make_world, missing
from lightning_muter.study.setup.cache import Cache

_SHARED: dict[str, tuple[Plan, Cache]] = {}


def make_worlds(plan: Plan, cache: Cache, workers: int, begin: Callable[[str], None] = lambda what: None) -> None:
    """Make every world that is not in the cache.

    Every world is computed with one thread, whoever computes it: the figures do not depend on ``workers``.
    """
    if workers < 1:
        raise ArgumentError("audit.workers", workers, "a whole number, 1 or more", "As many as there are free cores.")
    todo = []
    for index in range(plan.worlds):
        if missing(plan, cache, index):
            todo.append(index)
        else:
            begin(f"world {index + 1} of {plan.worlds}: from the cache")
    if workers == 1 or len(todo) <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for index in todo:
                begin(f"world {index + 1} of {plan.worlds}")
                make_world(plan, cache, index)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(todo)), mp_context=context, initializer=_start, initargs=(plan, cache, os.getpid())
    ) as pool:
        running = {pool.submit(_make, index): index for index in todo}
        try:
            for finished in as_completed(running):
                begin(f"world {running[finished] + 1} of {plan.worlds}")
                finished.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(plan: Plan, cache: Cache, parent: int) -> None:
    torch.set_num_threads(1)
    _SHARED["audit"] = plan, cache
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed audit takes its workers along; what they had not finished is made anew."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _make(index: int) -> None:
    make_world(*_SHARED["audit"], index)
