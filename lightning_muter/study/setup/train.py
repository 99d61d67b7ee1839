"""From configuration to a :class:`~lightning_muter.study.setup.problem.World`: train the backbone on the public part, the head on the
private part, both adversarially, and leave the head where its objective is stationary.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.adversarial.training import AdversarialTraining
from lightning_muter.study.attacks import Evaluation
from lightning_muter.study.data.arrays import ArrayDataset
from lightning_muter.study.data.base import SplitDataModule
from lightning_muter.study.models.base import Classifier
from lightning_muter.study.setup.cache import Cache, digest
from lightning_muter.study.setup.problem import World, data_digest

log = logging.getLogger(__name__)

STEPS = 3  # how often build() begins something

ModelFactory = Callable[..., Classifier]
TrainerFactory = Callable[..., L.Trainer]


@dataclass(frozen=True)
class Recipe:
    """What is trained, how, and for how long.

    Attributes:
        attack: a factory, or None for standard training.      key: of the model, for the cache.
        prepare: makes of the private part what is trained on.
    """

    data: SplitDataModule
    make_model: ModelFactory
    attack: Any
    make_trainer: TrainerFactory
    trades_beta: float | None
    weight_decay: float
    backbone_epochs: int
    head_epochs: int
    evaluation: Evaluation
    seed: int
    key: Any
    snapshot_options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[ArrayDataset], ArrayDataset] = lambda private: private

    @property
    def threat(self) -> ThreatModel | None:
        return threat_of(self.attack, self.data.threat_box)


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's remarks on a trainer that is used for a minute, off for a while."""
    # remarks come by the loggers of either package, whichever was imported
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .*dataloader. does not have many workers")
            warnings.filterwarnings("ignore", message="The number of training batches")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def threat_of(attack: Any, box: tuple[float, float] | None) -> ThreatModel | None:
    """The threat model of an attack factory on inputs of this box; None for standard training."""
    return None if attack is None else ThreatModel.from_attack(attack, box)


def adversarial(attack: Any, threat: ThreatModel | None, trades_beta: float | None) -> list[L.Callback]:
    """The callback that makes a fit adversarial; none for standard training."""
    if attack is None:
        return []
    return [
        AdversarialTraining(
            attack, threat_model=threat, trades_beta=trades_beta, adversarial_validation=False, adversarial_test=False
        )
    ]


def trained_backbone(recipe: Recipe, cache: Cache) -> dict[str, torch.Tensor]:
    """State of the backbone after adversarial training of the whole model on the public part, from the cache if there.

    The public part may have classes of its own; the head that it was trained with is thrown away.
    """
    data, threat, epochs = recipe.data, recipe.threat, recipe.backbone_epochs
    public = data.public_dataset

    def train() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        L.seed_everything(recipe.seed, verbose=False)
        model = recipe.make_model(in_shape=data.in_shape, num_classes=public.num_classes)
        loader = DataLoader(public, batch_size=data.batch_size, shuffle=True, num_workers=data.num_workers)
        fit(model, loader, recipe.make_trainer, epochs, adversarial(recipe.attack, threat, recipe.trades_beta))
        return {"epochs": epochs}, dict(model.backbone.state_dict())

    threat_key = None if threat is None else threat.to_dict()
    parts = [recipe.key, data_digest(public), threat_key, recipe.trades_beta, epochs, recipe.seed]
    (_, state), _ = cache.get_or_make("backbone", digest(parts), train)
    return state


def fit(
    model: Classifier, loader: DataLoader[Any], make_trainer: TrainerFactory, epochs: int, callbacks: list[L.Callback]
) -> None:
    """Train in silence; the model comes back on the CPU."""
    with quiet():
        make_trainer(max_epochs=epochs, callbacks=callbacks).fit(model, loader)
    model.cpu()


def assembled(make_model: ModelFactory, data: SplitDataModule, backbone: dict[str, torch.Tensor] | None) -> Classifier:
    """The model for the private part: the given backbone, frozen, and a zero head."""
    model = make_model(in_shape=data.in_shape, num_classes=data.num_classes)
    if backbone is not None:
        model.backbone.load_state_dict(copy.deepcopy(backbone))
    model.freeze_backbone()
    model.reset_head()
    return model


def build(recipe: Recipe, cache: Cache, begin: Callable[[str], None]) -> World:
    """Backbone on the public part, head on the private part, both adversarially; then the head to stationarity.

    Without a public part the backbone keeps its initial (or pretrained) weights, since training it on the private part
    would leave traces that head-scope unlearning cannot remove. ``begin`` is told what begins.
    """
    data, make_model, threat = recipe.data, recipe.make_model, recipe.threat
    torch.manual_seed(recipe.seed)
    probe = make_model(in_shape=data.in_shape, num_classes=data.num_classes)
    trainable = any(p.requires_grad for p in probe.backbone.parameters())
    backbone: dict[str, torch.Tensor] | None = None
    begin("backbone on the public part")
    if trainable and data.has_public:
        backbone = trained_backbone(recipe, cache)
    elif trainable:
        log.warning("No public part to train the backbone on: it keeps its initial weights (set public_fraction).")
    torch.manual_seed(recipe.seed)
    model = assembled(make_model, data, backbone)
    private = recipe.prepare(data.private_dataset)
    begin("head on the private part")
    L.seed_everything(recipe.seed, verbose=False)
    loader = DataLoader(private, batch_size=data.batch_size, shuffle=True, num_workers=data.num_workers)
    callbacks = adversarial(recipe.attack, threat, recipe.trades_beta)
    fit(model, loader, recipe.make_trainer, recipe.head_epochs, callbacks)
    world = World(
        model,
        private,
        data.test_dataset,
        threat,
        recipe.weight_decay,
        recipe.evaluation,
        recipe.seed,
        snapshot_options=dict(recipe.snapshot_options),
    )
    begin("head to stationarity")
    if recipe.trades_beta is None:
        world.settle()
    return world
