"""A whole network: nothing of the size of its Hessian is stored, a request takes Newton-CG steps on the retained rows."""

from __future__ import annotations

import functools

import lightning as L
import torchattacks
from my import DigitNet, Digits
from torch import nn

from lightning_muter import AdversarialTraining, MUterCallback

L.seed_everything(0)
network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(64, 16), nn.SiLU())
model, data = DigitNet(network, 16), Digits(size=300)
attack = functools.partial(torchattacks.PGDL2, eps=0.3, alpha=0.1, steps=5)
muter = MUterCallback(scope="all", polish=5)  # or patterns: scope=["backbone.3.*", "head.*"]
trainer = L.Trainer(
    max_epochs=20, callbacks=[AdversarialTraining(attack), muter], logger=False, enable_checkpointing=False
)
trainer.fit(model, datamodule=data)
print(muter.unlearn(model, forget=range(15), refine=2))
trainer.test(model, datamodule=data)
