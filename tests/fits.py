"""Modules that know nothing of this package, on a table, and how they are fitted."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_muter import AdversarialTraining, ThreatModel
from lightning_muter.adversarial.climb import LossAttack


@functools.cache
def cancer() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x = torch.from_numpy(x)
    x = (x - x.min(0).values) / (x.max(0).values - x.min(0).values)
    return x[:160].clamp(0, 1), torch.from_numpy(y[:160])


class Plain(pl.LightningModule):
    """Knows nothing of this package."""

    def __init__(self, k: int = 2, kind: str = "linear", optimizer: str = "sgd", decay: float = 1e-2) -> None:
        super().__init__()
        self.net = nn.Linear(30, k) if kind == "linear" else nn.Sequential(nn.Linear(30, 6), nn.Tanh(), nn.Linear(6, k))
        self.optimizer, self.decay = optimizer, decay
        if kind == "frozen":
            self.net[0].requires_grad_(False)
        if k == 1:
            self.criterion = nn.BCEWithLogitsLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        z = self(x)
        return F.cross_entropy(z, y) if z.shape[1] > 1 else self.criterion(z[:, 0], y.to(z))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        return kinds[self.optimizer]([p for p in self.parameters() if p.requires_grad], lr=0.1, weight_decay=self.decay)


def table(dtype: torch.dtype = torch.float64) -> TensorDataset:
    x, y = cancer()
    return TensorDataset(x.to(dtype), y)


def short_trainer(tmp_path: Path, *callbacks: pl.Callback, epochs: int = 3, **kwargs: Any) -> pl.Trainer:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False} | kwargs
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loader_of(data: Dataset[Any]) -> DataLoader[Any]:
    return DataLoader(data, batch_size=32, shuffle=True)


def l2_attack(eps: float = 0.2) -> AdversarialTraining:
    return AdversarialTraining(LossAttack(ThreatModel("l2", eps), steps=3))
