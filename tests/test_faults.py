"""Real requests under faults: killed at random instants, on mutated files, and many in a row.

What this does not test: power loss. A killed process leaves the kernel's caches intact, so that a missing `fsync` would
not show here; their order is what test_storage and test_transactions fix by failing each call in turn.
"""

from __future__ import annotations

import itertools
import json
import logging
import mmap
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from lightning_muter import cli
from lightning_muter.deletion import files as places_module
from lightning_muter.deletion import ledger_access as lineage
from lightning_muter.deletion import request_flow as bookkeeping
from lightning_muter.deletion import transactions
from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.transactions import STAGES
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.storage import atomic as files
from lightning_muter.storage.fingerprint import DigestKey
from tests.commands import environment, fixed, muter, unlearn, weights
from tests.hostile import Evil, zipped
from tests.hostile import mutated as mutated_checkpoint

from .faults import WatchedOs, run_killed

PLACES = Places.of("last.ckpt")


def agreed():
    """The forgotten rows, on which everything on the disk must agree."""
    print_of_weights = checkpoint_fingerprint(load_checkpoint(PLACES.checkpoint))
    snapshot = Snapshot.load(PLACES.snapshot)
    assert snapshot.fingerprint == print_of_weights
    with Ledger.open(PLACES.ledger) as ledger:
        assert ledger.unfinished() == []
        assert ledger.verify(DigestKey.load(PLACES.key)) == []
        lineage.check_agreement(PLACES, ledger)
        assert ledger.last()["checkpoint"]["fingerprint_after"] == print_of_weights
        assert sorted(ledger.forgotten()) == sorted(snapshot.forgotten)
        assert len({receipt["id"] for receipt in ledger.receipts()}) == len(ledger)
        for receipt in ledger.receipts():
            assert places_module.receipt_path(PLACES, receipt).exists()
    assert not [path for path in Path().iterdir() if path.name.endswith((".muter-stage", ".muter-new", ".pending"))]
    return sorted(snapshot.forgotten)


