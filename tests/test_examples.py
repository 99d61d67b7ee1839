"""The example of deletion requests runs as it is written."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_muter import cli

from .faults import listing

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "deletion_requests"


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
