"""The examples run as they are written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_muter import cli

from .faults import listing
from .readme import at_work

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FOLDER = EXAMPLES / "deletion_requests"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "my")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "copy"


def lines():
    """The script's commands, one a line."""
    text = (FOLDER / "commands.sh").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith(("#", "set "))]


def finished(folder):
    assert listing(folder).keys() >= {"digits.muter.ckpt", "digits.muter.snapshot", "digits.muter.ledger"}
    assert not (folder / "digits.ckpt").exists()
    assert (
        len(list((folder / "digits.muter.receipts").glob("*.json"))) == 6
    )  # a purge enters what it will do and what it did


def test_every_command_of_the_script(copy, capsys):
    for line in lines():
        if line.startswith("muter "):  # in this process: Lightning is imported only once
            assert cli.main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
        else:
            subprocess.run(["bash", "-c", line], check=True, capture_output=True)
    finished(copy)
    assert "test_accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_itself(copy):
    subprocess.run(["bash", "commands.sh"], check=True, capture_output=True)
    finished(copy)


def _run(folder, *command):
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_short_examples(tmp_path, name):
    if name == "timm_backbone":
        pytest.importorskip("timm")
    with at_work(tmp_path, size=None):
        assert "UnlearnResult of" in (out := _run(tmp_path, sys.executable, f"{name}.py")) or "removed" in out


@pytest.mark.slow
def test_the_sweep(tmp_path):
    with at_work(tmp_path, size=None):
        _run(tmp_path, "bash", "sweep.sh")
        assert (tmp_path / "sweep" / "report.html").exists()


@pytest.mark.slow
def test_a_look_at_the_whole_network(tmp_path):
    _run(EXAMPLES / "whole_network", sys.executable, "run.py", "--seeds", "0", "--epochs", "3", "--out", str(tmp_path))


@pytest.mark.slow
def test_a_look_at_publication(tmp_path):
    options = ["--seeds", "0", "--singles", "2", "--draws", "2", "--within", "1e-3", "--out", str(tmp_path)]
    _run(EXAMPLES / "publication", sys.executable, "run.py", *options)
    assert (tmp_path / "cost.csv").exists()
    assert (tmp_path / "leak.csv").exists()


def test_examples_are_short_and_listed():
    text = (EXAMPLES / "README.md").read_text()
    for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh")):
        assert len(path.read_text().splitlines()) <= 60, path.name
        assert f"`{path.name}`" in text, path.name
    assert {found for found in re.findall(r"`(\w+\.(?:py|sh|yaml))`", text) if not (EXAMPLES / found).exists()} == set()
