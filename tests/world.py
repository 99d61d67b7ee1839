"""A tiny world for tests of files and requests: a linear model, its data, and the commands as calls (no command line)."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_muter import AdversarialTrainingMixin, ThreatModel
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.requests import ForgetConfig
from lightning_muter.deletion.trainer import MuterTrainer

N = 24
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Net(AdversarialTrainingMixin, pl.LightningModule):
    """Softmax regression in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3).double()
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def configure_attack(self) -> Any:
        return ThreatModel("l2", 0.1, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)


@functools.cache
def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 3
    centres = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])
    return (centres[labels] + 0.6 * torch.randn(N, 2, generator=generator)).double(), labels


def dataset(order: list[int] | None = None) -> TensorDataset:
    """The rows, or these of them in this order."""
    x, y = rows()
    return TensorDataset(x, y) if order is None else TensorDataset(x[order], y[order])


class Data(pl.LightningDataModule):
    def __init__(self, of: Dataset[Any] | None = None) -> None:
        super().__init__()
        self.of = dataset() if of is None else of

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.of, batch_size=8)


class DataWithTest(Data):
    """The same with twelve test rows."""

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(list(range(12))), batch_size=5)


def plain_checkpoint(path: Path, shift: float = 0.0) -> None:
    """What a user's own script leaves."""
    model = Net()
    with torch.no_grad():
        model.layer.weight += shift
    torch.save({"state_dict": model.state_dict(), "epoch": 1, "pytorch-lightning_version": pl.__version__}, path)


def command(name: str, path: Path | str, of: Dataset[Any] | None = None, model: Any = None, **options: Any) -> None:
    """`muter NAME --ckpt_path PATH` on this dataset."""
    if "forget" in options:
        options["forget"] = ForgetConfig(indices=options["forget"])
    trainer = MuterTrainer(**QUIET, enable_checkpointing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(trainer, name)(model or Net(), str(path), Data(of), **options)


def unlearned(folder: Path, forget: list[int], name: str = "last.ckpt") -> Places:
    """A model in a folder, of which these rows were forgotten."""
    plain_checkpoint(folder / name)
    command("snapshot", folder / name)
    if forget:
        command("unlearn", folder / name, forget=forget)
    return Places.of(folder / name)
