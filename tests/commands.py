"""The command `muter` in a folder with somebody else's training code, a checkpoint and a snapshot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_muter import cli
from lightning_muter.deletion.checkpoints import load_checkpoint

from .faults import listing

SOURCE = Path(__file__).with_name("userproject.py")


ROOT = Path(__file__).parents[1]


CONFIG = """\
model: {class_path: userproject.UserNet}
data: {class_path: userproject.UserData}
trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}
"""


THREAT = "threat_model: {norm: l2, eps: 0.1, box: null}\nweight_decay: 0.01\n"


def environment(**extra):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the user's code, its checkpoint by a plain L.Trainer script, and a snapshot by the command line."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(SOURCE, folder)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "threat.yaml").write_text(THREAT)
    subprocess.run([sys.executable, "userproject.py"], cwd=folder, env=environment(), check=True, capture_output=True)
    assert listing(folder).keys() >= {"last.ckpt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            cli.main(["snapshot", "--config", "config.yaml", "--config", "threat.yaml", "--ckpt_path", "last.ckpt"])
            == 0
        )
    return folder


@pytest.fixture
def folder(project, tmp_path, monkeypatch):
    shutil.copytree(project, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def muter(command, *arguments, config="config.yaml"):
    if command in ("audit", "purge"):
        return cli.main([command, "--ckpt_path", "last.ckpt", *arguments])
    return cli.main([command, "--config", config, "--ckpt_path", "last.ckpt", *arguments])


def unlearn(*arguments, **kwargs):
    return muter("unlearn", *arguments, **kwargs)


def weights(name="last.muter.ckpt"):
    return load_checkpoint(name)["state_dict"]


def fixed(folder):
    """Everything on the disk but the lock file, whose content is only a hint."""
    return {name: content for name, content in listing(folder).items() if not name.endswith((".lock", ".pyc"))}
