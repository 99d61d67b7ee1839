"""Every configuration file composes, and every object it names can be built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from lightning_muter.errors import ArgumentError
from lightning_muter.study import experiment
from lightning_muter.study.attacks import Evaluation
from lightning_muter.study.data import SplitDataModule
from lightning_muter.study.hydra import resolvers
from lightning_muter.study.methods.base import Competitor
from lightning_muter.study.models import Classifier
from lightning_muter.study.requests import Setting
from lightning_muter.study.setup.train import threat_of
from tests.configs import CONF, composed


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def built(node: Any) -> Any:
    return instantiate(node, _convert_="all")


def test_every_group_has_files_and_every_file_a_group() -> None:
    groups = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {"."}
    assert groups == {"dataset", "attack", "model", "method", "request", "evaluation", "trainer", "experiment", "audit"}


@pytest.mark.parametrize("name", names("dataset"))
def test_datasets(name: str, tmp_path: Path) -> None:
    (tmp_path / "ann").mkdir()
    (tmp_path / "bob").mkdir()
    from PIL import Image

    for who in ("ann", "bob"):
        Image.new("RGB", (4, 4)).save(tmp_path / who / "a.png")
    overrides = [f"dataset.module.root={tmp_path}"] if name in ("lacuna10", "image_folder") else []
    if name == "image_archive":
        np.savez(tmp_path / "a.npz", x_train=np.zeros((4, 8, 8), np.uint8), y_train=np.array([0, 1, 0, 1]))
        overrides = [f"dataset.module.path={tmp_path / 'a.npz'}"]
    config = composed(f"dataset={name}", "seed=7", *overrides)
    data = built(config.dataset.module)
    assert isinstance(data, SplitDataModule)
    assert data.seed == 7
    assert data.num_classes >= 2
    assert config.dataset.name == name


@pytest.mark.parametrize("name", names("attack"))
def test_attacks(name: str) -> None:
    config = composed(f"attack={name}", "attack.eps=8/255")
    attack = None if config.attack.build is None else built(config.attack.build)
    threat = threat_of(attack, (0.0, 1.0))
    if name == "none":
        assert threat is None
        return
    assert threat is not None
    assert threat.eps == pytest.approx(8 / 255)
    assert threat.norm == ("l2" if name.endswith("l2") else "linf")
    made = attack(torch.nn.Linear(2, 2))
    assert isinstance(made, torchattacks.attack.Attack)
    if hasattr(made, "alpha"):
        assert made.alpha * made.steps == pytest.approx(2.5 * 8 / 255)


@pytest.mark.parametrize("name", names("model"))
def test_models(name: str) -> None:
    extra = ["model.module.weights=null"] if name == "pretrained" else []
    config = composed(f"model={name}", "weight_decay=0.02", *extra)
    if name == "wideresnet28_10":
        config.model.module.depth, config.model.module.widen = 10, 1
    model = built(config.model.module)(in_shape=(3, 32, 32), num_classes=2)
    assert isinstance(model, Classifier)
    assert model.weight_decay == 0.02
    assert all(group["weight_decay"] == 0.02 for group in model.configure_optimizers().param_groups)
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 1 if name in ("logistic", "ridge") else 2)


@pytest.mark.parametrize("name", names("method"))
def test_methods(name: str) -> None:
    config = composed(f"method=[{name}]")
    (method,) = experiment.methods_of(config)
    assert isinstance(method, Competitor)
    assert type(method).__doc__, "says what it does"
    assert list(config.method) == [name]


def test_all_methods_at_once_have_labels_of_their_own() -> None:
    config = composed(f"method=[{','.join(names('method'))}]")
    assert len(experiment.methods_of(config)) == len(names("method"))
    config.method.nothing.label = "fine-tuning"
    with pytest.raises(ArgumentError, match="different label"):
        experiment.methods_of(config)


@pytest.mark.parametrize("name", names("request"))
def test_requests(name: str) -> None:
    extra = ["request.ids_file=ids.txt"] if name == "records" else []
    assert isinstance(built(composed(f"request={name}", *extra).request), Setting)


@pytest.mark.parametrize("name", names("evaluation"))
def test_evaluations(name: str) -> None:
    assert isinstance(built(composed(f"evaluation={name}").evaluation), Evaluation)


@pytest.mark.parametrize("name", names("trainer"))
def test_trainers(name: str) -> None:
    trainer = built(composed(f"trainer={name}", "trainer.accelerator=cpu").trainer)(max_epochs=1)
    assert trainer.max_epochs == 1
    assert trainer.precision == ("32-true" if name == "single" else "64-true")


@pytest.mark.parametrize("name", names("experiment"))
def test_experiments_resolve(name: str) -> None:
    config = composed(f"experiment={name}")
    assert OmegaConf.to_container(config, resolve=True)
    assert experiment.methods_of(config)


def test_the_default_is_the_main_job() -> None:
    config = composed()
    assert (config.dataset.name, config.attack.name, config.model.name) == ("digits", "pgd_l2", "cnn")
    labels = [m.label for m in experiment.methods_of(config)]
    assert labels[:2] == ["constraint-aware", "constraint-aware + 2 refine"]
    assert labels[-1] == "doing nothing"
    assert "retraining, warm start" in labels  # the noise floor
    assert config.request.fractions == [0.05]
    assert config.trainer.precision == "64-true"


def test_numbers_in_configurations() -> None:
    config = OmegaConf.create({"a": "8/255", "b": "${number:${a}}", "c": "${product:2,${a}}", "d": "${number:abc}"})
    assert config.b == 8 / 255
    assert config.c == 16 / 255
    with pytest.raises(InterpolationResolutionError, match="fraction such as 8/255"):
        _ = config.d
    with pytest.raises(ArgumentError, match="fraction"):
        resolvers.number("1/0")
    with pytest.raises(ArgumentError, match="finite"):
        resolvers.number(float("nan"))
