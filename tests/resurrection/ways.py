"""Rows 3 and 7 were forgotten. What the ways in which they might come back have in common."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_muter import (
    MUterCallback,
    Snapshot,
    ThreatModel,
    take_snapshot,
    unlearn,
)
from lightning_muter.deletion.files import Places
from lightning_muter.errors import MuterError
from lightning_muter.forgotten import rows as forgotten_rows
from lightning_muter.storage.fingerprint import DigestKey
from tests.world import QUIET, N, Net, command, dataset, rows

GONE = [3, 7]
KEPT = [i for i in range(N) if i not in GONE]
PERMUTED = [*range(1, N), 0]
OPTIONS: dict[str, Any] = {"threat_model": ThreatModel("l2", 0.1, None), "weight_decay": 0.1, "progress": False}


class Plain(pl.LightningModule):
    """Knows nothing of this package; the same weights as `Net`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3).double()
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    forward = Net.__dict__["forward"].__wrapped__ if hasattr(Net.forward, "__wrapped__") else Net.forward

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)


def callback(**options: Any) -> MUterCallback:
    return MUterCallback(verbose=False, threat_model=ThreatModel("l2", 0.1, None), **options)


def fit(
    module: Any, of: Dataset[Any], *callbacks: Any, resume: Path | None = None, epochs: int = 1, unseen: bool = True
) -> None:
    """A fit, in which no forgotten row is seen."""
    points, _ = rows()
    seen: list[torch.Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch["x"] if isinstance(batch, dict) else batch[0])

    files = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, enable_checkpointing=files, callbacks=[*callbacks, Watch()])
    trainer.fit(module, DataLoader(of, 8), ckpt_path=None if resume is None else str(resume))
    for x in seen:
        for row in GONE if unseen else []:
            assert not (x.double().reshape(len(x), -1) - points[row]).norm(dim=1).lt(1e-6).any()


def fit_all(module: Any, *callbacks: Any) -> None:
    trainer = pl.Trainer(**QUIET, max_epochs=1, callbacks=list(callbacks))
    trainer.fit(module, DataLoader(dataset(), 8))


def without_forgotten(snapshot: Any) -> None:
    """The snapshot counts no forgotten row, and knows both again."""
    assert snapshot.key is not None
    x, y = rows()
    held = {bytes(row) for row in snapshot.digests.numpy()}
    for row in GONE:
        assert snapshot.key.digest(x[row], y[row]) not in held
        assert snapshot.key.digest(x[row].float(), y[row]) not in held
    assert len(snapshot.barred) == len(GONE)


def snapshot_by_command(path: Path, of: Dataset[Any] | None = None, out: Path | None = None, **options: Any) -> None:
    command("snapshot", path, of, out=None if out is None else str(out), **options)
    without_forgotten(Snapshot.load(Places.of(out or path).snapshot))


def taken(model: Any, of: Dataset[Any] | None = None, **options: Any) -> Snapshot:
    snapshot = take_snapshot(model, of or dataset(), **(OPTIONS | options))
    without_forgotten(snapshot)
    return snapshot


def loaded(folder: Path, kind: Any = Net) -> Any:
    return kind.load_from_checkpoint(folder / "cli/last.muter.ckpt", map_location="cpu", weights_only=True)


def keys(folder: Path) -> None:
    forgotten_rows.remember_key(DigestKey.load(folder / "cli/last.muter.key"))


def once_more(order: list[int] | None = None) -> Dataset[Any]:
    return dataset([*(order or range(N)), GONE[0]])


def with_dtype(order: list[int]) -> Dataset[Any]:
    x, y = rows()
    return TensorDataset(x[order].float(), y[order].int())


class AsDicts(Dataset[Any]):
    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        x, y = rows()
        return {"x": x[self.order[index]], "y": y[self.order[index]]}


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        x, y = rows()
        return iter(zip(x, y, strict=True))


def forget_in_memory(module: Any) -> Snapshot:
    snapshot = take_snapshot(module, dataset(), **OPTIONS)
    unlearn(module, snapshot, GONE, dataset(), progress=False)
    return snapshot


Way = Callable[[Path], Any]
REFUSED, HONOURED, SAID = "refused", "honoured", "said"


class Ways(dict[str, tuple[str, Way]]):
    """Ways back by name, and how each ends."""

    def way(self, name: str, ending: str) -> Callable[[Way], Way]:
        def enter(function: Way) -> Way:
            self[name] = (ending, function)
            return function

        return enter

    def attempt(self, name: str, folder: Path) -> None:
        ending, go = self[name]
        with warnings.catch_warnings(record=ending == SAID) as said:
            warnings.simplefilter("always" if ending == SAID else "ignore")
            if ending != REFUSED:
                go(folder)
            else:
                with pytest.raises(MuterError) as caught:
                    go(folder)
                assert "anew under another name" not in str(caught.value)
                assert "--out" not in str(caught.value)
        if ending == SAID:
            assert any("was made to forget rows that this fit trains on" in str(w.message) for w in said or [])


def lost(*names: str) -> Callable[[Path], object]:
    return lambda f: [(f / "cli" / f"last.muter.{name}").unlink() for name in names]


def put_back(*names: str) -> Callable[[Path], object]:
    return lambda f: [shutil.copy(f / "before" / f"last.muter.{name}", f / "cli") for name in names]


def forgetful(_: Path, kind: Any = Net) -> Any:
    module = kind()
    forget_in_memory(module)
    return module


def reloaded(folder: Path) -> Any:
    keys(folder)
    return loaded(folder)
