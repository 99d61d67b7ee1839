"""What a trained model tells of its objective: the threat model and the weight decay it was trained with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.errors import ArgumentError, UnsuitableError
from lightning_muter.model.weight_decay import WholeDecay, no_decay_text, read_weight_decay, used_optimizers

Decay = float | Mapping[str, float] | str


def trained_threat(model: nn.Module, threat_model: ThreatModel | None, attack: Any) -> ThreatModel:
    """The threat model: given, of the attack, or of the model's own adversarial training.

    Raises:
        ArgumentError: none of them is known.
    """
    if isinstance(threat_model, ThreatModel):
        return threat_model
    if threat_model is not None:
        advice = (
            f"Attacks go to attack=; of a norm: ThreatModel({threat_model!r}, eps)."
            if isinstance(threat_model, str)
            else ("Attacks go to attack=.")
        )
        raise ArgumentError("threat_model", threat_model, "a ThreatModel(norm, eps, box)", advice)
    if attack is not None:
        return ThreatModel.from_attack(attack)
    from lightning_muter.adversarial.training import adversary_of

    adversary = adversary_of(model) if isinstance(model, nn.Module) else None
    if adversary is not None:
        return adversary.threat
    raise ArgumentError(
        "threat_model",
        None,
        "a ThreatModel(norm, eps, box), or attack=...",
        "Say what the model was trained against; ThreatModel('l2', 0.0) for standard training.",
    )


def decay_by_name(
    names: Sequence[str],
    model: nn.Module,
    weight_decay: Decay,
    optimizers: Iterable[Any] | None,
    penalty: Mapping[str, float],
) -> dict[str, float]:
    """lambda of these parameters: given as one number or by name, or ("auto") read off the optimisers; and the ``penalty`` that the
    training step adds by itself.

    Raises:
        ArgumentError: of another kind, negative or not finite; UnsuitableError: decoupled, or of an unknown optimiser.
    """
    if isinstance(weight_decay, Mapping):
        values = {name: float(value) for name, value in weight_decay.items()}
    elif weight_decay == "auto":
        values = read_weight_decay(used_optimizers(model, optimizers), model.named_parameters())
    elif isinstance(weight_decay, (int, float)) and not isinstance(weight_decay, bool):
        values = dict.fromkeys(names, float(weight_decay))
    else:
        raise ArgumentError("weight_decay", weight_decay, "'auto', a number, or a dict of parameter names to numbers")
    found = {name: values.get(name, 0.0) for name in names}
    if not all(math.isfinite(value) and value >= 0 for value in found.values()):
        raise ArgumentError("weight_decay", weight_decay, "finite numbers, 0 or larger")
    if isinstance(weight_decay, WholeDecay):
        return found
    return {name: value + penalty.get(name, 0.0) for name, value in found.items()}


def head_decay(
    problem: HeadProblem,
    model: nn.Module,
    weight_decay: Decay,
    optimizers: Iterable[Any] | None,
    penalty: Mapping[str, float],
) -> Tensor:
    """lambda per entry of theta, (K, q).

    Raises:
        UnsuitableError: 0 for the head's weights, decoupled, or of an unknown kind.
    """
    prefix = f"{problem.head.name}." if problem.head.name else ""
    names = [f"{prefix}weight"] + ([f"{prefix}bias"] if problem.has_bias else [])
    values = decay_by_name(names, model, weight_decay, optimizers, penalty)
    decay = torch.zeros(problem.shape, dtype=problem.dtype, device=problem.device)
    decay[:, : problem.backbone.width] = values[names[0]]
    if problem.has_bias:
        decay[:, -1] = values[names[1]]
    if float(decay[0, 0]) == 0.0:
        raise UnsuitableError(no_decay_text([names[0]]))
    return decay
