"""A table, one logit, BCE: say what the adversary may do, and the package's own attack climbs your loss."""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, MUterCallback, ThreatModel


class Logistic(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(30, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(self(x).squeeze(1), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


L.seed_everything(0)
table = load_breast_cancer()
x = torch.tensor(StandardScaler().fit_transform(table.data), dtype=torch.float32)
patients = TensorDataset(x, torch.tensor(table.target, dtype=torch.float32))

model, muter = Logistic(), MUterCallback()
threat = ThreatModel("l2", 0.5, box=None)  # standardised columns have no box
trainer = L.Trainer(
    max_epochs=10, callbacks=[AdversarialTraining(threat), muter], logger=False, enable_checkpointing=False
)
trainer.fit(model, DataLoader(patients, batch_size=64, shuffle=True))
print(muter.unlearn(model, forget=[12, 40], retain=patients, refine=2))
