"""Ways back through the functions: refused, or honoured without the forgotten rows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_muter import (
    Snapshot,
    refresh,
    take_snapshot,
    take_wide_snapshot,
    unlearn,
    unlearn_wide,
)
from lightning_muter.forgotten.modules import recalled
from lightning_muter.storage.fingerprint import DigestKey
from tests.world import QUIET, N, Net, dataset, rows

from .ways import (
    GONE,
    HONOURED,
    KEPT,
    OPTIONS,
    PERMUTED,
    REFUSED,
    AsDicts,
    Plain,
    Ways,
    forget_in_memory,
    forgetful,
    loaded,
    lost,
    once_more,
    reloaded,
    taken,
    with_dtype,
    without_forgotten,
)

WAYS = Ways()
way = WAYS.way


def python(name: str, ending: str, make: Callable[[Path], Any], of: Dataset[Any] | None = None) -> None:
    WAYS[f"take_snapshot: {name}"] = (ending, lambda folder: taken(make(folder), of))


def by_state_dict(folder: Path) -> Any:
    torch.save(forgetful(folder).state_dict(), folder / "weights.pt")
    fresh = Net()
    fresh.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return fresh


def by_own_checkpoint(folder: Path) -> Any:
    module = forgetful(folder)
    trainer = pl.Trainer(**QUIET, max_epochs=0, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "mine.ckpt", weights_only=True)
    return Net.load_from_checkpoint(folder / "mine.ckpt", weights_only=True)


python("after unlearn", HONOURED, forgetful)
python("after unlearn, any module", HONOURED, lambda f: forgetful(f, Plain))
python(
    "after unlearn, a module of plain torch",
    HONOURED,
    lambda f: forgetful(f, lambda: nn.Sequential(nn.Linear(2, 3).double())),
)
python("after unlearn, data permuted", REFUSED, forgetful, dataset(PERMUTED))
python("after unlearn, a row once more", REFUSED, forgetful, once_more())
python("after unlearn, in float32, permuted", REFUSED, forgetful, with_dtype(PERMUTED))
python("after unlearn, as dictionaries, permuted", REFUSED, forgetful, AsDicts(PERMUTED))
python("after unlearn, parts of a permuted whole", REFUSED, forgetful, Subset(dataset(PERMUTED), KEPT))
python("after unlearn, a part of a longer whole", REFUSED, forgetful, Subset(once_more(), [*KEPT, N]))
python("after unlearn, the retained part", HONOURED, forgetful, Subset(dataset(), KEPT))
python("of a copy", HONOURED, lambda f: copy.deepcopy(forgetful(f)))
python("of a pickled copy", HONOURED, lambda f: pickle.loads(pickle.dumps(forgetful(f))))
python("of weights saved and loaded", HONOURED, by_state_dict)
python("of the user's own checkpoint, loaded", HONOURED, by_own_checkpoint)
python("after loading", HONOURED, reloaded)
python("after loading, without the key", REFUSED, loaded)
python("after loading, data permuted", REFUSED, reloaded, dataset(PERMUTED))


for form, change in {
    "float labels": torch.Tensor.double,
    "labels of shape (N, 1)": lambda y: y[:, None],
}.items():
    python(f"after unlearn, permuted, {form}", REFUSED, forgetful,
           TensorDataset(rows()[0][PERMUTED], change(rows()[1][PERMUTED])))  # fmt: skip
python("after unlearn, permuted, weights beside", REFUSED, forgetful,
       TensorDataset(*(part[PERMUTED] for part in rows()), torch.ones(N)))  # fmt: skip
python("after unlearn, permuted, rows of another shape", REFUSED, forgetful,
       TensorDataset(rows()[0][PERMUTED][:, None], rows()[1][PERMUTED]))  # fmt: skip


@way("take_snapshot: another key than the forgotten rows'", REFUSED)
def _(folder: Path) -> None:
    taken(forgetful(folder), key=DigestKey.generate())


@way("take_snapshot: like= a snapshot that forgot", HONOURED)
def _(folder: Path) -> None:
    module = Plain()
    snapshot = forget_in_memory(module)
    fresh = Plain()
    fresh.load_state_dict(module.state_dict())
    assert taken(fresh, like=snapshot, polish=0).forgotten == GONE


@way("take_snapshot: like= a snapshot that forgot, data permuted", REFUSED)
def _(folder: Path) -> None:
    module = Plain()
    snapshot = forget_in_memory(module)
    fresh = Plain()
    fresh.load_state_dict(module.state_dict())
    taken(fresh, dataset(PERMUTED), like=snapshot, polish=0)


@way("take_wide_snapshot: after unlearn", HONOURED)
def _(folder: Path) -> None:
    without_forgotten(take_wide_snapshot(forgetful(folder), dataset(), **OPTIONS))


@way("take_wide_snapshot: data permuted", REFUSED)
def _(folder: Path) -> None:
    take_wide_snapshot(forgetful(folder), dataset(PERMUTED), **OPTIONS)


@way("unlearn_wide: earlier rows are left out", HONOURED)
def _(folder: Path) -> None:
    module = forgetful(folder)
    result = unlearn_wide(module, [9], dataset(), steps=1, **OPTIONS)
    assert result.n_retained == N - 3
    assert recalled(module).positions == (3, 7, 9)


@way("unlearn_wide: data permuted", REFUSED)
def _(folder: Path) -> None:
    unlearn_wide(forgetful(folder), [9], dataset(PERMUTED), steps=1, **OPTIONS)


@way("unlearn: a snapshot from before", REFUSED)
def _(folder: Path) -> None:
    module = Plain()
    old = take_snapshot(module, dataset(), **OPTIONS)
    before = copy.deepcopy((module.state_dict(), old))
    unlearn(module, old, GONE, dataset(), progress=False)
    module.load_state_dict(before[0])
    unlearn(module, before[1], [9], dataset(), progress=False)


@way("refresh in memory: data permuted", REFUSED)
def _(folder: Path) -> None:
    module = Plain()
    refresh(module, forget_in_memory(module), dataset(PERMUTED), progress=False)


def retained(name: str, ending: str, of: Callable[[], Dataset[Any]], *, key: bool = True) -> None:
    def run(folder: Path) -> None:
        if not key:
            lost("key")(folder)
        kept = Snapshot.load(folder / "cli/last.muter.snapshot").retained(of())
        assert not set(kept.indices) & set(GONE)

    WAYS[f"retained: {name}"] = (ending, run)


retained("of the training set", HONOURED, dataset)
retained("of another order", REFUSED, lambda: dataset(PERMUTED))
retained("of a row more", REFUSED, once_more)
retained("without the key", REFUSED, dataset, key=False)


@pytest.mark.parametrize("name", WAYS)
def test_no_way_back_is_silent(name: str, folder: Path) -> None:
    WAYS.attempt(name, folder)
