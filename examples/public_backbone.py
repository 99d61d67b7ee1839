"""A backbone trained on public data and frozen; only the head sees what people may ask to have removed."""

from __future__ import annotations

import functools

import lightning as L
import torchattacks
from my import DigitNet, Digits
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_muter import AdversarialTraining, MUterCallback

attack = functools.partial(torchattacks.PGDL2, eps=0.3, alpha=0.1, steps=5)
options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}

L.seed_everything(0)
data = Digits(size=1200)
data.setup()
public, private = Subset(data.train, range(600)), Subset(data.train, range(600, 1200))

backbone = nn.Sequential(  # smooth: its maxima can be found exactly and followed
    nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(128, 32), nn.SiLU()
)
L.Trainer(max_epochs=8, callbacks=[AdversarialTraining(attack)], **options).fit(
    DigitNet(backbone, 32), DataLoader(public, batch_size=50, shuffle=True)
)

backbone.requires_grad_(False)
model, muter = DigitNet(backbone, 32), MUterCallback()
trainer = L.Trainer(max_epochs=5, callbacks=[AdversarialTraining(attack), muter], **options)
trainer.fit(model, DataLoader(private, batch_size=50, shuffle=True))
print(muter.unlearn(model, forget=range(30), retain=private, refine=2))
trainer.test(model, datamodule=data)
