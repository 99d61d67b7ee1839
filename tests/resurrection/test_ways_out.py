"""After a deletion work goes on: fits of the retained rows, saved requests, twins of forgotten rows."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from lightning_muter import (
    Snapshot,
    take_snapshot,
    unlearn,
)
from lightning_muter.deletion.checkpoints import load_checkpoint
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.errors import MuterError
from lightning_muter.forgotten.modules import recalled
from lightning_muter.storage.fingerprint import DigestKey
from tests.world import N, Net, command, dataset, rows

from .ways import (
    GONE,
    KEPT,
    OPTIONS,
    Plain,
    callback,
    fit,
    fit_all,
)


def test_a_fit_of_the_retained_rows_in_the_same_folder_is_followed_by_requests(folder: Path) -> None:
    """Positions count in the new training set; the old rows stay known by content; the ledger goes on."""
    place = folder / "fit"
    saving = ModelCheckpoint(place, save_last=True, filename="best", enable_version_counter=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Net(), dataset(KEPT), callback(), saving)
    command("unlearn", place / "last.ckpt", dataset(KEPT), forget=[3])  # row 4
    snapshot = Snapshot.load(place / "last.muter.snapshot")
    assert (snapshot.n_total, snapshot.forgotten, len(snapshot.barred)) == (N - 2, [3], 3)
    with Ledger.open(place / "last.muter.ledger") as ledger:
        assert ledger.verify(DigestKey.load(place / "last.muter.key")) == []
        assert list(ledger.forgotten()) == [3]
        assert [r["forgotten"] for r in ledger.receipts() if r["kind"] == "unlearn"] == [GONE, [3]]
    for of in (dataset(KEPT), dataset([i for i in range(N) if i != 4])):
        with pytest.raises(MuterError):
            fit(Net(), of, callback(dirpath=place))


@pytest.mark.parametrize("times", [1, 2])
def test_requests_in_memory_are_saved_as_the_command_line_saves_them(tmp_path: Path, times: int) -> None:
    module, muter = Net(), callback(dirpath=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_all(module, muter)
        for row in range(times):
            muter.unlearn(module, [row])
        path = muter.save()
        assert muter.save() == path  # nothing more to do
        (checkpoint,) = tmp_path.glob("*.muter.ckpt")
        command("unlearn", checkpoint, forget=[9])
        muter.unlearn(module, [11])
        with pytest.raises(MuterError, match="other requests"):
            muter.save()
    assert Snapshot.load(path).forgotten == [*range(times), 9]
    with Ledger.open(Places.of(checkpoint).ledger) as ledger:
        assert ledger.verify(DigestKey.load(Places.of(checkpoint).key)) == []
        assert [r["forgotten"] for r in ledger.receipts()] == [list(range(times)), [9]]


def test_files_are_made_by_save_where_the_fit_wrote_none(tmp_path: Path) -> None:
    module, muter = Net(), callback()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_all(module, muter)
        muter.unlearn(module, [3])
        assert muter.save(tmp_path / "a.muter.snapshot") == tmp_path / "a.muter.snapshot"
        muter.refresh(module)
        muter.save()
        command("unlearn", tmp_path / "a.ckpt", forget=[9])
    assert load_checkpoint(tmp_path / "a.muter.ckpt")["lightning_muter"]["forgotten"] == [3, 9]
    with Ledger.open(tmp_path / "a.muter.ledger") as ledger:
        assert [r["kind"] for r in ledger.receipts()] == ["unlearn", "refresh", "unlearn"]


def test_a_row_of_the_same_content_that_stays_is_not_taken_for_a_forgotten_one() -> None:
    x, y = rows()
    twins = TensorDataset(torch.cat([x, x[3:4]]), torch.cat([y, y[3:4]]))
    module = Plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        snapshot = take_snapshot(module, twins, **OPTIONS)
        unlearn(module, snapshot, [3], twins, progress=False)
        assert recalled(module).located(twins) == [3]
        assert recalled(module).located(dataset([0, 3])) == []
        assert recalled(module).located(dataset([3, 3])) == [1]
        unlearn(module, snapshot, [N], twins, progress=False)  # now it is gone for good
    assert recalled(module).located(dataset([0, 3])) == [1]
