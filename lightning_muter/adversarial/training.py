"""Adversarial training of any LightningModule: a mixin for one's own class, a callback for existing modules."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from torch import nn

from lightning_muter.adversarial.adversary import Adversary
from lightning_muter.adversarial.climb import LossAttack
from lightning_muter.adversarial.examples import LastExamples
from lightning_muter.adversarial.steps import (
    MARK,
    STATE,
    STEPS,
    AdversarialSteps,
    checked,
    dressed_as,
    has_attribute,
    refuse_unwrappable,
    steps_of,
)
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import RequestError, UnsuitableError
from lightning_muter.forgotten.modules import recorded_in, remember
from lightning_muter.lightning_names import MODULES, Callback, is_overridden
from lightning_muter.model.losses import Loss

if TYPE_CHECKING:
    from torchattacks.attack import Attack


_LOADING = ("on_load_checkpoint", "load_state_dict")  # where a module learns what its weights were made to forget


class AdversarialTrainingMixin:
    """Adversarial training for a LightningModule of one's own, in any order of base classes.

    Define ``configure_attack`` (as ``configure_optimizers``; called once per fit) and ``forward`` giving logits; leave
    ``training_step`` as it is, it receives the adversarial batch.

    Attributes:
        threat_model: a ``ThreatModel``, where the attack does not tell (unknown attacks, data outside [0, 1]).
        criterion: the loss that is maximised where ``training_step`` does not tell; default cross-entropy.
        trades_beta: TRADES: ``training_step`` receives the clean batch, and beta KL(clean || adversarial) is added.
        normalization: (mean, std) where the data come normalised: the attack is then in the scale of the data.
        adversarial_validation: log ``val/clean_acc`` and ``val/robust_acc``, for a regression ``..._loss``.
        adversarial_test: the same for ``test/...``.

    Example::

        class LitNet(AdversarialTrainingMixin, L.LightningModule):
            def configure_attack(self):
                return torchattacks.PGD(self, eps=8 / 255, alpha=2 / 255, steps=10)
    """

    threat_model: ThreatModel | None = None
    trades_beta: float | None = None
    normalization: Any = None
    adversarial_validation: bool = True
    adversarial_test: bool = True

    def configure_attack(self) -> Any:
        """The attack of this fit, asked for once at its start.

        Returns:
            a torchattacks attack or a factory of one, a ``LossAttack``, a ``ThreatModel``; None trains plainly.

        Raises:
            UnsuitableError: it was not defined.
        """
        raise UnsuitableError(
            f"{type(self).__name__} uses AdversarialTrainingMixin but has no configure_attack; define it, e.g. "
            "`def configure_attack(self): return torchattacks.PGD(self, eps=8/255)`, or return None to train plainly."
        )

    def unlearn(self, forget: Any, **kwargs: Any) -> Any:
        """Remove training samples by the ``MUterCallback`` of this module's trainer.

        Args:
            forget: positions in the training dataset.
            kwargs: as of :meth:`lightning_muter.MUterCallback.unlearn`.

        Returns:
            the :class:`lightning_muter.UnlearnResult`.

        Raises:
            RequestError: no trainer, or no (single) such callback on it.
        """
        trainer = getattr(self, "_trainer", None)
        callbacks = [] if trainer is None else trainer.callbacks
        found = [c for c in callbacks if callable(getattr(type(c), "unlearn", None)) and has_attribute(c, "snapshot")]
        if len(found) != 1:
            raise RequestError(
                f"unlearn needs the trainer that fitted this module, with one MUterCallback; found {len(found)}. Fit "
                "with L.Trainer(callbacks=[MUterCallback()]), or call unlearn(model, snapshot, forget, data)."
            )
        return found[0].unlearn(self, forget=forget, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in (*STEPS, "setup", "on_fit_start", "teardown", *_LOADING):
            provider = next((base for base in cls.__mro__ if name in vars(base)), None)
            if provider is None or getattr(vars(provider)[name], MARK, False):
                continue
            if name in STEPS:
                if provider in MODULES:  # no step at all: Lightning must keep seeing that
                    continue
                if _wanted(cls, name):
                    refuse_unwrappable(name, vars(provider)[name], provider.__name__)
            method = vars(provider)[name]
            # a method inherited from a class that knows nothing of this is looked up anew, along the instance's MRO
            own = _around(name, method) if provider is cls else _around(name, None, cls)
            setattr(cls, name, dressed_as(method, own))


def _wanted(owner: Any, name: str) -> bool:
    """Whether this step is to be attacked or measured at all."""
    return {
        "training_step": True,
        "validation_step": owner.adversarial_validation,
        "test_step": owner.adversarial_test,
    }[name]


def _around(name: str, step: Callable[..., Any] | None, cls: type | None = None) -> Callable[..., Any]:
    """The wrapper of one method of a mixin class: of its own ``step``, or of the next one after ``cls`` in the MRO."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = types.MethodType(step, self) if step is not None else getattr(super(cls, self), name)
        if name in STEPS:
            return _steps(self).run(self, name, bound, args, kwargs)
        if name == "on_load_checkpoint":
            remember(self, recorded_in(*args))
        if name in ("setup", "teardown"):  # a new run asks configure_attack anew; nothing stays on the module
            vars(self).pop(STATE, None)
        out = bound(*args, **kwargs)
        if name == "load_state_dict":
            remember(self, recorded_in({"state_dict": args[0] if args else kwargs["state_dict"]}))
        if name == "on_fit_start":
            adversary_of(self)  # built here, so that a bad attack fails at fit start
        return out

    return call


