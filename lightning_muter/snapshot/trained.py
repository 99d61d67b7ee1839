"""What a trained model tells of its objective: the threat model and the weight decay it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError

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
