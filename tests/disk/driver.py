"""Commands under faults of the disk. Started with the shim preloaded; forks once per case, so that torch is imported once.

    LD_PRELOAD=shim.so python -m tests.disk.driver FOLDER SHIM SHARE [SEED]

SHARE of all cases is tried (1: all). The last line is a JSON object: cases and bad ones by kind, and the bad ones' stories.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_muter import MUterCallback
from lightning_muter.deletion.audit import audit
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.publish import publish_command
from lightning_muter.deletion.purge import purge_command
from lightning_muter.deletion.transactions import exclusive
from lightning_muter.snapshot.snapshot import Snapshot
from tests.world import QUIET, Data, Net, command, plain_checkpoint, unlearned

from .power import Disk, read_log

Action = Callable[[Path], object]
KILLED, TORN = (1, 2), 3


class Scenario:
    """A command on a prepared folder: what it forgets if it counts, and what was forgotten before."""

    stem, here = (
        "last",
        False,
    )  # the model's name; whether it is prepared in this process, whose memory the action needs

    def __init__(
        self, name: str, prepare: Action, act: Action, before: list[int], after: list[int], *, entered: bool = True
    ) -> None:
        self.name, self.prepare, self.act, self.before, self.after = name, prepare, act, before, after
        self.entered = entered  # as request "again"


class Saving(Scenario):
    """A model in memory, of which rows are forgotten and saved by its callback."""

    stem, here = "model", True

    def __init__(self, name: str, before: list[int]) -> None:
        super().__init__(name, self._fit, self._save, before, [*before, 5], entered=False)

    def _fit(self, folder: Path) -> None:
        self.callback = MUterCallback(dirpath=folder, verbose=False)
        self.model = Net()
        trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[self.callback], enable_checkpointing=False)
        trainer.fit(self.model, Data())
        if self.before:
            self._forget(self.before)

    def _forget(self, rows: list[int]) -> None:
        self.callback.unlearn(self.model, rows)
        self.callback.save()

    def _save(self, folder: Path) -> None:
        # asked again where it counts already: the memory of this process does not know
        if sorted(Snapshot.load(folder / "model.muter.snapshot").forgotten) != self.after:
            self._forget([5])


def _ckpt(folder: Path) -> Path:
    return folder / "last.ckpt"


def _fresh(folder: Path) -> None:
    plain_checkpoint(_ckpt(folder))


def _without_ledger(folder: Path) -> None:
    """As the callback leaves it: checkpoint, snapshot and key."""
    places = unlearned(folder, [])
    shutil.rmtree(places.receipts)
    for path in (places.ledger, places.public_key, places.verified, _ckpt(folder)):
        path.unlink(missing_ok=True)


def _trained_further(folder: Path) -> None:
    places = unlearned(folder, [3])
    current = torch.load(places.checkpoint, weights_only=True)
    current["state_dict"]["layer.bias"] += 0.01
    torch.save({"state_dict": current["state_dict"], "epoch": 2, "pytorch-lightning_version": "2"}, _ckpt(folder))


def _without_key(folder: Path) -> None:
    unlearned(folder, [3]).key.unlink()


def _certified(folder: Path) -> None:
    places = unlearned(folder, [])
    command("unlearn", places.checkpoint, forget=[3], within=0.1)


def _run(name: str, **options: object) -> Action:
    return lambda folder: command(name, _ckpt(folder), request_id="again", **options)


def _purge(folder: Path) -> None:
    purge_command(str(_ckpt(folder)), yes=True)


def _publish(folder: Path) -> None:
    if not (folder / "released.ckpt").exists():
        publish_command(str(_ckpt(folder)), str(folder / "released.ckpt"))


SCENARIOS = [
    Scenario("first snapshot", _fresh, _run("snapshot"), [], []),
    Scenario("first unlearn", _without_ledger, _run("unlearn", forget=[5], certify=False), [], [5]),
    Scenario("first refresh", _without_ledger, _run("refresh"), [], []),
    Scenario("later unlearn", lambda f: unlearned(f, [3]), _run("unlearn", forget=[5], certify=False), [3], [3, 5]),
    Scenario("later snapshot", _trained_further, _run("snapshot"), [3], [3]),
    Scenario("later refresh", lambda f: unlearned(f, [3]), _run("refresh"), [3], [3]),
    Saving("first save", []),
    Saving("later save", [3]),
    Scenario("purge", lambda f: unlearned(f, [3]), _purge, [3], [3], entered=False),
    Scenario("new key", _without_key, _run("refresh", recover_key=True), [3], [3]),
    Scenario("publish", _certified, _publish, [3], [3], entered=False),
]


def in_child(work: Callable[[], str | None]) -> str:
    """What `work` returned or raised, or how its process ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "ok"
        try:
            os.close(read)
            sys.stderr = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()):
                said = work() or "ok"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
            if os.environ.get("DISK_TRACEBACK"):
                said += traceback.format_exc()
        finally:
            shim.shim_off()
            os.write(write, said.encode()[:60_000])
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else said


