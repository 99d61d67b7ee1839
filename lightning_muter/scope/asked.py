"""What a caller says of a training whose parameters in ``scope`` are to be changed, of taking its snapshot, of a request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.network import WideCurvature
from lightning_muter.curvature.response.choose import Response
from lightning_muter.errors import ArgumentError
from lightning_muter.model.distributed import Shards
from lightning_muter.model.losses import Loss
from lightning_muter.model.read_step import read_objective
from lightning_muter.model.reading import Reading
from lightning_muter.scope.network_objective import Rows, Training
from lightning_muter.snapshot.snapshot import WIDE_BATCH
from lightning_muter.snapshot.trained import Decay, trained_threat
from lightning_muter.solvers.cg import TruncatedCG
from lightning_muter.storage.fingerprint import DigestKey

#: mu at the start, per sample.
DAMPING = 1e-2


@dataclass(frozen=True, kw_only=True, eq=False)
class Wide:
    """The training, and how its rows are read; explained at :func:`lightning_muter.take_wide_snapshot`."""

    scope: str | Sequence[str] = "all"
    threat_model: ThreatModel | None = None
    attack: Any = None
    trades_beta: float | None = None
    response: str | Response = "auto"
    curvature: WideCurvature = "ggn"
    loss: Loss | None = None
    weight_decay: Decay = "auto"
    optimizers: Iterable[Any] | None = None
    smoothing: Smoothing | None = None
    inner: InnerSolver | None = None
    sample_weight: Tensor | None = None
    collate: Callable[[list[Any]], Any] | None = None
    batch_size: int = WIDE_BATCH
    num_workers: int = 0
    inputs: Any = None
    label: Any = None
    progress: bool = True

    def training(self, model: nn.Module) -> Training:
        """The objective, without rows.

        Raises:
            ArgumentError: no threat model is given or found.
        """
        return Training(
            self.scope,
            trained_threat(model, self.threat_model, self.attack),
            self.response,
            self.curvature,
            self.weight_decay,
            self.trades_beta,
            self.optimizers,
            self.smoothing,
            self.inner,
        )

    def read(
        self, model: nn.Module, data: Dataset[Any], positions: Sequence[int] | None = None, normalization: Any = None
    ) -> Reading:
        """The loss of these rows of the data (None: all)."""
        return read_objective(
            model,
            data,
            loss=self.loss,
            collate=self.collate,
            positions=positions,
            inputs=self.inputs,
            label=self.label,
            normalization=normalization,
        )

    def rows(
        self, data: Dataset[Any], positions: Sequence[int], reading: Reading, shards: Shards | None = None
    ) -> Rows:
        """These rows, to be read as the reading says."""
        return Rows(
            data, positions, reading, self.collate, self.batch_size, self.num_workers, self.sample_weight, shards
        )


@dataclass(frozen=True, eq=False)
class TakeWide(Wide):
    """What :func:`lightning_muter.take_wide_snapshot` is asked for."""

    model: nn.Module
    dataset: Dataset[Any]
    _: KW_ONLY
    polish: str | int = "auto"
    device: torch.device | str | None = None
    key: DigestKey | None = None
    normalization: Any = None
    reading: Reading | None = None

    @property
    def steps(self) -> int:
        """Accepted steps of polish.

        Raises:
            ArgumentError: ``polish`` is none of "auto", 0 or a number.
        """
        if self.polish == "auto":
            return 0
        if not (isinstance(self.polish, int) and self.polish >= 0):
            raise ArgumentError("polish", self.polish, "'auto', 0 or a number of steps")
        return self.polish


@dataclass(frozen=True, eq=False)
class UnlearnWide(Wide):
    """What :func:`lightning_muter.unlearn_wide` is asked for."""

    model: nn.Module
    forget: Iterable[int]
    data: Dataset[Any]
    _: KW_ONLY
    forgotten: Iterable[int] = ()
    steps: int = 5
    damping: float = DAMPING
    cg: TruncatedCG | None = None
    tolerance: float = 1e-6
    seconds: float | None = None
    shards: Shards | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Search:
    """How steps are looked for: at most so many accepted ones, from this damping, by this solver, until stationary.

    Raises:
        ArgumentError: ``steps`` or ``damping`` out of range.
    """

    steps: int
    damping: float = DAMPING
    cg: TruncatedCG | None = None
    tolerance: float = 1e-6
    deadline: float | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.steps, int) and self.steps >= 1) or not self.damping >= 0:
            raise ArgumentError("steps, damping", (self.steps, self.damping), "steps >= 1 and damping >= 0")
