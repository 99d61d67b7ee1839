"""Small studies: a world, what a method answers there, and how far from retraining that is."""

from __future__ import annotations

import functools

import torch

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.study.attacks import PGD
from lightning_muter.study.data import DigitsDataModule
from lightning_muter.study.methods.base import Competitor, Outcome
from lightning_muter.study.metrics import relative_parameter_distance
from lightning_muter.study.models import LogisticRegression, SoftmaxRegression
from lightning_muter.study.setup.problem import World, head_vector

FORGET = [2, 9, 30, 31]


@functools.cache
def world_of(norm: str, eps: float, one_logit: bool = False) -> World:
    classes = [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]] if one_logit else None
    dm = DigitsDataModule(limit_train=200, val_fraction=0.0, classes=classes)
    torch.manual_seed(0)
    model = (LogisticRegression if one_logit else SoftmaxRegression)(dm.in_shape, dm.num_classes).double()
    model.reset_head()
    threat = None if norm == "none" else ThreatModel(norm, eps)  # type: ignore[arg-type]
    world = World(model, dm.private_dataset, dm.test_dataset, threat, 1e-2, PGD(2), 0)
    world.settle()
    return world


def answer(world: World, method: Competitor) -> Outcome:
    return method.forget(method.start(world), FORGET, FORGET)


_references: dict[int, torch.Tensor] = {}  # by world; the worlds are cached for good


def reference(world: World) -> torch.Tensor:
    if id(world) not in _references:
        _references[id(world)] = head_vector(world.retrain(FORGET)[0])
    return _references[id(world)]


def distance(world: World, outcome: Outcome) -> float:
    assert outcome.parameters is not None
    return float(relative_parameter_distance(outcome.parameters, reference(world), head_vector(world.model)))
