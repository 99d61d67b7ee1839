"""`import pytorch_lightning as pl` works like `import lightning as L`: callbacks, mixin, module, trainer, command line."""

from __future__ import annotations

import functools

import lightning as L
import pytest
import torch
import torchattacks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, AdversarialTrainingMixin, MUterCallback, Snapshot, ThreatModel, cli
from lightning_muter.preflight.checks import inspect_hooks

other = pytest.importorskip("pytorch_lightning")
LINF = ThreatModel("linf", 0.02)
PGD = functools.partial(torchattacks.PGD, eps=0.02, steps=2)
OPTIONS = {
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


def _data() -> TensorDataset:
    x = torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:, 0] > 0.5).long())


def _net(name, *mixins):
    class Net(*mixins, name.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters()
            self.head, self.moved = nn.Linear(4, 2), 0.0

        def forward(self, x):
            return self.head(x)

        def training_step(self, batch, _):
            self.received = batch[0]
            return F.cross_entropy(self(batch[0]), batch[1])

        def on_train_batch_end(self, *_):
            self.moved = max(self.moved, float((self.received - _data().tensors[0]).abs().max()))

        def validation_step(self, batch, _):
            self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_attack(self):
            return PGD(self)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-2)

    torch.manual_seed(0)
    return Net()


CloudNet = _net(other).__class__  # for the command line, by class path


class CloudData(other.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(_data(), 40)


@pytest.mark.parametrize("way", ["mixin", "callback", "plain"])
def test_both_names_give_the_same_model(way):
    heads = []
    for name in (L, other):
        muter = MUterCallback(threat_model=LINF if way == "plain" else None, verbose=False)
        callbacks = [AdversarialTraining(attack=PGD), muter] if way == "callback" else [muter]
        net = _net(name, *([AdversarialTrainingMixin] if way == "mixin" else []))
        trainer = name.Trainer(callbacks=callbacks, **OPTIONS)
        trainer.fit(net, DataLoader(_data(), 40), DataLoader(_data(), 40))
        assert net.moved == pytest.approx(0.0 if way == "plain" else 0.02)
        assert ("val/robust_acc" in trainer.callback_metrics) == (way != "plain")
        result = net.unlearn([1]) if way == "mixin" else muter.unlearn(net, [1])
        assert result.forgotten == [1]
        heads.append(net.head.weight.detach())
    torch.testing.assert_close(*heads)


def test_a_single_callback_and_one_name_for_the_other_class():
    muter = MUterCallback(threat_model=LINF, verbose=False)
    net = _net(other)
    trainer = other.Trainer(callbacks=muter, **OPTIONS)  # no list: recognised by its class
    trainer.fit(net, DataLoader(_data(), 40), DataLoader(_data(), 40))
    assert muter.unlearn(net, [1]).forgotten == [1]
    for name in (L, other):
        assert isinstance(muter, name.Callback)
        assert isinstance(AdversarialTraining(), name.Callback)


def test_hooks_of_the_other_names_modules_are_seen():
    class Moving(CloudNet):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

    (found,) = inspect_hooks(other.Trainer(**OPTIONS), Moving())
    assert "Moving.on_after_batch_transfer is run" in str(found)


def test_the_command_line_takes_a_pytorch_lightning_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(
        f"model: {{class_path: {__name__}.CloudNet}}\ndata: {{class_path: {__name__}.CloudData}}\n"
        "trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}\n"
    )
    other.Trainer(**{**OPTIONS, "max_epochs": 0}).strategy.connect(net := _net(other))
    torch.save({"state_dict": net.state_dict(), "pytorch-lightning_version": other.__version__}, "a.ckpt")
    common = ["--config", "config.yaml", "--ckpt_path"]
    threat = ["--threat_model.norm", "linf", "--threat_model.eps", "0.02"]
    assert cli.main(["snapshot", *common, "a.ckpt", *threat]) == 0
    assert cli.main(["unlearn", *common, "a.muter.ckpt", "--forget.indices", "[3]"]) == 0
    assert Snapshot.load("a.muter.snapshot").forgotten == [3]
