"""Requests as transactions: a failure or a kill at any call leaves all of a request or nothing, and it is said."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3

import pytest

from lightning_muter.deletion import files as places_module
from lightning_muter.deletion import ledger, transactions
from lightning_muter.deletion import ledger_access as lineage
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.errors import ArgumentError, CorruptFileError, MismatchError, RequestError
from lightning_muter.storage import atomic as files
from lightning_muter.storage.fingerprint import DigestKey

from .faults import WatchedOs, listing, no_space, run_killed

KEY = DigestKey(bytes(range(32)))


def content(n):
    return {
        "id": f"r{n}",
        "kind": "unlearn",
        "time": "2030-01-01T00:00:00Z",
        "method": "MUter",
        "scope": "head",
        "forgotten": [n],
        "users": [],
        "n_retained": 10 - n,
        "checkpoint": {"fingerprint_before": f"w{n - 1}", "fingerprint_after": f"w{n}"},
        "snapshot": {},
        "metrics": {},
        "warnings": [],
        "versions": {},
    }


def request(places, n, stage=lambda name: None, check=None):
    """A small request: the new checkpoint and snapshot hold the request's number."""
    writers = {
        places.checkpoint: lambda file: file.write(b"checkpoint %d" % n),
        places.snapshot: lambda file: file.write(b"snapshot %d" % n),
    }
    said = []
    with transactions.exclusive(places, say=said.append), lineage.open_ledger(places) as entries:
        lineage.check_agreement(places, entries)
        transactions.commit_request(
            places, entries, content(n), writers, asked=f"asked {n}", key=KEY, stage=stage, check=check
        )
    return said


@pytest.fixture
def places(tmp_path):
    places = Places.of(tmp_path / "last.ckpt")
    places.checkpoint.write_bytes(b"checkpoint 0")
    places.snapshot.write_bytes(b"snapshot 0")
    request(places, 1)
    return places


def recovered(places):
    said = []
    with transactions.exclusive(places, say=said.append):
        pass
    return said


def state(places):
    """How many requests everything on the disk agrees that there were."""
    with Ledger.open(places.ledger) as entries:
        lineage.check_agreement(places, entries)
        assert entries.verify(KEY) == []
        assert entries.unfinished() == []
        count = len(entries)
        assert entries.forgotten() == {n: f"r{n}" for n in range(1, count + 1)}
        assert places_module.write_receipts(places, entries) == []
    assert places.checkpoint.read_bytes() == b"checkpoint %d" % count
    assert places.snapshot.read_bytes() == b"snapshot %d" % count
    names = {path.name for path in places.folder.iterdir()}
    own = {f"last.muter.{ending}" for ending in ("ckpt", "snapshot", "ledger", "receipts", "pub")}
    assert names <= own | {places.lock.name, places.verified.name}
    assert len(list(places.receipts.iterdir())) == 2 * count
    return count


def test_a_request_goes_through_its_stages(places):
    stages = []
    assert request(places, 2, stages.append) == []
    assert tuple(stages) == transactions.STAGES
    assert state(places) == 2
    assert places_module.receipt_path(places, {"number": 2, "id": "r2"}).exists()


def watched(n, act):
    watch = WatchedOs(n, act)
    files.os = transactions.os = watch
    return watch


def clear(folder):
    shutil.rmtree(folder)


def test_a_failure_at_any_call_is_all_or_nothing(places, tmp_path, monkeypatch):
    saved, outcomes = tmp_path.parent / f"{tmp_path.name}-saved", []
    shutil.copytree(tmp_path, saved)
    before = listing(saved)
    for n in range(1, 400):
        clear(tmp_path)
        shutil.copytree(saved, tmp_path)
        watch = WatchedOs(n, no_space)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", watch)
            patch.setattr(transactions, "os", watch)
            try:
                request(places, 2)
                outcomes.append("done")
            except (OSError, RequestError):
                outcomes.append("refused")
                now = listing(tmp_path)
                unchanged = all(now.get(name) == before[name] for name in before if not name.endswith(".lock"))
                assert unchanged or "counts" in str(recovered(places)), n
        recovered(places)
        assert state(places) == (2 if outcomes[-1] == "done" else 1), (n, outcomes[-1])
        if watch.count < n:
            break
    assert outcomes.count("refused") >= 25
    assert outcomes[-1] == "done"


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_call_is_finished_or_undone_and_said(places, tmp_path, step):
    saved, counts, sayings = tmp_path.parent / f"{tmp_path.name}-saved", [], set()
    shutil.copytree(tmp_path, saved)
    for n in range(1, 400, step):
        clear(tmp_path)
        shutil.copytree(saved, tmp_path)

        def work(n=n):
            watched(n, lambda _: os.kill(os.getpid(), signal.SIGKILL))
            request(places, 2)

        if not run_killed(work):
            break
        pending = places.pending.exists()
        said = recovered(places)
        counts.append(state(places))
        sayings |= {line.split(": ")[-1] for line in said}
        assert said or not pending or counts[-1] == 2, n
        # The next request goes through from wherever the last one was left.
        request(places, counts[-1] + 1)
        assert state(places) == counts[-1] + 1
    assert min(counts.count(1), counts.count(2)) >= 18 / step
    assert counts == sorted(counts)
    assert {"undone, ask for it again", "finished now, it counts"} <= sayings


