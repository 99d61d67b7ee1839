"""Hard requests: what is put into the data, that it is what is asked for, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_muter.errors import ArgumentError
from lightning_muter.study.data import DigitsDataModule
from lightning_muter.study.data.arrays import ArrayDataset
from lightning_muter.study.hard_requests import Interclass, Mislabelled, Outliers
from lightning_muter.study.requests import Setting, Several

DIGITS = DigitsDataModule(limit_train=400).private_dataset


def asked(setting: Setting, data: ArrayDataset, seed: int = 0) -> list[int]:
    (scenario,) = setting.scenarios(data, seed)
    return scenario.forgotten(0)


@pytest.mark.parametrize("setting", [Mislabelled(0.1), Interclass((3, 8), 0.5)])
def test_exactly_what_was_relabelled_is_asked_for(setting: Setting) -> None:
    before = DIGITS.targets.clone()
    data = setting.prepare(DIGITS, 0)
    assert (data.targets != before).nonzero().flatten().tolist() == asked(setting, data)
    assert torch.equal(DIGITS.targets, before)
    assert asked(setting, data) == asked(setting, DIGITS)
    assert asked(setting, data, 1) != asked(setting, data)
    assert torch.equal(setting.prepare(DIGITS, 0).targets, data.targets)


def test_two_classes_are_exchanged_and_no_other() -> None:
    data = Interclass((3, 8), 0.5).prepare(DIGITS, 0)
    at = asked(Interclass((3, 8), 0.5), data)
    assert set(data.targets[at].tolist()) == {3, 8}
    assert torch.equal(data.targets[at], 11 - DIGITS.targets[at])


def test_wrong_labels_of_two_classes_are_the_other_one() -> None:
    parity = DigitsDataModule(classes=[[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]], limit_train=200).private_dataset
    data = Mislabelled(0.2).prepare(parity, 3)
    at = asked(Mislabelled(0.2), data, 3)
    assert torch.equal(data.targets[at], 1 - parity.targets[at])


def test_outliers_are_far_from_their_class() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(60, 5))
    x[[4, 31]] += 9.0  # sample 4 is near sample 31, but that one is of the other class
    y = np.arange(60) % 2
    data = ArrayDataset(torch.tensor(x), torch.tensor(y), num_classes=2)
    assert asked(Outliers(2 / 60), data) == [4, 31]
    assert Outliers().prepare(data, 0) is data


def test_several_prepare_one_after_the_other() -> None:
    both = Several([Mislabelled(0.05), Outliers(0.05)])
    data = both.prepare(DIGITS, 0)
    assert [s.labels[0] for s in both.scenarios(data, 0)] == ["5 % mislabelled", "5 % outliers"]
    assert torch.equal(data.targets, Mislabelled(0.05).prepare(DIGITS, 0).targets)


def test_wrong_classes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="classes: got"):
        Interclass((3, 30)).prepare(DIGITS, 0)
    with pytest.raises(ArgumentError, match="neighbours"):
        Outliers(neighbours=0)
