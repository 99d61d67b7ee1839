"""What happens around the steps of a module that trains adversarially; one mechanism for the mixin and the callback.

``training_step`` receives the adversarial batch, unchanged in structure; ``validation_step`` and ``test_step`` run as
they are, and robust accuracy is logged beside clean accuracy afterwards.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_muter.adversarial.adversary import Adversary, divergence
from lightning_muter.adversarial.examples import LastExamples
from lightning_muter.errors import ArgumentError, UnsuitableError
from lightning_muter.lightning_names import MODULES, is_overridden
from lightning_muter.model.loss_identity import loss_identity
from lightning_muter.model.losses import accuracy, mean_loss
from lightning_muter.model.replay import replaying

STEPS = ("training_step", "validation_step", "test_step")
MARK = "_muter_wrapped"  # on wrapped methods
STATE = "_adversarial_steps"  # on the module: its AdversarialSteps


class AdversarialSteps:
    """What is done around the steps of one module; ``adversary`` is None where training is plain.

    The adversary is built at the first need: at fit start, when parameters exist and sit on their device.
    """

    def __init__(self, build: Callable[[], Adversary | None], validation: bool, test: bool) -> None:
        self._build: Callable[[], Adversary | None] | None = build
        self._adversary: Adversary | None = None
        self.measure = {"training_step": False, "validation_step": validation, "test_step": test}
        self.running = False  # an inner step (super().training_step) must not attack a second time
        self.told = False
        self.examples: LastExamples | None = None  # kept where somebody asks for them

    @property
    def adversary(self) -> Adversary | None:
        if self._build is not None:
            self._adversary = self._build()
            self._build = None
        return self._adversary

    def run(self, module: pl.LightningModule, name: str, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call ``step(*args, **kwargs)`` on the attacked batch (training), or measure afterwards (validation, test)."""
        if self.running or replaying.get() or (name != "training_step" and not self.measure[name]):
            return step(*args, **kwargs)
        self.running = True
        try:
            adversary = self.adversary
            if adversary is None:
                return step(*args, **kwargs)
            if name == "training_step":
                return self._train(adversary, module, step, args, kwargs)
            out = step(*args, **kwargs)
            _measure(adversary, module, name.removesuffix("_step"), _batch(step, args, kwargs)[0])
            return out
        finally:
            self.running = False

    def _train(
        self, adversary: Adversary, module: pl.LightningModule, step: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        batch, put = _batch(step, args, kwargs)
        adversary.read(module, batch)
        try:
            x, y, rebuild = adversary.split(batch)
            found = adversary(x, y)
        except (ArgumentError, UnsuitableError) as error:
            if adversary.unread is None:
                raise
            raise UnsuitableError(
                f"The attack does not know what to raise. The step's own loss cannot be read: {adversary.unread} In its place, "
                f"{loss_identity(adversary.loss)} of forward's output cannot be raised either: {error}"
            ) from error
        if self.examples is not None:
            self.examples.add(x, found)
        if not self.told:
            self.told = True
            if adversary.attack is not None and adversary.why_own is not None:
                rank_zero_info(f"Adversarial training climbs with LossAttack: {adversary.why_own}.")
            if adversary.unread is not None:
                rank_zero_warn(
                    f"The attack raises {loss_identity(adversary.loss)}, for the step's own loss is not known: {adversary.unread}"
                )
        if adversary.trades_beta is None:
            args, kwargs = put(rebuild(found))
            return step(*args, **kwargs)
        return _add_trades(adversary, step(*args, **kwargs), x, found)


def _add_trades(adversary: Adversary, out: Any, x: Tensor, found: Tensor) -> Any:
    """The step's own loss on the clean batch + beta mean KL(clean || adversarial)."""
    if out is None:  # the step asks to skip this batch
        return None
    beta = adversary.trades_beta
    assert beta is not None
    term = beta * divergence(adversary.logits(x), adversary.logits(found)).mean()
    if isinstance(out, Tensor):
        return out + term
    return {**out, "loss": out["loss"] + term}


def _measure(adversary: Adversary, module: pl.LightningModule, stage: str, batch: Any) -> None:
    """Log clean and robust accuracy (for a regression: losses), exact over the epoch, on one or more processes."""
    trainer = module._trainer
    if trainer is None or trainer.barebones:
        return
    if trainer.sanity_checking and adversary.asks:  # the step's loss is read with the first batch of training
        return
    x, y, _ = adversary.split(batch)
    found = adversary(x, y)
    stage = {"validation": "val"}.get(stage, stage)
    with torch.no_grad():
        for kind, inputs in (("clean", x), ("robust", found)):
            logits = adversary.logits(inputs)
            value, what = accuracy(adversary.loss, logits, y), "acc"
            if value is None:
                value, what = mean_loss(adversary.loss, logits, y), "loss"
            name = f"{stage}/{kind}_{what}"
            module.log(name, value, on_step=False, on_epoch=True, batch_size=len(x), sync_dist=True)


def _batch(step: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    """The batch among the arguments of a step (its first, positional or by name), and how to replace it."""
    if args:
        return args[0], lambda new: ((new, *args[1:]), kwargs)
    name = next(iter(inspect.signature(step).parameters))
    return kwargs[name], lambda new: ((), {**kwargs, name: new})


def refuse_unwrappable(name: str, step: Any, owner: str) -> None:
    """Say which steps cannot be wrapped.

    Raises:
        UnsuitableError: ``step`` is no ordinary method, or fetches its own batches.
    """
    if not isinstance(step, types.FunctionType):
        raise UnsuitableError(
            f"{owner}.{name} is a {type(step).__name__}, which cannot be wrapped for adversarial training; write it as "
            "an ordinary method."
        )
    if "dataloader_iter" in inspect.signature(step).parameters:
        raise UnsuitableError(
            f"{owner}.{name} takes dataloader_iter and fetches its own batches, so that none can be attacked; write it "
            f"as {name}(self, batch, batch_idx), or switch its adversarial measurement off if it is no training step."
        )


def dressed_as(step: Any, call: Callable[..., Any]) -> Any:
    """``call`` dressed as ``step``: Lightning looks through exactly one ``__wrapped__`` for the arguments' names."""
    wrapped: Any = functools.wraps(step)(call)
    wrapped.__wrapped__ = getattr(step, "__wrapped__", step)
    setattr(wrapped, MARK, True)
    return wrapped


def steps_of(module: Any) -> AdversarialSteps | None:
    """What is done around this module's steps while a run lasts, or None."""
    return vars(module).get(STATE)


def checked(module: Any, adversary: Adversary) -> Adversary:
    """Refuse what would train otherwise than asked."""
    if (doubt := adversary.threat.doubt()) is not None and not _told_by_callback(module):
        warnings.warn(doubt, UserWarning, stacklevel=2)
    if isinstance(module, MODULES):
        trains = is_overridden("training_step", module)
        if trains and not getattr(module.training_step, MARK, False) and module._compiler_ctx is None:
            raise UnsuitableError(
                "training_step was replaced after the class was made, so that no batch would be attacked; define it in "
                "the class."
            )
        if adversary.model is module and not trains and not is_overridden("forward", module):
            raise UnsuitableError(
                "The module has no forward(x) giving logits, which is what an attack attacks; define it."
            )
        if adversary.trades_beta is not None and not module.automatic_optimization:
            raise UnsuitableError(
                "TRADES adds its term to the loss that training_step returns, which manual optimisation never uses; "
                "use automatic optimisation, or add the term in training_step yourself and train without trades_beta."
            )
    return adversary


def _told_by_callback(module: Any) -> bool:
    """Whether a callback that unlearns inspects everything at fit start."""
    callbacks = getattr(getattr(module, "_trainer", None), "callbacks", [])
    return any(has_attribute(c, "unlearn") and has_attribute(c, "snapshot") for c in callbacks)


def has_attribute(thing: Any, name: str) -> bool:
    """Like ``hasattr``, without running a property."""
    return name in vars(thing) or hasattr(type(thing), name)
