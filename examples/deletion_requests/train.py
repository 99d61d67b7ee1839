"""An ordinary Lightning script: adversarial training on handwritten digits. It knows nothing of unlearning."""

from __future__ import annotations

import lightning as L
import torch
import torchattacks
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningDataModule):
    """1797 images of 8 x 8 pixels: the first 1200 are the training set."""

    def __init__(self, batch_size: int = 100) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(digits.target)
        self.train = TensorDataset(images[:1200], labels[:1200])
        self.test = TensorDataset(images[1200:], labels[1200:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)


class DigitNet(L.LightningModule):
    """Softmax regression, trained on the worst images within an L2 distance of `eps`."""

    def __init__(self, eps: float = 0.25) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        attack = torchattacks.PGDL2(self, eps=self.hparams.eps, alpha=self.hparams.eps / 4, steps=10)
        return nn.functional.cross_entropy(self(attack(x, y)), y)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)


if __name__ == "__main__":
    L.seed_everything(0)
    trainer = L.Trainer(max_epochs=5, accelerator="cpu", logger=False, default_root_dir=".")
    trainer.fit(DigitNet(), datamodule=Digits())
    trainer.save_checkpoint("digits.ckpt")