def _steps(module: Any) -> AdversarialSteps:
    """What is done around this module's steps: set by the callback, or by the mixin at the first need."""
    steps = steps_of(module)
    if steps is None and isinstance(module, AdversarialTrainingMixin):
        build = functools.partial(_build_for_mixin, module)
        steps = AdversarialSteps(build, module.adversarial_validation, module.adversarial_test)
        vars(module)[STATE] = steps
    return steps or AdversarialSteps(lambda: None, False, False)


def adversary_of(module: Any) -> Adversary | None:
    """The adversary this module trains against (threat, attack, loss, ``trades_beta``), or None for plain training."""
    return _steps(module).adversary


def examples_of(module: Any) -> LastExamples:
    """The adversarial examples of this module's last epoch, kept from the first call on (none for plain training)."""
    steps = _steps(module)
    if steps.examples is None:
        steps.examples = LastExamples()
    return steps.examples


def _build_for_mixin(module: Any) -> Adversary | None:
    attack = module.configure_attack()
    if attack is None:
        return None
    return checked(module, _adversary_of_mixin(module, attack))


def _adversary_of_mixin(module: Any, attack: Any) -> Adversary:
    return Adversary(module, attack, module.threat_model, None, module.trades_beta, normalization=module.normalization)


class AdversarialTraining(Callback):
    """Adversarial training for a module that knows nothing of it: wraps its steps for the time of a run.

    Args:
        attack: a factory ``attack(model)`` such as ``functools.partial(torchattacks.PGD, eps=8/255)`` (a Hydra
            ``_partial_``), a torchattacks attack on the module, a ``LossAttack``, a ``ThreatModel``; None climbs
            ``threat_model`` by our own maximiser.
        threat_model: where the attack does not tell (unknown attacks, data outside [0, 1]).
        loss: what is maximised; None: the loss of the module's own ``training_step``, read off its first batch. Where that is not
            the cross-entropy an attack library raises, the attack's eps, step size and steps drive our own climb of the step's loss.
        maximise: "attack" leaves the attack library its own loss, whatever the step minimises.
        inputs: key or position in a batch, where it cannot be told which tensor is the input.
        label: the same for the label.
        normalization: (mean, std) where the data come normalised: radius, step size and box are then in the scale of the data.
        trades_beta: train by TRADES: the step receives the clean batch, and beta KL(clean || adversarial) is added
            (H. Zhang et al., ICML 2019).
        adversarial_validation: log ``val/clean_acc`` and ``val/robust_acc``, for a regression ``..._loss``.
        adversarial_test: the same for ``test/...``.

    Raises:
        UnsuitableError: at the start of a run: the module has AdversarialTrainingMixin, or cannot be wrapped.

    >>> import functools, torchattacks
    >>> attack = functools.partial(torchattacks.PGDL2, eps=0.5, alpha=0.1, steps=10)
    >>> trainer = pl.Trainer(callbacks=[AdversarialTraining(attack)], accelerator="cpu", logger=False,
    ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    """

    def __init__(
        self,
        attack: Callable[[nn.Module], Attack]
        | Attack
        | LossAttack
        | ThreatModel
        | None = None,  # config files: a factory
        threat_model: ThreatModel | None = None,
        loss: Loss | None = None,
        trades_beta: float | None = None,
        adversarial_validation: bool = True,
        adversarial_test: bool = True,
        maximise: Literal["step", "attack"] = "step",
        inputs: str | int | None = None,
        label: str | int | None = None,
        normalization: Any = None,
    ) -> None:
        self.attack, self.threat_model, self.loss, self.trades_beta = attack, threat_model, loss, trades_beta
        self.maximise, self.inputs, self.label, self.normalization = maximise, inputs, label, normalization
        self.adversarial_validation, self.adversarial_test = adversarial_validation, adversarial_test
        self._module: pl.LightningModule | None = None
        self._replaced: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wrap the steps of this module for the run."""
        self._restore()
        if isinstance(pl_module, AdversarialTrainingMixin):
            raise UnsuitableError(
                f"{type(pl_module).__name__} has AdversarialTrainingMixin and the trainer the AdversarialTraining "
                "callback: the batch would be attacked twice. Keep one of the two."
            )
        if steps_of(pl_module) is not None:
            raise UnsuitableError("Two AdversarialTraining callbacks are attached; the batch would be attacked twice.")
        names = [name for name in STEPS if is_overridden(name, pl_module) and _wanted(self, name)]
        for name in names:
            method = getattr(pl_module, name)
            refuse_unwrappable(name, getattr(method, "__func__", method), type(pl_module).__name__)
        self._module = pl_module
        build = functools.partial(self._build, pl_module)
        vars(pl_module)[STATE] = AdversarialSteps(build, self.adversarial_validation, self.adversarial_test)
        for name in names:
            self._replaced[name] = vars(pl_module).get(name)
            call = _on_instance(name, self._replaced[name])
            vars(pl_module)[name] = types.MethodType(dressed_as(getattr(pl_module, name), call), pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the attack: a bad one fails here, not at the first batch."""
        adversary_of(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the module its own steps back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the module its own steps back: Lightning calls no teardown hook then."""
        self._restore()

    def _build(self, module: pl.LightningModule) -> Adversary:
        adversary = Adversary(
            module,
            self.attack,
            self.threat_model,
            self.loss,
            self.trades_beta,
            self.maximise,
            self.inputs,
            self.label,
            self.normalization,
        )
        return checked(module, adversary)

    def _restore(self) -> None:
        if self._module is None:
            return
        own = vars(self._module)
        own.pop(STATE, None)
        for name, before in self._replaced.items():
            own.pop(name, None)
            if before is not None:
                own[name] = before
        self._module, self._replaced = None, {}


def _on_instance(name: str, before: Callable[..., Any] | None) -> Callable[..., Any]:
    """The wrapper set on one instance; it asks the class for the step, so that a deep copy runs its own."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = before if before is not None else types.MethodType(getattr(type(self), name), self)
        return _steps(self).run(self, name, bound, args, kwargs)

    return call
