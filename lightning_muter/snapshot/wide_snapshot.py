"""WideSnapshot: what is kept of a training whose unlearning covers more than the head.

Nothing of the size p x p can be stored for a whole network, so no sums are: only what ties a request to the weights, the data
and the objective that was trained. A request then reads the retained samples again (`wide.unlearn_stored`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.network import WideCurvature
from lightning_muter.curvature.problem.network import parameters_in
from lightning_muter.curvature.response.choose import Response
from lightning_muter.errors import MismatchError
from lightning_muter.snapshot.snapshot import Stored, described, response_from, restored_rows
from lightning_muter.storage.fingerprint import DigestKey, versions

_INNER = ("tolerance", "max_iter", "starts", "tracking", "finish")
#: Samples at a time where derivatives of a whole network are taken.
WIDE_BATCH = 256


@dataclass
class WideSnapshot(Stored):
    """The objective of a training, tied to weights and data; parameters by name instead of sums.

    Attributes:
        patterns: the scope as it was given, ``["all"]`` or patterns over parameter names; parameters: what it covers.
        decay: lambda by parameter name.       trades_beta: of TRADES, None for plain adversarial training.
        curvature: direct part, "ggn" or "hessian".
        fingerprint, digests, forgotten, n_total, stationarity: as in :class:`lightning_muter.Snapshot`.
    """

    patterns: list[str]
    parameters: list[str]
    decay: dict[str, float]
    n_total: int
    forgotten: list[int]
    threat_model: ThreatModel
    response: Response
    curvature: WideCurvature
    loss_name: str
    input_shape: tuple[int, ...]
    inner: InnerSolver
    smoothing: Smoothing
    digests: Tensor
    key_id: str
    fingerprint: str
    stationarity: float
    trades_beta: float | None = None
    sample_weight: Tensor | None = None
    warnings: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    key: DigestKey | None = field(default=None, repr=False)

    @property
    def scope(self) -> str:
        return ", ".join(self.patterns)

    def check_parameters(self, model: nn.Module) -> None:
        """Raise `MismatchError` unless the scope means the parameters it meant when the snapshot was taken."""
        found = parameters_in(model, self.patterns)
        if found != self.parameters:
            other = sorted(set(found) ^ set(self.parameters))[:3]
            raise MismatchError(
                f"model: its scope {self.scope!r} covers {len(found)} trainable parameters, the snapshot's "
                f"{len(self.parameters)} (e.g. {other}). Freeze and unfreeze as in training, or take a new snapshot."
            )

    def _tensors(self) -> dict[str, Tensor]:
        found = {"digests": self.digests, "forgotten": torch.tensor(self.forgotten, dtype=torch.int64)}
        return found if self.sample_weight is None else found | {"sample_weight": self.sample_weight}

    def _meta(self) -> dict[str, Any]:
        return {
            "scope": self.patterns,
            "parameters": self.parameters,
            "decay": self.decay,
            "n_total": self.n_total,
            "threat_model": self.threat_model.to_dict(),
            "response": described(self.response),
            "curvature": self.curvature,
            "loss": self.loss_name,
            "trades_beta": self.trades_beta,
            "input_shape": list(self.input_shape),
            "inner": {name: getattr(self.inner, name) for name in _INNER},
            "smoothing": {"strength": self.smoothing.strength, "bandwidth": self.smoothing.bandwidth},
            "key_id": self.key_id,
            "fingerprint": self.fingerprint,
            "stationarity": self.stationarity,
            "warnings": self.warnings,
            "figures": self.figures,
            "versions": self.versions,
        }

    @classmethod
    def _restore(cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> WideSnapshot:
        n = int(meta["n_total"])
        patterns, parameters = ([str(v) for v in meta[name]] for name in ("scope", "parameters"))
        decay = {str(k): float(v) for k, v in meta["decay"].items()}
        if not isinstance(meta["scope"], list) or not patterns or set(decay) != set(parameters):
            raise ValueError("scope, parameters and decay do not fit together")
        if not all(0 <= v < float("inf") for v in decay.values()):
            raise ValueError("decay is negative or not finite")
        if meta["curvature"] not in ("ggn", "hessian"):
            raise ValueError(f"curvature {meta['curvature']!r}")
        return cls(
            patterns=patterns,
            parameters=parameters,
            decay=decay,
            n_total=n,
            forgotten=restored_rows(n, tensors),
            threat_model=ThreatModel.from_dict(meta["threat_model"]),
            response=response_from(meta["response"]),
            curvature=meta["curvature"],
            loss_name=str(meta["loss"]),
            trades_beta=None if meta["trades_beta"] is None else float(meta["trades_beta"]),
            input_shape=tuple(int(i) for i in meta["input_shape"]),
            inner=InnerSolver(**{name: meta["inner"][name] for name in _INNER}),
            smoothing=Smoothing(float(meta["smoothing"]["strength"]), float(meta["smoothing"]["bandwidth"])),
            digests=tensors["digests"],
            key_id=str(meta["key_id"]),
            fingerprint=str(meta["fingerprint"]),
            stationarity=float(meta["stationarity"]),
            sample_weight=tensors.get("sample_weight"),
            warnings=[str(w) for w in meta["warnings"]],
            figures=dict(meta["figures"]),
            versions={str(k): str(v) for k, v in meta["versions"].items()},
        )
