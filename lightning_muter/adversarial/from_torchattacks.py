"""What an attack object stands for, read off its attributes: norm and eps of its ball, and how it climbs.

Nothing of torchattacks is imported here, so that reading an attack costs nothing to those who use none.
"""

from __future__ import annotations

import functools
import types
from typing import Any, Literal, NamedTuple

from torch import nn

from lightning_muter.adversarial.scalars import as_number
from lightning_muter.errors import ArgumentError

Norm = Literal["l2", "linf"]

# Attacks whose result is a point of one norm ball around the sample, chosen to raise the loss. Not here: minimum-norm,
# sparse, spatial and black-box ones, and those for randomised smoothing (they maximise another loss).
_NORM_OF: dict[str, Norm] = {
    **dict.fromkeys(("FGSM", "FFGSM", "RFGSM", "BIM", "PGD", "EOTPGD", "TPGD", "MIFGSM", "NIFGSM", "UPGD"), "linf"),
    "PGDL2": "l2",
}
_NORM_NAMES: dict[str, Norm] = {"Linf": "linf", "linf": "linf", "inf": "linf", "L2": "l2", "l2": "l2"}
_FROM_CLEAN = ("FGSM", "BIM", "MIFGSM", "NIFGSM")
_CHOICES = (
    f"{', '.join(_NORM_OF)} of torchattacks (or a factory of one, such as functools.partial), an attack with `norm` "
    "('Linf' or 'L2') and `eps`, a LossAttack, a ThreatModel"
)


class Climb(NamedTuple):
    """How an attack climbs; ``None`` where it does not say."""

    alpha: float | None
    steps: int | None
    random_start: bool


def read_ball(attack: Any) -> tuple[Norm, float]:
    """Norm and radius of an attack, or of what a factory ``attack(model)`` builds (it is tried on a tiny module).

    Raises:
        ArgumentError: the set of perturbations is unknown or ambiguous, the attack is targeted, or normalises inputs.
    """
    if is_factory(attack):
        return read_ball(_build(attack, nn.Linear(1, 1)))
    if getattr(attack, "normalization_used", None) is not None:
        raise ArgumentError(
            "attack",
            attack,
            "an attack without set_normalization_used",
            "Pass normalization=(mean, std) to the adversarial training instead, or put it inside the model (its first layer).",
        )
    if getattr(attack, "targeted", False) is True:
        raise ArgumentError("attack", attack, "an untargeted attack", "A targeted attack does not maximise the loss.")
    name = _known_class(attack)
    own = getattr(attack, "__dict__", {})
    norm: Norm | None = None
    if name is not None:
        norm = _NORM_OF[name]
    elif isinstance(own.get("norm"), str):
        norm = _NORM_NAMES.get(own["norm"])
    eps = as_number(own.get("eps"))
    if norm is None or eps is None:
        advice = "Pass threat_model=ThreatModel(norm, eps, box) to say what it may do."
        raise ArgumentError("attack", attack, _CHOICES, advice)
    return norm, eps


def read_climb(attack: Any) -> Climb:
    """Step size, number of steps and start of an attack object (not a factory)."""
    name = _known_class(attack)
    alpha, steps = as_number(getattr(attack, "alpha", None)), as_number(getattr(attack, "steps", None))
    if name == "FGSM":
        alpha = as_number(attack.eps)
    if name in ("FGSM", "FFGSM"):
        steps = 1
    return Climb(
        alpha,
        int(steps) if steps is not None and steps == int(steps) and steps >= 1 else None,
        bool(getattr(attack, "random_start", name not in _FROM_CLEAN)),
    )


def attack_note(attack: Any) -> str | None:
    """What a snapshot should warn about for this attack (FGSM becomes ``ThreatModel("linf")``), or None."""
    if attack is None:
        return None
    if is_factory(attack):
        return attack_note(_build(attack, nn.Linear(1, 1)))
    name = _known_class(attack)
    becomes = f"unlearning treats it as ThreatModel('linf', eps={as_number(getattr(attack, 'eps', 0)):g})"
    if name in ("FGSM", "FFGSM"):
        return (
            f"{name} takes one step and does not maximise the loss; {becomes}. Train with PGD for a snapshot that fits."
        )
    if name == "TPGD":
        return f"TPGD maximises the divergence from the clean prediction; {becomes}. Train with PGD for one that fits."
    return None


def is_factory(attack: Any) -> bool:
    """Whether this builds an attack for a model: a class, a ``functools.partial``, a function."""
    return isinstance(attack, (type, functools.partial, types.FunctionType, types.MethodType))


def build_attack(attack: Any, module: nn.Module) -> Any:
    """The attack for ``module``: what the factory builds, or the given one if it attacks this module or a part of it.

    Raises:
        ArgumentError: it attacks another model, or the factory failed.
    """
    built = _build(attack, module) if is_factory(attack) else attack
    model = getattr(built, "model", None)
    if model is None and hasattr(built, "set_model"):
        raise ArgumentError(
            "attack",
            built,
            "an attack with a model",
            "Pass a factory, e.g. functools.partial(torchattacks.PGD, eps=8/255).",
        )
    if isinstance(model, nn.Module):
        own = {id(p) for p in module.parameters()}
        if own and not any(id(p) in own for p in model.parameters()):
            raise ArgumentError(
                "attack",
                built,
                "an attack on the module that is trained",
                "It was built for another model; pass a factory, e.g. functools.partial(torchattacks.PGD, eps=8/255).",
            )
    return built


def is_tpgd(attack: Any) -> bool:
    """Whether this is torchattacks' TRADES attack, which climbs the divergence from the clean prediction."""
    return _known_class(attack) == "TPGD"


def _build(factory: Any, module: nn.Module) -> Any:
    try:
        built = factory(module)
        for name in ("eps", "alpha"):  # from a command line: "8/255"
            if isinstance(getattr(built, name, None), str) and (value := as_number(getattr(built, name))) is not None:
                setattr(built, name, value)
        return built
    except Exception as e:
        allowed = "a factory that is called with the model and returns an attack"
        raise ArgumentError("attack", factory, allowed, f"Calling it failed: {e!r}") from e


def _known_class(attack: Any) -> str | None:
    """The torchattacks class that decides what this attack does; None for a subclass with a ``forward`` of its own."""
    for cls in type(attack).__mro__:
        if cls.__module__.split(".")[0] == "torchattacks":
            return cls.__name__ if cls.__name__ in _NORM_OF else None
        if "forward" in vars(cls) or "__call__" in vars(cls):
            return None
    return None
