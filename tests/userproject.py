"""A user's own training code, as the command line meets it: it knows nothing of unlearning."""

from __future__ import annotations

import os

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class UserData(L.LightningDataModule):
    """120 points in the plane, three classes; `salt` changes one sample, `bad` makes one NaN."""

    def __init__(self, salt: float = 0.0, bad: bool = False, size: int = 120) -> None:
        super().__init__()
        self.salt, self.bad, self.size = salt, bad, size

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(self.size) % 3
        centres = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])
        points = centres[labels] + 0.6 * torch.randn(self.size, 2, generator=generator)
        points[7] += self.salt
        if self.bad:
            points[9] = float("nan")
        self.rows = TensorDataset(points.double(), labels)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=40, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=40)

    def sample_ids(self) -> list[str]:
        return [f"user{i // 4}" for i in range(self.size)]


class UserNet(L.LightningModule):
    """Softmax regression."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, classes).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).double().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05, weight_decay=1e-2)


class WideNet(UserNet):
    """Another model: its weights do not fit."""

    def __init__(self) -> None:
        super().__init__(classes=4)


class BrokenNet(UserNet):
    """Its code fails where nobody foresaw it, or exhausts the memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.environ.get("BREAK") == "memory":
            raise MemoryError("cannot allocate 8 EiB")
        if os.environ.get("BREAK") == "code":
            raise ZeroDivisionError("in the user's forward")
        return super().forward(x)


def train(path: str = "last.ckpt") -> None:
    """What a user's script does."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(UserNet(), datamodule=UserData())
    trainer.save_checkpoint(path, weights_only=False)


if __name__ == "__main__":
    train()
