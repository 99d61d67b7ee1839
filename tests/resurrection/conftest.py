"""The folder in which rows were forgotten, and a copy of it for each way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_muter.forgotten import rows as forgotten_rows
from tests.world import Net, command, plain_checkpoint

from .ways import (
    GONE,
    callback,
    fit_all,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cli/: by the command line; fit/: by a callback, whose own last.ckpt has an optimiser's state. before/: of cli/."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("cli", "before", "fit"):
        (folder / name).mkdir()
    plain_checkpoint(folder / "cli/last.ckpt")
    command("snapshot", folder / "cli/last.ckpt")
    for path in (folder / "cli").glob("last.muter.*"):
        if path.is_file():
            shutil.copy(path, folder / "before")
    command("unlearn", folder / "cli/last.ckpt", forget=GONE, request_id="ticket")
    module, muter = Net(), callback()
    fit_all(module, muter, ModelCheckpoint(folder / "fit", save_last=True, filename="best"))
    muter.unlearn(module, GONE)
    muter.save()
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "work")
    forgotten_rows._KEYS.clear()  # another process
    return tmp_path / "work"
