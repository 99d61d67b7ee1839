"""Requests as they come in, each saved; then the files prove what was done, and hold nothing older."""

from __future__ import annotations

import functools

import lightning as L
import torchattacks
from my import DigitNet, Digits

from lightning_muter import AdversarialTraining, MUterCallback, cli

L.seed_everything(0)
model, data = DigitNet(), Digits()
attack = functools.partial(torchattacks.PGDL2, eps=0.3, alpha=0.075, steps=10)
muter = MUterCallback(dirpath="requests_and_audit")
trainer = L.Trainer(
    max_epochs=5, callbacks=[AdversarialTraining(attack), muter], logger=False, enable_checkpointing=False
)
trainer.fit(model, datamodule=data)

for request in ([3], [17, 256], range(100, 110)):
    result = muter.unlearn(model, request, retain=data.train)
    print(f"{len(result.forgotten)} removed, at most {result.bound:.1e} from retraining, {result.seconds:.1f} s")
    muter.save()

muter.refresh(model)  # sums anew at the present weights: nothing that was computed before the requests is left
path = muter.save().with_name("model.ckpt")
retained = muter.retained(data.train)  # what may be trained on from now on
print(f"{len(retained)} of {len(data.train)} rows may be trained on")
cli.main(["audit", "--ckpt_path", str(path), "--verify"])