def lay(folder: Path, files: dict[str, bytes]) -> None:
    """Make the folder hold exactly these files."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if ".muter.key" in path.name:
            path.chmod(0o600)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def settled(folder: Path, scenario: Scenario, outcome: str) -> str | None:
    """What is wrong after the next command has recovered, and after the request was asked for again."""
    places = Places.of(folder / f"{scenario.stem}.ckpt")
    with exclusive(places, say=lambda line: None):
        pass
    begun = places.snapshot.exists()
    if begun:
        problem = _state(places, (scenario.before, scenario.after), outcome, scenario)
        if problem is not None:
            return problem
    elif scenario.name != "first snapshot" or outcome == "ok":
        return "the snapshot is gone"
    scenario.act(folder)
    if (problem := _state(places, (scenario.after,), "ok", scenario)) is not None:
        return f"asked again: {problem}"
    odd = [p.name for p in folder.iterdir() if p.name.startswith(".") and p not in (places.lock, places.verified)]
    return f"left behind: {odd}" if odd else None


def _state(places: Places, allowed: tuple[list[int], ...], outcome: str, scenario: Scenario) -> str | None:
    found = audit(places, verify=places.ledger.exists())
    problems = [p for p in found.problems if "the next request writes it anew" not in p]
    if problems:
        return f"audit: {problems}"
    forgotten = sorted(Snapshot.load(places.snapshot, unsealed=False).forgotten)
    if forgotten not in allowed:
        return f"forgotten {forgotten}"
    if places.ledger.exists():
        with Ledger.open(places.ledger, readonly=True) as ledger:
            if sorted(ledger.forgotten()) != forgotten:
                return f"ledger {sorted(ledger.forgotten())}, snapshot {forgotten}"
            entered = ledger.find("again") is not None
    else:
        entered = False
    if not scenario.entered or len(allowed) == 1:
        return None
    if outcome == "ok" and not entered:
        return "success was reported, but nothing is entered"
    if outcome not in ("ok", "killed") and entered and not _told(outcome):
        return f"refused, but it counts: {outcome}"
    return None


def _told(outcome: str) -> bool:
    """Whether an error said that the request counts, or may."""
    return "counts" in outcome or "not known whether" in outcome


class Runner:
    def __init__(self, folder: Path, share: float, seed: int) -> None:
        self.folder, self.share, self.draw = folder, share, random.Random(seed)
        self.cases: Counter[str] = Counter()
        self.bad: list[str] = []
        self.seen: set[tuple[str, str]] = set()

    def run(self, scenario: Scenario) -> None:
        lay(self.folder, {})
        if scenario.here:
            scenario.prepare(self.folder)
        else:
            said = in_child(lambda: scenario.prepare(self.folder) and None)
            assert said == "ok", said
        start, disk = files_in(self.folder), Disk.of(self.folder)
        total, log = self._measure(scenario)
        print(f"{scenario.name}: {total} calls", flush=True)
        for n in range(1, total + 1):
            for mode, error, kind in (
                (1, 0, "kill"), (2, 0, "kill"), (3, 0, "torn write"), (4, errno.EIO, "error"), (4, errno.ENOSPC, "error"),
                (5, errno.ENOSPC, "error"), (6, errno.EIO, "error"),
            ):  # fmt: skip
                if self._chosen():
                    self._case(scenario, start, kind, (n, mode, error, 0, 0, 0))
        for _ in range(round(72 * self.share)):
            mode, mode2 = self.draw.choice((4, 6)), self.draw.choice((1, 2, 3, 4, 4))
            errors = [self.draw.choice((errno.EIO, errno.ENOSPC)) for _ in range(2)]
            n, later = self.draw.randint(1, total), self.draw.randint(1, 40)
            again = self.draw.random() < 0.5  # the second fault hits the recovery from the first
            pair = (n, self.draw.choice((1, 2, mode)) if again else mode, errors[0], 0, 0, 0)
            if again:
                self._case(scenario, start, "pair", pair, (later, mode2, errors[1], 0, 0, 0))
            else:
                self._case(scenario, start, "pair", (*pair[:3], later, mode2, errors[1]))
        self._power_cuts(scenario, disk, log)

    def _chosen(self) -> bool:
        return self.draw.random() < self.share

    def _measure(self, scenario: Scenario) -> tuple[int, bytes]:
        record = self.folder.with_suffix(".log")
        read, write = os.pipe()

        def work() -> None:
            fd = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            shim.shim_arm(os.fsencode(self.folder), 0, 0, 0, 0, 0, 0, fd)
            scenario.act(self.folder)
            shim.shim_off()
            os.write(write, str(shim.shim_count()).encode())

        said = in_child(work)
        assert said == "ok", said
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            return int(pipe.read()), record.read_bytes()

    def _case(self, scenario: Scenario, start: dict[str, bytes], kind: str, *faults: tuple[int, ...]) -> None:
        lay(self.folder, start)
        outcome = "ok"
        for fault in faults:

            def work(fault: tuple[int, ...] = fault) -> None:
                shim.shim_arm(os.fsencode(self.folder), *fault, -1)
                scenario.act(self.folder)

            said = in_child(work)
            outcome = said if outcome in ("ok", said) else "killed"  # after two attempts either state is right
        self._judge(scenario, kind, f"{faults}", outcome)

    def _judge(self, scenario: Scenario, kind: str, story: str, outcome: str) -> None:
        self.cases[kind] += 1
        problem = in_child(lambda: settled(self.folder, scenario, outcome))
        if problem != "ok":
            self.bad.append(f"{scenario.name}, {kind} {story}, {outcome[:200]}: {problem[:2000]}")
            print("BAD", self.bad[-1], flush=True)

    def _power_cuts(self, scenario: Scenario, disk: Disk, log: bytes) -> None:
        calls = read_log(log)
        for n in range(len(calls) + 1):
            for how, files in disk.after_a_cut(self.draw):
                state = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
                if (scenario.name, state) in self.seen or not self._chosen():
                    continue
                self.seen.add((scenario.name, state))
                lay(self.folder, files)
                self._judge(scenario, "power cut", f"after {n} of {len(calls)} calls, {how}", "killed")
            if n < len(calls):
                disk.apply(calls[n])


def main(folder: str, library: str, share: str, seed: str = "0", only: str = "") -> None:
    global shim
    shim = ctypes.CDLL(library)
    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("ignore")
    runner = Runner(Path(folder), float(share), int(seed))
    for scenario in SCENARIOS:
        if only in scenario.name:
            runner.run(scenario)
    print(json.dumps({"cases": runner.cases, "bad": runner.bad}))


if __name__ == "__main__":
    main(*sys.argv[1:])
