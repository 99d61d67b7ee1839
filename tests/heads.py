"""Snapshots of the small problems of `tests.cases`, and requests on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.take import take_snapshot
from lightning_muter.unlearning.result import UnlearnResult
from lightning_muter.unlearning.unlearn import unlearn
from tests.cases import THREATS, Case


def snapshot_of(one: Case, threat: ThreatModel = THREATS["l2-box"], **kwargs: Any) -> Snapshot:
    options: dict[str, Any] = {"loss": one.loss, "weight_decay": one.decay, "sample_weight": one.weight}
    options |= {"threat_model": threat, "progress": False} | kwargs
    return take_snapshot(one.net, one.dataset, **options)


def forget_from(one: Case, snapshot: Snapshot, forget: Any, **kwargs: Any) -> UnlearnResult:
    options: dict[str, Any] = {"loss": one.loss, "progress": False} | kwargs
    return unlearn(one.net, snapshot, forget, options.pop("data", one.dataset), **options)


def head_of(one: Case) -> Tensor:
    return torch.cat([p.detach().flatten() for p in one.head.parameters()]).clone()


def state(model: nn.Module, snapshot: Snapshot) -> tuple[dict[str, bytes], dict[str, bytes], str, list[bool]]:
    def plain(tensors: dict[str, Tensor]) -> dict[str, bytes]:
        return {k: v.detach().cpu().contiguous().numpy().tobytes() for k, v in tensors.items()}

    fields, tensors = snapshot.encoded()
    return (
        plain(dict(model.state_dict())),
        plain(tensors),
        repr(fields),
        [m.training for m in model.modules()],
    )
