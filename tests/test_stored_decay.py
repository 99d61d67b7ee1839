"""Weight decay comes from the optimiser that trained: off the checkpoint, whatever today's code says."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import Snapshot, cli
from lightning_muter.errors import UnsuitableError
from lightning_muter.model.stored_decay import stored_decay

SGD, ADAM = optim.SGD, optim.Adam


class Net(nn.Module):
    """``configure_optimizers`` is what the code says today."""

    def __init__(self, today=None):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.today = today

    def forward(self, x):
        return self.head(self.body(x))

    def configure_optimizers(self):
        if self.today is None:
            raise RuntimeError("needs the trainer that only the training had")
        return self.today(self)


def one(decay=0.01, kind=SGD, **kw):
    return lambda net: kind(net.parameters(), lr=0.1, weight_decay=decay, **kw)


def undecayed_bias(decay, kind=SGD, named=False):
    def build(net):
        parts = [[], []]
        for item in net.named_parameters():
            parts["bias" in item[0]].append(item if named else item[1])
        return kind([{"params": parts[1], "weight_decay": 0.0}, {"params": parts[0], "weight_decay": decay}], lr=0.1)

    return build


def trained(build, steps=1):
    """A checkpoint of a training with this optimiser, as Lightning writes it."""
    net = Net()
    optimizers = build(net)
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    for _ in range(steps):
        net(torch.randn(5, 3)).square().sum().backward()
        for o in optimizers:
            o.step()
    return {"optimizer_states": [o.state_dict() for o in optimizers]}


def decays(found):
    return {found["body.weight"], found["head.weight"]}, {found["body.bias"], found["head.bias"]}


@pytest.mark.parametrize("kind", [SGD, ADAM, optim.Adagrad, optim.Adadelta, optim.ASGD, optim.RMSprop, optim.NAdam])
@pytest.mark.parametrize("today", ["none", "same", "other decay"])
def test_one_group(kind, today):
    code = {"none": None, "same": one(0.5, kind), "other decay": one(0.01, kind)}[today]
    assert decays(stored_decay(trained(one(0.5, kind)), Net(code))) == ({0.5}, {0.5})


def test_another_optimiser_today():
    assert decays(stored_decay(trained(one(0.5, ADAM)), Net(one(0.01, SGD)))) == ({0.5}, {0.5})
    assert decays(stored_decay(trained(one(0.5, SGD, momentum=0.9)), Net(one(0.01, optim.AdamW)))) == ({0.5}, {0.5})


def test_groups_are_matched_by_todays_groups_or_by_their_own_names():
    checkpoint = trained(undecayed_bias(0.5))
    assert decays(stored_decay(checkpoint, Net(undecayed_bias(0.01)))) == ({0.5}, {0.0})
    with pytest.raises(UnsuitableError, match=r"cannot be matched.*weight_decay"):
        stored_decay(checkpoint, Net(one(0.01)))
    named = trained(undecayed_bias(0.5, named=True))
    if "param_names" in named["optimizer_states"][0]["param_groups"][0]:  # torch 2.6
        assert decays(stored_decay(named, Net())) == ({0.5}, {0.0})


def test_parameters_of_other_shapes_are_not_taken_for_the_same():
    """Today the groups have the sizes of the stored ones in another order; the momenta tell."""

    def turned(net):
        ordered = [net.head.weight, net.head.bias, net.body.weight, net.body.bias]
        return ADAM([{"params": ordered[:2]}, {"params": ordered[2:], "weight_decay": 0.5}], lr=0.1)

    def straight(net):
        return ADAM([{"params": net.body.parameters()}, {"params": net.head.parameters(), "weight_decay": 0.1}], lr=0.1)

    with pytest.raises(UnsuitableError, match="cannot be matched"):
        stored_decay(trained(turned), Net(straight))


def test_several_optimisers():
    def build(net):
        return [SGD(net.head.parameters(), lr=0.1, weight_decay=0.5), ADAM(net.body.parameters(), lr=0.1)]

    found = stored_decay(trained(build), Net(build))
    assert (found["head.weight"], found["body.weight"]) == (0.5, 0.0)


def test_decoupled_and_unknown_optimisers_are_refused():
    with pytest.raises(UnsuitableError, match="AdamW decouples"):
        stored_decay(trained(one(0.5, optim.AdamW)), Net())
    with pytest.raises(UnsuitableError, match=r"cannot be told from the checkpoint.*--weight_decay"):
        stored_decay(trained(one(0.5, optim.Adamax)), Net())  # keeps what Lion and LAMB keep
    assert decays(stored_decay(trained(one(0.5, optim.Adamax)), Net(one(0.1, optim.Adamax)))) == ({0.5}, {0.5})


def test_without_decay_or_without_states():
    assert decays(stored_decay(trained(one(0.0, optim.AdamW)), Net())) == ({0.0}, {0.0})
    assert stored_decay({"optimizer_states": []}, Net()) is None
    assert stored_decay({}, Net()) is None


def test_schedulers_add_to_the_groups():
    def build(net):
        o = one(0.5, SGD, momentum=0.9)(net)
        optim.lr_scheduler.OneCycleLR(o, 1.0, 10)
        return o

    assert decays(stored_decay(trained(build), Net())) == ({0.5}, {0.5})


class LitNet(L.LightningModule):
    decay = 0.01

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1, weight_decay=self.decay)


class Rows(L.LightningDataModule):
    def train_dataloader(self):
        x = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x[:, 0] > 0.5).long()), 20)


def test_the_command_takes_the_decay_that_was_trained_with_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, enable_model_summary=False, **quiet)
    net = LitNet()
    net.decay = 0.5
    trainer.fit(net, datamodule=Rows())
    trainer.save_checkpoint("a.ckpt", weights_only=False)
    trainer.save_checkpoint("weights.ckpt", weights_only=True)
    common = ["--model", f"{__name__}.LitNet", "--data", f"{__name__}.Rows", "--trainer.accelerator", "cpu"]
    common += ["--trainer.logger", "false", "--threat_model.norm", "l2", "--threat_model.eps", "0.05"]
    for name, extra, decay, said in (
        ("a", [], 0.5, "weight_decay: 0.5, of the optimiser in the checkpoint"),
        ("weights", [], 0.01, "weight_decay: 0.01, of configure_optimizers() as it is today"),
        ("weights", ["--weight_decay", "0.2", "--out", "b.ckpt"], 0.2, "weight_decay: 0.2, given"),
    ):
        capsys.readouterr()
        assert cli.main(["snapshot", *common, "--ckpt_path", f"{name}.ckpt", *extra]) == 0
        assert said in capsys.readouterr().out
        out = "b" if extra else name
        assert float(Snapshot.load(f"{out}.muter.snapshot").decay[0, 0]) == decay
