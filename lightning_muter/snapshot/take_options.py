"""What :func:`lightning_muter.take_snapshot` takes besides the scope, which decides what comes back: for type checkers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypedDict

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.response.choose import Response
from lightning_muter.minimise.budget import Fit
from lightning_muter.model.losses import Loss
from lightning_muter.model.reading import Reading
from lightning_muter.scope.asked import Decay
from lightning_muter.snapshot.polishing import Examples
from lightning_muter.snapshot.resume import Resumable
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.storage.fingerprint import DigestKey


class Options(TypedDict, total=False):
    """Options besides the scope."""

    threat_model: ThreatModel | None
    attack: Any
    trades_beta: float | None
    response: str | Response
    curvature: Curvature | None
    loss: Loss | None
    weight_decay: Decay
    optimizers: Iterable[Any] | None
    polish: str | int
    budget: float | str | None
    fit: Fit | None
    examples: Examples | None
    tolerance: float | None
    smoothing: Smoothing | None
    inner: InnerSolver | None
    sample_weight: Tensor | None
    size_cap: int
    collate: Callable[[list[Any]], Any] | None
    batch_size: int
    num_workers: int
    device: torch.device | str | None
    key: DigestKey | None
    like: Snapshot | None
    resume: Resumable | None
    inputs: Any
    label: Any
    normalization: Any
    reading: Reading | None
    progress: bool
