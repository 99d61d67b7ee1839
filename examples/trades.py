"""A module of one's own with the mixin, trained by TRADES; every parameter is unlearned, matrix-free."""

from __future__ import annotations

import lightning as L
import torchattacks
from my import DigitNet, Digits
from torch import nn

from lightning_muter import AdversarialTrainingMixin, MUterCallback


class RobustNet(AdversarialTrainingMixin, DigitNet):
    """The step gets the clean batch; beta KL(clean || adversarial) is added to its loss."""

    trades_beta = 3.0

    def configure_attack(self):
        return torchattacks.PGDL2(self, eps=0.3, alpha=0.075, steps=5)


L.seed_everything(0)
backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.SiLU())
model, data = RobustNet(backbone, 16), Digits(size=300)
muter = MUterCallback(scope="all", polish=5)
trainer = L.Trainer(max_epochs=20, callbacks=[muter], logger=False, enable_checkpointing=False)
trainer.fit(model, datamodule=data)

print(model.unlearn([3, 17, 256], refine=1))  # the callback's; reads the retained rows
trainer.test(model, datamodule=data)
