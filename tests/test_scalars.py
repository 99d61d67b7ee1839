"""Radii and step sizes in any form, and the hint where they are on another scale than the inputs."""

from __future__ import annotations

import functools
import warnings
from decimal import Decimal
from fractions import Fraction

import lightning as L
import numpy as np
import pytest
import torch
import torchattacks
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, MUterCallback, ThreatModel
from lightning_muter.adversarial.adversary import Adversary
from lightning_muter.adversarial.scalars import as_number
from lightning_muter.errors import ArgumentError
from lightning_muter.study import experiment
from lightning_muter.study.hydra import resolvers

FORMS = {
    "float": 0.03,
    "np.float16": np.float16(0.03),
    "np.float32": np.float32(0.03),
    "np.float64": np.float64(0.03),
    "np array": np.array(0.03),
    "torch float32": torch.tensor(0.03),
    "torch float64": torch.tensor([0.03], dtype=torch.float64),
    "parameter": nn.Parameter(torch.tensor(0.03)),
    "fraction": Fraction(3, 100),
    "decimal": Decimal("0.03"),
    "text": "3/100",
}


@pytest.mark.parametrize("form", FORMS)
def test_radius_and_step_in_any_form(form):
    value = FORMS[form]
    assert as_number(value) == 0.03
    assert ThreatModel("l2", value).eps == 0.03
    if form in ("text", "decimal"):  # torchattacks itself takes none
        return
    attack = functools.partial(torchattacks.PGD, eps=value, alpha=value, steps=np.int64(5))
    adversary = Adversary(nn.Linear(2, 2), attack, ThreatModel("linf", 0.03, None))
    assert ThreatModel.from_attack(attack) == ThreatModel("linf", 0.03)
    assert (adversary._own.alpha, adversary._own.steps) == (0.03, 5)


@pytest.mark.parametrize(
    "value", [None, True, torch.tensor(True), 1j, torch.tensor(1j), [0.1], torch.ones(2), "a", "1/0"]
)
def test_what_is_no_number(value):
    assert as_number(value) is None
    with pytest.raises(ArgumentError, match="eps"):
        ThreatModel("l2", value)


def test_boxes_in_any_form():
    assert ThreatModel("l2", 1, (np.float32(-0.1), torch.tensor(0.3))).box == (-0.1, 0.3)
    for box in ((0,), (1, 0), (0, None)):
        with pytest.raises(ArgumentError, match="box"):
            ThreatModel("l2", 1, box)


@pytest.mark.parametrize(
    ("threat", "said"),
    [
        (ThreatModel("linf", 8), "eps=8/255"),
        (ThreatModel("linf", 1), "any input into any other"),
        (ThreatModel("l2", 8), "eps=8/255"),
        (ThreatModel("linf", 8, (-1, 1)), "any input"),
        (ThreatModel("linf", 8, (0, 255)), None),
        (ThreatModel("linf", 8 / 255), None),
        (ThreatModel("l2", 2.5), None),
        (ThreatModel("l2", 8, None), None),
    ],
)
def test_a_radius_on_another_scale(threat, said):
    assert (threat.doubt() is None) if said is None else (said in threat.doubt())


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-2)


@pytest.mark.parametrize("both", [True, False])
def test_the_hint_comes_before_training_once(both):
    data = TensorDataset(torch.rand(8, 4), torch.arange(8) % 2)
    callbacks = [AdversarialTraining(attack=functools.partial(torchattacks.PGD, eps=8, alpha=2, steps=2))]
    callbacks += [MUterCallback(verbose=False, polish=0)] if both else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        L.Trainer(
            max_epochs=1, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
        ).fit(Net(), DataLoader(data, 8))  # fmt: skip
    assert len([w for w in caught if "eps=8/255" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("overrides", "eps", "alpha"),
    [
        (["attack.eps=8/255"], 8 / 255, 2 / 255),
        (["attack.eps=8/255", "attack.alpha=1/255"], 8 / 255, 1 / 255),
        (["attack.build.eps=4/255", "attack.build.alpha=2/255"], 4 / 255, 2 / 255),
    ],
)
@pytest.mark.parametrize("group", ["pgd_linf", "pgd_l2", "trades"])
def test_hydra_overrides_take_fractions(group, overrides, eps, alpha):
    with initialize_config_dir(str(experiment.config_dir()), version_base="1.3"):
        config = compose("config", overrides=[f"attack={group}", "weight_decay=1/1000", *overrides])
    resolvers.with_numbers(config)
    attack = instantiate(config.attack.build, _convert_="all")(nn.Linear(2, 2))
    assert (attack.eps, attack.alpha) == (pytest.approx(eps), pytest.approx(alpha))
    assert config.weight_decay == 1e-3
