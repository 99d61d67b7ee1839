"""A module and its data as people have them: handwritten digits, softmax regression. Nothing here knows of unlearning."""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningDataModule):
    """1797 images of 8 x 8 pixels in [0, 1]; the first `size` train, the last 500 test."""

    def __init__(self, size: int = 600) -> None:
        super().__init__()
        self.size = size

    def setup(self, stage: str | None = None) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(digits.target)
        self.train = TensorDataset(images[: self.size], labels[: self.size])
        self.test = TensorDataset(images[-500:], labels[-500:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=50, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=500)


class DigitNet(L.LightningModule):
    """Logits from a backbone (by default none: softmax regression) and a linear layer."""

    def __init__(self, backbone: nn.Module | None = None, features: int = 64) -> None:
        super().__init__()
        self.backbone = nn.Flatten() if backbone is None else backbone
        self.head = nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test_accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.3, momentum=0.9, weight_decay=1e-3)
