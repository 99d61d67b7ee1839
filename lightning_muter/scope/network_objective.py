"""The robust objective of any subset of the parameters: what was trained, and on which rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.network import WideCurvature, WideObjective
from lightning_muter.curvature.problem.network import WideProblem
from lightning_muter.curvature.response.choose import Response, as_response
from lightning_muter.errors import ArgumentError
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards, refuse_sharded_parameters
from lightning_muter.model.reading import Reading
from lightning_muter.model.weight_decay import WholeDecay
from lightning_muter.snapshot.reread import Access
from lightning_muter.snapshot.snapshot import WIDE_BATCH, WideSnapshot
from lightning_muter.snapshot.trained import Decay, decay_by_name, trained_threat

#: Inner maxima of ReLU networks sit on kinks: followed by a few steps per evaluation, they settle as the search goes on.
_KINKED = InnerSolver(tolerance=1e-3, max_iter=8, tracking=4, finish=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Training(Access):
    """What was minimised, and how its rows are read; the fields are explained at :func:`lightning_muter.take_wide_snapshot`."""

    scope: str | Sequence[str] = "all"
    threat_model: ThreatModel | None = None
    attack: Any = None
    trades_beta: float | None = None
    response: str | Response = "auto"
    curvature: Curvature | None = None
    weight_decay: Decay = "auto"
    optimizers: Iterable[Any] | None = None
    smoothing: Smoothing | None = None
    inner: InnerSolver | None = None
    sample_weight: Tensor | None = None
    batch_size: int = WIDE_BATCH
    num_workers: int = 0
    progress: bool = True

    @property
    def direct(self) -> WideCurvature:
        """The direct part of the Hessian.

        Raises:
            ArgumentError: it is known of a head alone.
        """
        if self.curvature == "fisher":
            raise ArgumentError("curvature", self.curvature, "'ggn' or 'hessian' beyond the head", "Use 'ggn'.")
        return self.curvature or "ggn"

    @classmethod
    def of(cls, snapshot: WideSnapshot, access: Access) -> Training:
        """The one that a snapshot was taken of; weights of rows are part of the reading."""
        return cls(
            scope=snapshot.patterns,
            threat_model=snapshot.threat_model,
            response=snapshot.response,
            curvature=snapshot.curvature,
            weight_decay=WholeDecay(snapshot.decay),
            trades_beta=snapshot.trades_beta,
            smoothing=snapshot.smoothing,
            inner=snapshot.inner,
            collate=access.collate,
            batch_size=min(access.batch_size, WIDE_BATCH),
        )

    def rows(
        self, reading: Reading, threat: ThreatModel, data: Dataset[Any], positions: Sequence[int] | None = None
    ) -> SampleSource:
        """These rows of the data (None: all), with their weights."""
        weight = self.sample_weight
        return self.source(reading, threat, data, positions, weight=weight, num_workers=self.num_workers).settle()

    def objective(
        self,
        model: nn.Module,
        data: Dataset[Any],
        positions: Sequence[int],
        reading: Reading,
        shards: Shards | None = None,
    ) -> WideObjective:
        """The robust objective over these rows of the data, of which ``shards`` is this process's share; anchored at the weights
        at hand.

        Raises:
            ArgumentError: no threat model is given or found.
            UnsuitableError: sharded parameters, or a weight decay that is not known.
        """
        refuse_sharded_parameters(model)
        threat = trained_threat(model, self.threat_model, self.attack)
        shards = shards or Shards.current()
        source = self.rows(reading, threat, data, positions)
        problem = WideProblem(model, reading.loss, self.scope, source.examples(), self.trades_beta, reading)
        return WideObjective(
            problem,
            threat,
            source,
            self.decay_of(model, problem, reading.penalty),
            as_response(self.response, threat),
            shards.share(positions),
            source.total(positions),
            self.direct,
            self.inner or (_KINKED if problem.backbone.piecewise_linear else InnerSolver(max_iter=50)),
            self.smoothing or Smoothing(),
            anchor=problem.read() if threat.jumps else None,
            reduce=shards.sum_,
            leads=shards.rank == 0,
        )

    def decay_by_name(self, model: nn.Module, names: Sequence[str], penalty: Mapping[str, float]) -> dict[str, float]:
        """lambda by parameter name."""
        return decay_by_name(names, model, self.weight_decay, self.optimizers, penalty)

    def decay_of(self, model: nn.Module, problem: WideProblem, penalty: Mapping[str, float]) -> Tensor:
        """lambda per entry of w, (p,)."""
        values = self.decay_by_name(model, problem.names, penalty)
        found = torch.tensor([values[n] for n in problem.names], dtype=problem.dtype, device=problem.device)
        return torch.repeat_interleave(found, torch.tensor(problem.sizes, device=problem.device))
