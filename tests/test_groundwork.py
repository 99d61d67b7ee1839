"""What a study's model is trained on, and in which state it is left."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchattacks
from torch.utils.data import Subset

from lightning_muter.curvature.inner.maximiser import InnerSolver
from lightning_muter.study.attacks import PGD
from lightning_muter.study.data import (
    ArrayDataset,
    BreastCancerDataModule,
    DigitsDataModule,
    LacunaDataModule,
    SplitDataModule,
)
from lightning_muter.study.models import Classifier, LogisticRegression, SmallCNN, SoftmaxRegression
from lightning_muter.study.setup import train as groundwork
from lightning_muter.study.setup.cache import Cache
from lightning_muter.study.setup.problem import World, head_vector
from tests.images import write_images

TRAINER = functools.partial(
    L.Trainer,
    accelerator="cpu",
    precision="64-true",
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
    enable_progress_bar=False,
)
CNN = functools.partial(SmallCNN, width=2, hidden=8, lr=0.05, weight_decay=1e-2)
SOFTMAX = functools.partial(SoftmaxRegression, weight_decay=1e-2)
ATTACK = functools.partial(torchattacks.PGDL2, eps=0.2, alpha=0.1, steps=2)


def build(
    data: SplitDataModule, model: Any = CNN, attack: Any = ATTACK, cache: Cache | None = None, **options: Any
) -> World:
    steps: list[str] = []
    recipe = groundwork.Recipe(
        data,
        model,
        attack,
        TRAINER,
        **{"trades_beta": None, "backbone_epochs": 1, "head_epochs": 1, "seed": 3, "key": "cnn", **options},
        weight_decay=1e-2,
        evaluation=PGD(1),
        snapshot_options={"inner": InnerSolver(1e-4, 5), "polish": 3} if model is CNN else {},
    )
    world = groundwork.build(recipe, cache if cache is not None else Cache(None), steps.append)
    assert len(steps) == groundwork.STEPS
    return world


def digits() -> DigitsDataModule:
    return DigitsDataModule(limit_train=150, val_fraction=0.0)


def test_the_backbone_never_sees_private_samples_and_the_head_no_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[ArrayDataset, bool]] = []
    original = groundwork.fit

    def spy(model: Classifier, loader: Any, *rest: Any) -> None:
        trained = any(p.requires_grad for p in model.backbone.parameters())
        seen.append((loader.dataset, trained))
        original(model, loader, *rest)

    monkeypatch.setattr(groundwork, "fit", spy)
    data = digits()
    world = build(data)
    assert [trained for _, trained in seen] == [True, False]
    backbone_saw, head_saw = (set(d.ids or []) for d, _ in seen)
    assert backbone_saw == set(data.public_dataset.ids or [])
    assert head_saw == set(data.private_dataset.ids or [])
    assert not backbone_saw & head_saw
    assert world.data is data.private_dataset


def test_the_head_is_stationary_and_the_backbone_frozen() -> None:
    world = build(digits(), SOFTMAX)
    assert world.base is not None
    assert world.base.stationarity < 1e-5
    assert not any(p.requires_grad for p in world.model.backbone.parameters())
    assert world.threat is not None
    assert (world.threat.norm, world.threat.eps, world.threat.box) == ("l2", 0.2, (0.0, 1.0))


def test_a_cached_backbone_gives_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(digits(), cache=Cache(tmp_path))
    trained: list[bool] = []
    original = groundwork.fit

    def spy(model: Classifier, *rest: Any) -> None:
        trained.append(any(p.requires_grad for p in model.backbone.parameters()))
        original(model, *rest)

    monkeypatch.setattr(groundwork, "fit", spy)
    second = build(digits(), cache=Cache(tmp_path))
    assert trained == [False]
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    build(digits(), cache=Cache(tmp_path), seed=4)
    assert trained == [False, True, False]


def test_tables_with_one_logit_and_standard_training() -> None:
    data = BreastCancerDataModule(limit_train=200)
    model = functools.partial(LogisticRegression, weight_decay=1e-2)
    attack = functools.partial(torchattacks.PGDL2, eps=0.3, alpha=0.1, steps=2)
    world = build(data, model, attack)
    assert world.threat is not None
    assert world.threat.box is None
    plain = build(data, model, None)
    assert plain.threat is None
    assert not torch.allclose(head_vector(plain.model), head_vector(world.model), atol=1e-3)


def test_a_public_part_with_other_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "private", ["p0", "p1"], n=12)
    write_images(tmp_path / "public", ["q0", "q1", "q2"], n=6)
    data = LacunaDataModule(root=tmp_path, size=8, val_fraction=0.0)
    world = build(data)
    assert world.model.head.out_features == 2


def test_without_a_public_part_the_backbone_keeps_its_initial_weights(caplog: pytest.LogCaptureFixture) -> None:
    data = DigitsDataModule(limit_train=150, val_fraction=0.0, public_fraction=0.0)
    world = build(data)
    torch.manual_seed(3)
    untouched = CNN(in_shape=data.in_shape, num_classes=10)
    for name, value in untouched.backbone.state_dict().items():
        torch.testing.assert_close(world.model.backbone.state_dict()[name].float(), value)
    assert "keeps its initial weights" in caplog.text


def test_retraining_from_zero_ends_where_training_did() -> None:
    """Forgetting nothing: the reference and the trained model minimise one strictly convex objective."""
    world = build(digits(), SOFTMAX)
    again = world.copy_model()
    again.reset_head()
    world.minimise(again, Subset(world.data, range(len(world.data))))
    distance = (head_vector(again) - head_vector(world.model)).norm() / head_vector(world.model).norm()
    assert distance < 1e-3
