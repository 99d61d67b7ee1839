"""Ways back through a fit: refused, said, or honoured without the forgotten rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from tests.world import Net, dataset, rows

from .ways import (
    GONE,
    HONOURED,
    KEPT,
    PERMUTED,
    REFUSED,
    SAID,
    Plain,
    Streamed,
    Ways,
    callback,
    fit,
    fit_all,
    forgetful,
    loaded,
    reloaded,
    snapshot_by_command,
    with_dtype,
)

WAYS = Ways()
way = WAYS.way


def fitted(
    name: str, ending: str, of: Callable[[], Dataset[Any]], *, resume: str | None = None, named: str = "best"
) -> None:
    """Another process fits a new module in the folder of the first, with the callback."""

    def run(folder: Path) -> None:
        place = folder / "fit"
        saving = ModelCheckpoint(place, save_last=named == "best", filename=named, enable_version_counter=False)
        fit(Net(), of(), callback(), saving, resume=None if resume is None else place / resume, epochs=2)

    WAYS[f"fit: {name}"] = (ending, run)


fitted("anew in the folder", REFUSED, dataset)
fitted("anew in the folder, data permuted", REFUSED, lambda: dataset(PERMUTED))
fitted("anew in the folder, a part of permuted data", REFUSED, lambda: Subset(dataset(PERMUTED), KEPT))
fitted("anew in the folder, joined data sets", REFUSED, lambda: ConcatDataset([dataset(KEPT), dataset([7])]))
fitted("anew in the folder, one forgotten row among others", REFUSED, lambda: dataset([0, 1, 2, 3, 4]))
fitted("anew in the folder, other scale", REFUSED, lambda: TensorDataset(rows()[0] * 2, rows()[1]))
fitted("anew in the folder, under another name", REFUSED, dataset, named="b")
fitted("anew in the folder, retained rows", HONOURED, lambda: dataset(KEPT))
fitted("anew in the folder, the retained part", HONOURED, lambda: Subset(dataset(), KEPT))
fitted("resumed from the callback's own last.ckpt", REFUSED, dataset, resume="last.ckpt")
fitted("resumed from last.ckpt with retained rows", REFUSED, lambda: dataset(KEPT), resume="last.ckpt")
fitted("resumed from an epoch's checkpoint with retained rows", REFUSED, lambda: dataset(KEPT), resume="best.ckpt")
fitted("resumed from the unlearned checkpoint", REFUSED, lambda: dataset(KEPT), resume="last.muter.ckpt")


def elsewhere(name: str, ending: str, first: str, then: str, of: Callable[[], Dataset[Any]] = dataset) -> None:
    """Files of the first run lie in one folder, the next run writes to another."""

    def run(folder: Path) -> None:
        shutil.copytree(folder / "fit", folder / first)
        fit(Net(), of(), callback(), ModelCheckpoint(folder / then), unseen=ending != SAID)

    WAYS[f"fit: {name}"] = (ending, run)


elsewhere("in a folder below", SAID, "runs", "runs/again")
elsewhere("in a folder below, retained rows", HONOURED, "runs", "runs/again", lambda: dataset(KEPT))
elsewhere("as the next version", SAID, "logs/version_0/checkpoints", "logs/version_1/checkpoints")
elsewhere("as the next version, permuted", SAID, "logs/version_0", "logs/version_1", lambda: dataset(PERMUTED))


@way("fit: another folder of files, the first one's checkpoint resumed", REFUSED)
def _(folder: Path) -> None:
    fit(Net(), dataset(KEPT), callback(dirpath=folder / "elsewhere"), resume=folder / "fit/last.ckpt", epochs=2)


@way("fit: key lost", REFUSED)
def _(folder: Path) -> None:
    (folder / "fit/last.muter.key").unlink()
    fit(Net(), dataset(KEPT), callback(dirpath=folder / "fit"))


@way("fit: the same callback, another module", REFUSED)
def _(folder: Path) -> None:
    module, muter = Net(), callback()
    fit_all(module, muter)
    muter.unlearn(module, GONE)
    fit(Net(), dataset(), muter)


@way("fit: the same callback resumes the checkpoint from before", REFUSED)
def _(folder: Path) -> None:
    module, muter = Net(), callback()
    fit_all(module, muter, ModelCheckpoint(folder / "again", save_last=True))
    muter.unlearn(module, GONE)
    fit(Net(), dataset(KEPT), muter, resume=folder / "again/last.ckpt", epochs=2)


@way("fit: a loaded module, no callback", REFUSED)
def _(folder: Path) -> None:
    fit(reloaded(folder), dataset())


@way("fit: a loaded module, no callback, no key", REFUSED)
def _(folder: Path) -> None:
    fit(loaded(folder), dataset(KEPT))


@way("fit: any module after unlearn, no callback", REFUSED)
def _(folder: Path) -> None:
    fit(forgetful(folder, Plain), dataset())


@way("fit: any module after unlearn, other types", REFUSED)
def _(folder: Path) -> None:
    fit(forgetful(folder, Plain), with_dtype(PERMUTED))


@way("fit: any module after unlearn, a stream", REFUSED)
def _(folder: Path) -> None:
    fit(forgetful(folder, Plain), Streamed())


@way("fit: any module after unlearn, retained rows", HONOURED)
def _(folder: Path) -> None:
    fit(forgetful(folder, Plain), dataset(KEPT))


@way("callback: retained() of another order", REFUSED)
def _(folder: Path) -> None:
    module, muter = Net(), callback()
    fit_all(module, muter)
    muter.unlearn(module, GONE)
    muter.retained(dataset(PERMUTED))


@way("callback: retained() of the whole it was made of", HONOURED)
def _(folder: Path) -> None:
    module, muter = Net(), callback()
    fit_all(module, muter)
    muter.unlearn(module, GONE)
    fit(module, muter.retained(dataset()), muter)
    muter.unlearn(module, [0])
    assert muter.retained(dataset()).indices == KEPT[1:]


@way("callback: save, then the command's snapshot", HONOURED)
def _(folder: Path) -> None:
    snapshot_by_command(folder / "fit/last.muter.ckpt")


@way("callback: save, then the command's snapshot of its own last.ckpt", REFUSED)
def _(folder: Path) -> None:
    snapshot_by_command(folder / "fit/last.ckpt")


@pytest.mark.parametrize("name", WAYS)
def test_no_way_back_is_silent(name: str, folder: Path) -> None:
    WAYS.attempt(name, folder)