def quiet():
    """Nothing of a forked process reaches the output that pytest captures."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    logging.disable()


def start_request(board, arguments):
    """A real request in a forked process that writes the stage it is in to the shared `board`."""
    board[0] = 0
    child = os.fork()
    if child:
        return child
    try:
        real = bookkeeping.commit_request

        def told(*args, **kwargs):
            def stage(name):
                board[0] = STAGES.index(name) + 1

            try:
                return real(*args, **kwargs, stage=stage)
            finally:
                board[0] = len(STAGES) + 1

        bookkeeping.commit_request = told
        quiet()
        os._exit(unlearn(*arguments))
    finally:
        os._exit(99)


def wait_for(board, value, child):
    while board[0] < value:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
    return True


def seconds_per_stage(board, arguments):
    """How long each stage of this request takes, to aim at; measured on a request that is left alone."""
    child = start_request(board, arguments)
    times = []
    for value in range(1, len(STAGES) + 2):
        wait_for(board, value, child)
        times.append(time.perf_counter())
    assert os.waitpid(child, 0)[1] == 0
    return [b - a for a, b in itertools.pairwise(times)]


@pytest.mark.parametrize("kills", [12, pytest.param(240, marks=pytest.mark.slow)])
def test_kills_at_random_instants_lose_nothing_and_apply_nothing_twice(folder, tmp_path, capsys, kills):
    torch.set_num_threads(1)  # forked processes must not meet another process's threads
    assert unlearn("--forget.indices", "[5]", "--request_id", "first") == 0  # warm, and a state to come from
    saved = tmp_path / "saved"
    shutil.copytree(folder, saved)
    request = ("--forget.indices", "[3,17]", "--request_id", "second")
    board, draw = mmap.mmap(-1, 1), random.Random(0)

    def restore():
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(saved, folder, dirs_exist_ok=True)

    measured = []
    for _ in range(3):
        restore()
        measured.append(seconds_per_stage(board, request))
    durations = [min(times) for times in zip(*measured, strict=True)]
    inside, outcomes, sayings = [0] * len(STAGES), [], []
    for _ in range(kills):
        restore()
        child, aim = start_request(board, request), inside.index(min(inside))
        if wait_for(board, aim + 1, child):
            instant = time.perf_counter() + 0.8 * draw.random() * durations[aim]
            while time.perf_counter() < instant:  # some stages are shorter than a sleep can be
                pass
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if 1 <= board[0] <= len(STAGES):
            inside[board[0] - 1] += 1
        capsys.readouterr()
        assert muter("purge") == 0  # any next command recovers
        sayings.append("recovery: request 'second'" in capsys.readouterr().out)
        outcomes.append(agreed())
        assert outcomes[-1] in ([5], [3, 5, 17])
        assert unlearn(*request) == 0  # asked again: applied now, or recognised as done
        assert agreed() == [3, 5, 17]
    print(f"kills inside of each stage {dict(zip(STAGES, inside, strict=True))}, undone {outcomes.count([5])}, ")
    print(f"in force {outcomes.count([3, 5, 17])}, recovered with a message {sum(sayings)}")
    if kills > 200:  # a few are too few to count
        assert sum(inside) >= 0.8 * kills
        assert min(inside) >= 5
    assert outcomes.count([5]) > 0
    assert any(sayings)


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_kills_while_a_request_begins_under_another_name(folder, step):
    assert unlearn("--forget.indices", "[5]") == 0
    before, counts = fixed(folder), []
    for n in range(1, 600, step):
        for path in folder.glob("*next*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

        def work(n=n):
            quiet()
            watch = WatchedOs(n, lambda _: os.kill(os.getpid(), signal.SIGKILL))
            files.os = lineage.os = transactions.os = watch
            unlearn("--forget.indices", "[3]", "--out", "next.ckpt", "--request_id", "out")

        if not run_killed(work):
            break
        code = unlearn("--forget.indices", "[3]", "--out", "next.ckpt", "--request_id", "out")
        counts.append(code)  # refused only where the request had been entered: it is done, under that name
        assert sorted(Snapshot.load("next.muter.snapshot").forgotten) == [3, 5]
        assert cli.main(["audit", "--ckpt_path", "next.ckpt", "--verify"]) == 0
        assert {name: content for name, content in fixed(folder).items() if "next" not in name} == before
    assert counts == sorted(counts)
    assert set(counts) == {0, 1}


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_successive_requests_equal_one_for_their_union(folder, tmp_path, count):
    rows = random.Random(0).sample(range(120), count)
    together = tmp_path / "together"
    shutil.copytree(folder, together)
    for number, row in enumerate(rows):
        request = ["--forget.indices", f"[{row}]", "--request_id", f"r{number}"]
        if number < count // 20:  # the real command, in a process of its own
            command = [sys.executable, "-m", "lightning_muter", "unlearn", "--config", "config.yaml"]
            subprocess.run([*command, "--ckpt_path", "last.ckpt", *request], env=environment(), check=True)
        else:
            assert unlearn(*request) == 0
    assert agreed() == sorted(rows)
    assert muter("audit", "--verify") == 0
    one_by_one, start = weights(), weights("last.ckpt")
    os.chdir(together)
    before = weights()
    assert unlearn("--forget.indices", str(rows)) == 0
    at_once = weights()
    assert start.keys() == before.keys()
    for name in at_once:
        moved = (at_once[name] - before[name]).norm()
        apart = (one_by_one[name] - at_once[name]).norm() / moved
        print(f"{name}: {count} requests and one for their union differ by {apart:.1e} of the step")
        assert moved > 0
        assert apart <= 1e-5


def mutated_container(content, draw):
    """Damage behind the head; half of the time with the hash made to fit, so that the parser is reached."""
    damaged = bytearray(content)
    table = struct.unpack_from("<Q", content, 64)[0]
    for _ in range(draw.choice([1, 1, 4])):
        damaged[64 + draw.randrange(draw.choice([8, 8 + table, len(content) - 64]))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.2:
        del damaged[64 + draw.randrange(len(content) - 64) :]
    if draw.random() < 0.5:
        damaged[24:56] = sha256(damaged[64:]).digest()
        damaged[16:24] = struct.pack("<Q", len(damaged) - 64)
    return bytes(damaged)


def mutated_receipt(content, draw):
    """Flips and cuts, or an edit with the hash made to fit."""
    if draw.random() < 0.5:
        receipt = json.loads(content)
        name = draw.choice(["forgotten", "method", "time", "n_retained", "previous", "id"])
        receipt[name] = draw.choice([[], "x", 0, None, {"a": [1]}, 1e308, "\ud800"])
        from lightning_muter.deletion.receipts import content_sha256

        try:
            receipt["sha256"] = content_sha256(receipt)
            return json.dumps(receipt, sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:
            return json.dumps(receipt).encode()
    damaged = bytearray(content)
    for _ in range(draw.choice([1, 3])):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.3:
        del damaged[draw.randrange(len(damaged)) :]
    return bytes(damaged)


MUTATIONS = {
    "last.muter.snapshot": mutated_container,
    "last.muter.ckpt": mutated_checkpoint,
    "last.muter.receipts/000002-r.json": mutated_receipt,
}


@pytest.mark.parametrize("count", [90, pytest.param(1200, marks=pytest.mark.slow)])
def test_mutated_files_are_never_accepted_and_never_end_in_a_traceback(folder, capsys, count):
    assert unlearn("--forget.indices", "[5]", "--request_id", "r") == 0
    draw, refused = random.Random(0), 0
    for n in range(count):
        name, mutate = list(MUTATIONS.items())[n % 3]
        original = Path(name).read_bytes()
        changed = mutate(original, draw)
        if changed == original:
            continue
        Path(name).write_bytes(changed)
        capsys.readouterr()
        assert muter("audit", "--verify") == 1, (n, name)
        if n % 10 == 0 and "receipts" not in name:
            assert unlearn("--forget.indices", "[6]") == 1, (n, name)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err, (n, name, err)
        assert "not foreseen" not in err, (n, name, err)
        refused += 1
        Path(name).write_bytes(original)
    assert refused >= 0.9 * count
    assert muter("audit", "--verify") == 0


@pytest.mark.parametrize("name", ["last.muter.snapshot", "last.muter.ckpt", "last.muter.key", "last.muter.ledger"])
def test_hostile_pickles_run_nowhere(folder, capsys, monkeypatch, name):
    monkeypatch.setenv("EVIL", str(folder / "ran"))
    for content in (pickle.dumps({"state_dict": Evil()}), zipped({"state_dict": Evil()})):
        Path(name).write_bytes(content)
        os.chmod(name, 0o600)
        assert muter("audit", "--verify") == 1
        assert unlearn("--forget.indices", "[6]") == 1
        assert muter("purge") in (0, 1)
        assert "Traceback" not in capsys.readouterr().err
        assert not Path("ran").exists()


@pytest.mark.parametrize("limit", [0, 600, 4096, 20_000, 34_000, 60_000])
def test_a_disk_that_fills_up_anywhere(folder, limit):
    """A limit on the size of files stands in for the disk: every writer meets it, SQLite too."""
    read, write = os.pipe()

    def work():
        quiet()
        sys.stderr = os.fdopen(write, "w", buffering=1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os._exit(unlearn("--forget.indices", "[3,17]", "--request_id", "full"))

    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    assert "Traceback" not in said
    assert code in (0, 1)
    assert muter("purge") == 0
    counts = code == 0 or "is in the ledger and counts" in said  # the disk was full only after that
    assert agreed() == ([3, 17] if counts else [])
    assert code == 1 or limit > 30_000
    assert unlearn("--forget.indices", "[3,17]", "--request_id", "full") == 0
    assert agreed() == [3, 17]
