"""Two processes: the end of the fit is shared out, each sample read by one of them; all get the same weights."""

from __future__ import annotations

import functools

import lightning as L
import torchattacks
from my import DigitNet, Digits

from lightning_muter import AdversarialTraining, MUterCallback

if __name__ == "__main__":  # every process runs this file
    L.seed_everything(0)
    model, data = DigitNet(), Digits(size=300)
    attack = functools.partial(torchattacks.PGDL2, eps=0.3, alpha=0.075, steps=5)
    muter = MUterCallback(dirpath="ddp")
    trainer = L.Trainer(
        max_epochs=3, callbacks=[AdversarialTraining(attack), muter], accelerator="cpu", devices=2, strategy="ddp",
        logger=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    result = muter.unlearn(model, forget=[3, 17], retain=data.train)  # the same call in every process
    if trainer.is_global_zero:
        print(result)
