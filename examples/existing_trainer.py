"""A trainer you have: two callbacks, and its samples can be removed afterwards."""

from __future__ import annotations

import functools

import lightning as L
import torchattacks
from my import DigitNet, Digits

from lightning_muter import AdversarialTraining, MUterCallback, check

L.seed_everything(0)
model, data = DigitNet(), Digits()

attack = functools.partial(torchattacks.PGDL2, eps=0.3, alpha=0.075, steps=10)
muter = MUterCallback(dirpath="existing_trainer")
callbacks = [AdversarialTraining(attack=attack), muter]
print(check(model, data, callbacks=callbacks))  # in seconds: whether the fit will end with a snapshot

trainer = L.Trainer(max_epochs=5, callbacks=callbacks, logger=False, enable_checkpointing=False)
trainer.fit(model, datamodule=data)
print(muter.snapshot)

print(muter.unlearn(model, forget=[3, 17, 256]))  # from stored sums alone
result = muter.unlearn(model, forget=[5, 9], retain=data.train, refine=2)  # nearer still, and certified
print(result)
print("files:", muter.save())  # checkpoint, snapshot and ledger in one transaction
trainer.test(model, datamodule=data)