def test_kills_inside_of_sqlites_commit(places, tmp_path, monkeypatch):
    """SQLite's own statements as the instants: each of them, before and after it ran."""
    saved, counts = tmp_path.parent / f"{tmp_path.name}-saved", []
    shutil.copytree(tmp_path, saved)

    class Killing(sqlite3.Connection):
        count = 0

        def execute(self, *args):
            result = super().execute(*args)
            Killing.count += 1
            if Killing.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

    real = sqlite3.connect
    for n in range(1, 60):
        clear(tmp_path)
        shutil.copytree(saved, tmp_path)

        def work(n=n):
            Killing.at = n
            ledger.sqlite3.connect = lambda *args, **kwargs: real(*args, **kwargs, factory=Killing)
            request(places, 2)

        if not run_killed(work):
            break
        recovered(places)
        counts.append(state(places))
    assert counts == sorted(counts)
    assert set(counts) == {1, 2}
    assert len(counts) >= 20


def test_the_first_request_leaves_no_ledger_when_it_is_refused(tmp_path):
    places = Places.of(tmp_path / "a.muter.ckpt")
    places.checkpoint.write_bytes(b"c")
    places.snapshot.write_bytes(b"s")

    def refuse(stages):
        assert {path.read_bytes() for path in stages.values()} == {b"checkpoint 1", b"snapshot 1"}
        raise CorruptFileError("what was written cannot be read back")

    with pytest.raises(CorruptFileError, match="read back"):
        request(places, 1, check=refuse)
    assert listing(tmp_path).keys() == {"a.muter.ckpt", "a.muter.snapshot", ".a.muter.lock"}
    assert places.checkpoint.read_bytes() == b"c"


def test_one_of_two_processes_waits_or_is_refused(places):
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with transactions.exclusive(places):
                os.write(ready[1], b"x")
                os.read(go[0], 1)
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(RequestError, match=f"another process \\(pid {child}\\)"), transactions.exclusive(places):
        pass
    os.write(go[1], b"x")
    with transactions.exclusive(places, wait=10):
        pass
    os.waitpid(child, 0)
    for descriptor in (*ready, *go):
        os.close(descriptor)


def test_a_failing_switch_is_finished_by_the_next_command(places, monkeypatch):
    real = os.replace

    def stuck(source, target):
        if str(source).endswith(".muter-stage"):
            raise OSError(30, "Read-only file system")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stuck)
        with pytest.raises(RequestError, match="counts, but its files could not be put in place"):
            request(places, 2)
    assert recovered(places) == ["request 'r2' was interrupted after the ledger had taken it: finished now, it counts"]
    assert state(places) == 2


def test_an_interrupt_during_the_switch_completes_it_and_is_passed_on(places):
    def interrupt(name):
        if name == "closing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        request(places, 2, interrupt)
    assert state(places) == 2


@pytest.mark.parametrize("change", ["stage", "stage and target", "names"])
def test_files_altered_between_the_crash_and_the_recovery_are_refused(places, change):
    def die(name):
        if name == "switching":
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_killed(lambda: request(places, 2, die))
    (stage,) = places.folder.glob(".last.muter.ckpt.*.muter-stage")
    if change == "stage":
        stage.write_bytes(b"evil")
        message = "damaged or altered"
    elif change == "stage and target":
        stage.unlink()
        places.checkpoint.write_bytes(b"evil")
        message = "'r2' wrote"
    else:
        with sqlite3.connect(places.ledger) as connection:
            connection.execute("UPDATE switches SET target = '../x' WHERE request = 2 AND target LIKE '%ckpt'")
        connection.close()
        message = "not its own"
    before = listing(places.folder)
    with pytest.raises(CorruptFileError, match=message), transactions.exclusive(places):
        pass
    after = listing(places.folder)
    assert all(after[name] == before[name] for name in ("last.muter.ckpt", "last.muter.snapshot"))


def test_changed_files_and_wrong_names_are_refused(places):
    places.checkpoint.write_bytes(b"trained further")
    with pytest.raises(MismatchError, match=r"receipt 1 .* left"):
        request(places, 2)
    places.checkpoint.unlink()
    with pytest.raises(MismatchError, match="no such file"):
        request(places, 2)
    with pytest.raises(ArgumentError, match=r"named <name>\.ckpt"):
        Places.of("weights.pt")
    with pytest.raises(RequestError, match="cannot be written to"), transactions.exclusive(Places.of("/none/a.ckpt")):
        pass
