"""SIGTERM and Ctrl-C at any moment of the end of a fit: over within ten seconds, the checkpoint as trained, nothing half-written."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_muter.snapshot.snapshot import Snapshot
from tests.commands import environment

SCRIPT = """
import functools, sys, torch, torchattacks, lightning.pytorch as pl
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from lightning_muter import AdversarialTraining, MUterCallback

class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(288, 10))
    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=1e-3)

class Said(pl.Callback):
    def on_train_end(self, trainer, module):
        torch.save(module.state_dict(), sys.argv[1] + "/trained.pt")
        print("ended", flush=True)

torch.manual_seed(0)
data = TensorDataset(torch.rand(400, 1, 8, 8), torch.randint(10, (400,)))
muter = MUterCallback(budget=None, dirpath=sys.argv[1] + "/run", verbose=False)
attack = AdversarialTraining(functools.partial(torchattacks.PGD, eps=0.05, alpha=0.02, steps=5))
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[Said(), attack, muter],
    default_root_dir=sys.argv[1],
)
trainer.fit(Lit(), DataLoader(data, 100))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_of_a_fit_is_over_at_once(tmp_path, number):
    (tmp_path / "fit.py").write_text(SCRIPT)
    moments = random.Random(int(number))
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, tmp_path / "fit.py", folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment(),
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ended"
        time.sleep(moments.uniform(0, 4))
        process.send_signal(number)
        began = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - began < 10
        trained = torch.load(folder / "trained.pt", weights_only=True)
        (checkpoint,) = (p for p in folder.rglob("*.ckpt") if ".muter" not in p.name)
        stored = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all(torch.equal(stored[name], value) for name, value in trained.items())
        files = _files(folder / "run")
        assert not any("tmp" in name or "part" in name for name in files)
        if any(name.endswith(".snapshot") for name in files):  # all of them, or none
            assert {".ckpt", ".snapshot", ".key"} <= {Path(name).suffix for name in files}
            (snapshot,) = (folder / "run").glob("*.snapshot")
            assert isinstance(Snapshot.load(snapshot), Snapshot)


def _files(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
