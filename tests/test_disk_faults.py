"""Commands on a disk that fails, under the shim of tests/disk: killed, torn, in error, two faults at once, the power cut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .disk.power import Call, Disk

HERE = Path(__file__).parent / "disk"
pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or not sys.platform.startswith("linux"), reason="a C compiler and Linux are needed"
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.mark.parametrize("share", [0.003, pytest.param(1.0, marks=[pytest.mark.slow, pytest.mark.timeout(0)])])
def test_whatever_the_disk_does_a_request_is_whole_or_not_at_all(shim, tmp_path, share):
    folder = tmp_path / "work"
    folder.mkdir()
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.disk.driver", str(folder), str(shim), str(share)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result["cases"])
    assert result["bad"] == []
    assert sum(result["cases"].values()) >= 6000 * share
    assert {"kill", "error", "power cut"} <= set(result["cases"])


def test_what_was_not_synced_may_be_lost(tmp_path):
    """The replay of power cuts itself, on a rename whose content was never synced."""
    import random

    (tmp_path / "old").write_bytes(b"old")
    disk, target = Disk.of(tmp_path), str(tmp_path / "old")
    for call in (
        Call("create", str(tmp_path / "new"), "", 0, 10**9, b""),
        Call("write", str(tmp_path / "new"), "", 0, 10**9, b"new"),
        Call("rename", str(tmp_path / "new"), target, 0, 0, b""),
    ):
        disk.apply(call)
    states = dict(disk.after_a_cut(random.Random(0)))
    assert states["all unsynced lost"] == {target: b"old"}
    assert states["names ahead"] == {target: b""}
    assert states["nothing lost"] == {target: b"new"}
    disk.apply(Call("sync", target, "", 0, 10**9, b""))
    assert dict(disk.after_a_cut(random.Random(0)))["names ahead"] == {target: b"new"}
    disk.apply(Call("syncdir", str(tmp_path), "", 0, 1, b""))
    assert dict(disk.after_a_cut(random.Random(0)))["all unsynced lost"] == {target: b"new"}
