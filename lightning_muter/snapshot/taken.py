"""What was taken at a head, and the snapshot that is made of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.hessian.sums import Sums
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.sharded import ShardedObjective
from lightning_muter.errors import UnsuitableError
from lightning_muter.minimise.corners import least_subgradient
from lightning_muter.model.reading import Reading
from lightning_muter.snapshot.polishing import Polish, Polished
from lightning_muter.snapshot.remarks import constant_note, head_notes
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.storage.fingerprint import DigestKey


@dataclass
class Taken:
    """Sums at a polished head; the maximisers they are of, and where a file lets these start from.

    Raises:
        UnsuitableError: the objective is not finite there.
    """

    objective: ShardedObjective
    polished: Polished
    sums: Sums
    maximisers: Tensor
    starts: Tensor | None

    def __post_init__(self) -> None:
        self.reached: Evaluation = self.objective.evaluation(self.polished.theta, self.sums, self.maximisers)
        if not bool(torch.isfinite(self.polished.theta).all()) or not bool(torch.isfinite(self.reached.gradient).all()):
            raise UnsuitableError("The objective is not finite at the model's weights. Check the weights and the loss.")

    def figures(self, polishing: Polish) -> dict[str, Any]:
        # of a network it costs an ascent: where a budget counts, the smoothed figure stands alone
        affine, limited = self.objective.problem.backbone.affine, polishing.budget.limit is not None
        sharp = (
            least_subgradient(self.objective, self.polished.theta, self.maximisers) if affine or not limited else None
        )
        return {
            "stationarity": max(self.reached.stationarity, sharp or 0.0),
            "stationarity_smoothed": self.reached.stationarity,
            "stationarity_unsmoothed": sharp,
            "objective": self.reached.value,
            "passes": self.objective.passes,
            "counts": {k: int(v) for k, v in self.sums.counts.items() if v},
        }

    def notes(self, polishing: Polish, attack: Any) -> list[str]:
        polished, best = polishing.limit != 0, self.polished.best
        notes = head_notes(
            self.objective.problem, self.reached, self.sums, self.polished.aim, polished=polished, attack=attack
        )
        if best is not None and best.is_constant:
            notes.append(constant_note(best, self.objective.threat))
        return notes

    def record(
        self,
        reading: Reading,
        *,
        curvature: Curvature,
        warnings: list[str],
        figures: dict[str, Any],
        fingerprint: str,
        digests: Tensor,
        key: DigestKey,
    ) -> Snapshot:
        objective, source, theta = self.objective, self.objective.source, self.polished.theta.cpu()
        assert self.sums.hessian is not None
        anchor = objective.smoothing.anchor
        return Snapshot(
            theta_ref=theta,
            theta_base=theta.clone(),
            gradient=self.sums.gradient.cpu(),
            hessian=replace(self.sums.hessian, blocks=self.sums.hessian.blocks.cpu()),
            decay=objective.decay.cpu(),
            n_total=source.n,
            forgotten=[],
            threat_model=objective.threat,
            response=self.polished.response,
            curvature=curvature,
            loss_name=reading.identity,
            mass=source.mass,
            normalization=reading.normalization,
            head_name=objective.problem.head.name,
            input_shape=source.input_shape,
            smoothing=replace(objective.smoothing, anchor=None if anchor is None else anchor.cpu()),
            inner=objective.inner,
            digests=digests,
            key_id=key.key_id,
            fingerprint=fingerprint,
            stationarity=figures["stationarity"],
            starts=self.starts,
            sample_weight=source.weight,
            warnings=warnings,
            figures=figures,
            key=key,
        )
