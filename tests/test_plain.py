"""Hyperparameters of any kind: what the callback writes opens with `weights_only=True`, and requests go on from it."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import io
import os
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import MUterCallback, ThreatModel, cli
from lightning_muter.storage.plain import plain


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 3


class Word(str, enum.Enum):
    A = "a"


@dataclasses.dataclass
class Settings:
    rate: float
    root: Path


INSIDE = OmegaConf.create({"seed": 7, "net": {"seed": "${seed}"}})
KEPT = {
    "number": (np.float32(0.5), 0.5),
    "text": (np.str_("a"), "a"),
    "truth": (np.bool_(True), True),
    "array": (np.arange(3.0)[::-1], torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)),
    "scalar array": (np.array(2.0), torch.tensor(2.0, dtype=torch.float64)),
    "texts": (np.array(["a", "b"]), ["a", "b"]),
    "big-endian": (np.arange(2, dtype=">i4"), [0, 1]),
    "path": (Path("a") / "b", os.path.join("a", "b")),
    "namespace": (argparse.Namespace(a=1), {"a": 1}),
    "dataclass": (Settings(0.1, Path("a")), {"rate": 0.1, "root": "a"}),
    "omegaconf": (OmegaConf.create({"a": [1, {"b": 2}], "c": "${a.0}"}), {"a": [1, {"b": 2}], "c": "${a.0}"}),
    "part of omegaconf": (INSIDE.net, {"seed": 7}),
    "ordered": (OrderedDict(a=(1, None)), {"a": (1, None)}),
    "counter": (Counter("aa"), {"a": 2}),
    "frozen": (frozenset([1, 2]), {1, 2}),
    "enum of int": (Level.LOW, 3),
    "enum of str": (Word.A, "a"),
    "dtype": (torch.float16, torch.float16),
    "device": (torch.device("cpu"), torch.device("cpu")),
    "size": (torch.Size([1, 2]), torch.Size([1, 2])),
    "parameter": (nn.Parameter(torch.ones(2)), torch.ones(2)),
    "nested": ({"a": [{"b": np.int64(1)}]}, {"a": [{"b": 1}]}),
}
LEFT_OUT = [torch.relu, functools.partial(nn.ReLU), nn.ReLU(), nn.ReLU, Colour.RED, SimpleNamespace(), np.longdouble(1)]


@pytest.mark.parametrize("name", KEPT)
def test_what_converts_without_loss_is_kept(name):
    value, right = KEPT[name]
    found = plain({"it": value})
    assert not found.left_out
    file = io.BytesIO()
    torch.save(found.value, file)
    file.seek(0)
    back = torch.load(file, weights_only=True)["it"]
    torch.testing.assert_close(back, right) if isinstance(right, torch.Tensor) else None
    assert isinstance(right, torch.Tensor) or (back == right and type(back) is type(right))


@pytest.mark.parametrize("value", LEFT_OUT, ids=lambda value: type(value).__name__)
def test_what_needs_code_is_left_out_by_name(value):
    found = plain({"cfg": {"it": value, "n": 1}, "many": [1, value], "deep": [{"it": value}]})
    assert found.value == {"cfg": {"n": 1}}
    assert set(found.left_out) == {"cfg.it", "many", "deep"}


def test_environment_variables_do_not_get_into_the_file(monkeypatch):
    monkeypatch.setenv("SECRET", "token")
    assert plain({"cfg": OmegaConf.create({"key": "${oc.env:SECRET}"})}).value == {"cfg": {"key": "${oc.env:SECRET}"}}


class Net(L.LightningModule):
    def __init__(self, cfg=None):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, weight_decay=1e-2)


class Whole(Net):
    """The configuration itself is the hyperparameters."""

    def __init__(self, cfg):
        super(Net, self).__init__()
        self.save_hyperparameters(cfg)
        self.layer = nn.Linear(2, 2)


class Rows(L.LightningDataModule):
    def __init__(self, root=Path("data")):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        x = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x[:, 0] > 0.5).long()), 20)


@pytest.mark.parametrize("kind", ["kept", "left out", "whole"])
def test_a_request_on_what_the_callback_wrote(kind, tmp_path):
    cfg = {
        "kept": OmegaConf.create({"lr": 0.1, "sizes": [1, 2]}),
        "left out": {"act": functools.partial(nn.ReLU, inplace=True), "mean": np.zeros(3)},
        "whole": OmegaConf.create({"lr": 0.1}),
    }[kind]
    net = (Whole if kind == "whole" else Net)(cfg)
    muter = MUterCallback(threat_model=ThreatModel("l2", 0.05, None), dirpath=tmp_path, verbose=False)
    trainer = L.Trainer(
        max_epochs=1, callbacks=[muter], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    if kind == "left out":
        with pytest.warns(UserWarning, match=r"without hyper_parameters\.cfg\.act \(partial\)"):
            trainer.fit(net, datamodule=Rows())
    else:
        trainer.fit(net, datamodule=Rows())
    path = muter.paths["checkpoint"]
    back = type(net).load_from_checkpoint(path)
    assert torch.equal(back.layer.weight, net.layer.weight)
    if kind == "left out":
        assert set(back.hparams.cfg) == {"mean"}
    else:
        assert dict(back.hparams.cfg if kind == "kept" else back.hparams) == dict(cfg)
    command = ["unlearn", "--model", f"{__name__}.{type(net).__name__}", "--data", f"{__name__}.Rows", "--ckpt_path"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    quiet += ["--model.cfg", "{lr: 0.1}"] if kind == "whole" else []
    assert cli.main([*command, str(path), "--forget.indices", "[3]", *quiet]) == 0


def test_an_unreadable_file_is_said_before_the_fit_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_muter.deletion.own_files.plain", lambda value: plain(value) and Broken(value))
    muter = MUterCallback(threat_model=ThreatModel("l2", 0.05, None), dirpath=tmp_path, verbose=False)
    trainer = L.Trainer(
        max_epochs=1, callbacks=[muter], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="Requests from the command line will not work"):
        trainer.fit(Net(), datamodule=Rows())


class Broken:
    left_out: dict = {}  # noqa: RUF012
    changed: dict = {}  # noqa: RUF012

    def __init__(self, value):
        self.value = {**value, "object": Colour.RED}
