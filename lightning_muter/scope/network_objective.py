"""The robust objective of any subset of the parameters: what was trained, and on which rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.network import WideCurvature, WideObjective
from lightning_muter.curvature.problem.network import WideProblem
from lightning_muter.curvature.response.choose import Response, as_response
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards, refuse_sharded_parameters
from lightning_muter.model.reading import Reading
from lightning_muter.model.weight_decay import WholeDecay
from lightning_muter.snapshot.reread import Access
from lightning_muter.snapshot.snapshot import WIDE_BATCH, WideSnapshot
from lightning_muter.snapshot.trained import Decay, decay_by_name

#: Inner maxima of ReLU networks sit on kinks: followed by a few steps per evaluation, they settle as the search goes on.
_KINKED = InnerSolver(tolerance=1e-3, max_iter=8, tracking=4, finish=1)


@dataclass(frozen=True)
class Rows:
    """Where samples are read: ``positions`` of ``data``, as ``reading`` says.

    Attributes:
        weight: c_i of the objective, where the reading has none of its own.
        shards: this process's share of them.
    """

    data: Dataset[Any]
    positions: Sequence[int]
    reading: Reading
    collate: Callable[[list[Any]], Any] | None = None
    batch_size: int = WIDE_BATCH
    num_workers: int = 0
    weight: Tensor | None = None
    shards: Shards | None = None

    @classmethod
    def of(
        cls,
        access: Access,
        data: Dataset[Any],
        positions: Sequence[int],
        reading: Reading,
        shards: Shards | None = None,
    ) -> Rows:
        """Of a stored training: its weights are part of the reading."""
        return cls(data, positions, reading, access.collate, min(access.batch_size, WIDE_BATCH), shards=shards)


@dataclass(frozen=True)
class Training:
    """What was minimised, over the parameters in ``scope``.

    Attributes:
        decay: lambda, as in :func:`lightning_muter.take_snapshot`; optimizers: where "auto" reads it.
        smoothing, inner: None for the defaults.
    """

    scope: str | Sequence[str]
    threat: ThreatModel
    response: str | Response
    curvature: WideCurvature
    decay: Decay
    trades_beta: float | None = None
    optimizers: Iterable[Any] | None = None
    smoothing: Smoothing | None = None
    inner: InnerSolver | None = None

    @classmethod
    def of(cls, snapshot: WideSnapshot) -> Training:
        return cls(
            scope=snapshot.patterns,
            threat=snapshot.threat_model,
            response=snapshot.response,
            curvature=snapshot.curvature,
            decay=WholeDecay(snapshot.decay),
            trades_beta=snapshot.trades_beta,
            smoothing=snapshot.smoothing,
            inner=snapshot.inner,
        )

    def objective(self, model: nn.Module, rows: Rows) -> WideObjective:
        """The robust objective over these rows, anchored at the weights at hand.

        Raises:
            UnsuitableError: sharded parameters, or a weight decay that is not known.
        """
        refuse_sharded_parameters(model)
        shards = rows.shards or Shards.current()
        source = SampleSource(
            rows.data,
            collate=rows.collate,
            batch_size=rows.batch_size,
            num_workers=rows.num_workers,
            device=next(model.parameters()).device,
            weight=rows.weight,
            threat=self.threat,
            readable=rows.positions,
            reading=rows.reading,
        ).settle()
        problem = WideProblem(model, rows.reading.loss, self.scope, source.examples(), self.trades_beta, rows.reading)
        return WideObjective(
            problem,
            self.threat,
            source,
            self.decay_of(model, problem, rows.reading.penalty),
            as_response(self.response, self.threat),
            shards.share(rows.positions),
            source.total(rows.positions),
            self.curvature,
            self.inner or (_KINKED if problem.backbone.piecewise_linear else InnerSolver(max_iter=50)),
            self.smoothing or Smoothing(),
            anchor=problem.read() if self.threat.jumps else None,
            reduce=shards.sum_,
            leads=shards.rank == 0,
        )

    def decay_by_name(self, model: nn.Module, names: Sequence[str], penalty: Mapping[str, float]) -> dict[str, float]:
        """lambda by parameter name."""
        return decay_by_name(names, model, self.decay, self.optimizers, penalty)

    def decay_of(self, model: nn.Module, problem: WideProblem, penalty: Mapping[str, float]) -> Tensor:
        """lambda per entry of w, (p,)."""
        values = self.decay_by_name(model, problem.names, penalty)
        found = torch.tensor([values[n] for n in problem.names], dtype=problem.dtype, device=problem.device)
        return torch.repeat_interleave(found, torch.tensor(problem.sizes, device=problem.device))


def stored_objective(model: nn.Module, snapshot: WideSnapshot, rows: Rows) -> WideObjective:
    """The objective that a `WideSnapshot` describes, over some rows."""
    return Training.of(snapshot).objective(model, rows)


def left_outside(model: nn.Module, names: Iterable[str]) -> str | None:
    """What a scope leaves behind; None when it covers every trainable parameter."""
    inside = set(names)
    left = [n for n, p in model.named_parameters() if p.requires_grad and n not in inside]
    if not left:
        return None
    shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
    return (
        f"The scope leaves {len(left)} trainable parameters as they are ({shown}): they keep what they learnt from "
        "forgotten samples. scope='all' covers them."
    )
