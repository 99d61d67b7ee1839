"""The head on a backbone of timm (pip install 'lightning-muter[timm]'); random weights here, yours come from a file."""

from __future__ import annotations

import functools

import lightning as L
import timm
import torchattacks
from my import DigitNet, Digits

from lightning_muter import AdversarialTraining, MUterCallback

L.seed_everything(0)
backbone = timm.create_model("test_resnet", pretrained=False, num_classes=0, in_chans=1).eval()
backbone.requires_grad_(False)  # frozen, and BatchNorm in eval mode: its features stay what they are
model, data = DigitNet(backbone, backbone.num_features), Digits(size=100)
attack = functools.partial(torchattacks.PGDL2, eps=0.3, alpha=0.15, steps=2)
muter = MUterCallback(budget=None)  # so short a fit gives polish no budget of its own
trainer = L.Trainer(
    max_epochs=5, callbacks=[AdversarialTraining(attack), muter], logger=False, enable_checkpointing=False
)
trainer.fit(model, datamodule=data)
print(muter.unlearn(model, forget=[3, 17]))
