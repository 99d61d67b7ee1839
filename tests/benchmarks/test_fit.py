"""What the callbacks add to a fit by the defaults: checks before it, and what comes between its last step and the files."""

from __future__ import annotations

import functools
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchattacks
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, MUterCallback
from lightning_muter.study.models import PreActResNet18

pytestmark = pytest.mark.benchmark


def _cnn(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), act(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), act(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), act(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


#: network, samples, epochs
FITS: dict[str, tuple[Any, int, int]] = {
    "ReLU CNN": (lambda: _cnn(nn.ReLU), 1500, 10),
    "SiLU CNN": (lambda: _cnn(nn.SiLU), 1500, 10),
    "ReLU CNN, forty epochs": (lambda: _cnn(nn.ReLU), 1500, 40),
    "softmax": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(196, 10)), 1500, 10),
    "PreActResNet-18": (lambda: PreActResNet18((1, 14, 14), 10, width=12), 1500, 10),
}


class Lit(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


class Clock(pl.Callback):
    """Processor seconds when training begins and when its last step has been made."""

    began = first = ended = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.first = self.first or time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended = time.process_time()


def _images(count: int) -> TensorDataset:
    digits = load_digits()
    x = torch.tensor(digits.images[:count] / 16, dtype=torch.float32)[:, None]
    x = F.interpolate(x, (14, 14), mode="bilinear", align_corners=False).clamp(0, 1)
    return TensorDataset(x, torch.tensor(digits.target[:count]))


def _fit(name: str, folder: Path) -> tuple[Clock, float, MUterCallback]:
    make, count, epochs = FITS[name]
    torch.manual_seed(0)
    clock, muter = Clock(), MUterCallback(verbose=False)
    attack = AdversarialTraining(functools.partial(torchattacks.PGD, eps=8 / 255, alpha=2 / 255, steps=10))
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[clock, attack, muter], default_root_dir=folder,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Lit(make()), DataLoader(_images(count), 128, shuffle=True))
    return clock, time.process_time(), muter


@pytest.mark.parametrize("name", FITS)
def test_h_end_of_a_fit_per_fit(benchmark: Any, name: str, tmp_path: Path) -> None:
    met: list[tuple[Clock, float, MUterCallback]] = []
    benchmark.pedantic(lambda: met.append(_fit(name, tmp_path)), rounds=1)
    clock, end, muter = met[0]
    assert muter.snapshot is not None
    fitted = clock.ended - clock.first
    polish = muter.snapshot.figures["polish"]
    benchmark.extra_info |= {
        "ratio": (end - clock.ended) / fitted,
        "aim": "<= 0.1" if "forty" in name else "<= 0.3",
        "fit": fitted,
        "status": polish["status"],
        "stationarity": muter.snapshot.stationarity,
        "gap": polish.get("gap"),
        "gradients": polish.get("gradients"),
    }


def test_i_checks_before_a_fit_per_epoch(benchmark: Any, tmp_path: Path) -> None:
    """Reading the step and all checks, by a profiler of the callbacks' hooks, over an epoch of ReLU CNN."""
    from lightning.pytorch.profilers import SimpleProfiler

    profiler, count = SimpleProfiler(), 1500
    torch.manual_seed(0)
    attack = AdversarialTraining(functools.partial(torchattacks.PGD, eps=8 / 255, alpha=2 / 255, steps=10))
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[clock, attack, MUterCallback(polish=0, verbose=False)], profiler=profiler,
        default_root_dir=tmp_path,
    )  # fmt: skip

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(Lit(_cnn(nn.ReLU)), DataLoader(_images(count), 128))

    benchmark.pedantic(run, rounds=1)
    ours = {
        k: v for k, v in profiler.recorded_durations.items() if "[Callback]MUter" in k or "[Callback]Adversarial" in k
    }
    before = sum(sum(v) for k, v in ours.items() if k.endswith(("setup", "on_fit_start", "on_train_start")))
    first = sum(v[0] - sorted(v)[len(v) // 2] for k, v in ours.items() if "batch_start" in k and v)  # reads the step
    epoch = clock.ended - clock.first
    benchmark.extra_info |= {
        "ratio": (before + first) / max(0.02 * epoch, 1.0),
        "aim": "<= 1 (2 % of an epoch, or a second)",
        "wall seconds": before + first,
        "epoch": epoch,
    }
