"""Snapshot: what is stored at the end of training so that samples can be removed later, and how it is taken, saved, loaded.

    M = sum D2 phi_i  (without lambda) at w_ref,      g = sum d phi_i  at w_base,      lambda, n, what was forgotten

w_base is w_ref until a refinement moves it. Everything a stored term depends on (threat model, smoothing, tolerances,
starting points of the maximisers) is frozen here, so that a sample is subtracted exactly as it was added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.hessian.sums import BlockSymmetric
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.response.choose import Response
from lightning_muter.snapshot.snapshot import KIND, Stored, described, key_path, response_from, restored_rows
from lightning_muter.storage.fingerprint import DigestKey, versions

__all__ = ["CHECKPOINT_KEY", "KIND", "Snapshot", "key_path", "loss_name", "sample_digests"]

#: Entry of an unlearned checkpoint that lists the forgotten rows.
CHECKPOINT_KEY = "lightning_muter"


@dataclass
class Snapshot(Stored):
    """Statistics of one trained head, tied to its weights, data and threat model.

    Attributes:
        theta_ref: weights [W | b], (K, q), at which ``hessian`` was summed; theta_base: where ``gradient`` was.
        hessian: M of the samples that are left, without weight decay.     decay: lambda per entry, (K, q).
        forgotten: positions removed so far, in order.     n_total: samples at the start.
        starts, base_starts: where the maximisers at theta_ref and theta_base start, (n, 1 + m, D + 1) in float16: positions in
            units of eps and weights of the local maxima (nonlinear backbones).
        fingerprint: of the model's whole state dict as it should be now.
        digests: keyed digest of every sample (n, 16); rows of forgotten samples are zeroed.
        stationarity: |grad F| / sum |grad phi_i| at theta_base for the samples at hand when it was measured.
    """

    theta_ref: Tensor
    theta_base: Tensor
    gradient: Tensor
    hessian: BlockSymmetric
    decay: Tensor
    n_total: int
    forgotten: list[int]
    threat_model: ThreatModel
    response: Response
    curvature: Curvature
    loss_name: str
    head_name: str
    input_shape: tuple[int, ...]
    smoothing: Smoothing
    inner: InnerSolver
    digests: Tensor
    key_id: str
    fingerprint: str
    stationarity: float
    scope: str = "head"
    starts: Tensor | None = None
    base_starts: Tensor | None = None
    sample_weight: Tensor | None = None
    warnings: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    key: DigestKey | None = field(default=None, repr=False)

    # -- files -------------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        found = {
            "theta_ref": self.theta_ref,
            "theta_base": self.theta_base,
            "gradient": self.gradient,
            "hessian": self.hessian.blocks,
            "decay": self.decay,
            "digests": self.digests,
            "forgotten": torch.tensor(self.forgotten, dtype=torch.int64),
        }
        optional = {
            "starts": self.starts,
            "base_starts": self.base_starts,
            "sample_weight": self.sample_weight,
            "anchor": self.smoothing.anchor,
        }
        return found | {k: v for k, v in optional.items() if v is not None}

    def _meta(self) -> dict[str, Any]:
        return {
            "n_total": self.n_total,
            "threat_model": self.threat_model.to_dict(),
            "response": described(self.response),
            "curvature": self.curvature,
            "loss": self.loss_name,
            "head": self.head_name,
            "input_shape": list(self.input_shape),
            "smoothing": {
                "strength": self.smoothing.strength,
                "bandwidth": self.smoothing.bandwidth,
                "temperature": self.smoothing.temperature,
            },
            "inner": {
                "tolerance": self.inner.tolerance,
                "max_iter": self.inner.max_iter,
                "starts": self.inner.starts,
                "rivals": self.inner.rivals,
            },
            "key_id": self.key_id,
            "fingerprint": self.fingerprint,
            "stationarity": self.stationarity,
            "scope": self.scope,
            "warnings": self.warnings,
            "figures": self.figures,
            "versions": self.versions,
        }

    @classmethod
    def _restore(cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
        theta, blocks = tensors["theta_ref"], tensors["hessian"]
        k, q = theta.shape
        n = int(meta["n_total"])
        forgotten = restored_rows(n, tensors)
        expected = {"theta_base": (k, q), "gradient": (k, q), "decay": (k, q)}
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {shape}")
        if tuple(blocks.shape) != (k * (k + 1) // 2, q, q):
            raise ValueError(f"hessian has shape {tuple(blocks.shape)}")
        for name in ("theta_ref", "theta_base", "gradient", "hessian", "decay", "starts", "base_starts", "anchor"):
            if name not in tensors:
                continue
            allowed = (torch.float16,) if name.endswith("starts") else (torch.float64, torch.float32)
            if tensors[name].dtype not in allowed:
                raise ValueError(f"{name} has dtype {tensors[name].dtype}")
            if not bool(torch.isfinite(tensors[name]).all()):
                raise ValueError(f"{name} is not finite")
        if bool((tensors["decay"] < 0).any()):
            raise ValueError("decay is negative")
        for name in ("starts", "base_starts"):
            if name in tensors and len(tensors[name]) != n:
                raise ValueError(f"{name} has {len(tensors[name])} rows, not {n}")
        smoothing = Smoothing(
            float(meta["smoothing"]["strength"]),
            float(meta["smoothing"]["bandwidth"]),
            tensors.get("anchor"),
            float(meta["smoothing"]["temperature"]),
        )
        if meta["scope"] != "head" or meta["curvature"] not in ("hessian", "ggn", "fisher"):
            raise ValueError(f"scope {meta['scope']!r}, curvature {meta['curvature']!r}")
        return cls(
            theta_ref=theta,
            theta_base=tensors["theta_base"],
            gradient=tensors["gradient"],
            hessian=BlockSymmetric(k, q, blocks),
            decay=tensors["decay"],
            n_total=n,
            forgotten=forgotten,
            threat_model=ThreatModel.from_dict(meta["threat_model"]),
            response=response_from(meta["response"]),
            curvature=meta["curvature"],
            loss_name=str(meta["loss"]),
            head_name=str(meta["head"]),
            input_shape=tuple(int(i) for i in meta["input_shape"]),
            smoothing=smoothing,
            inner=InnerSolver(**meta["inner"]),
            digests=tensors["digests"],
            key_id=str(meta["key_id"]),
            fingerprint=str(meta["fingerprint"]),
            stationarity=float(meta["stationarity"]),
            scope=str(meta["scope"]),
            starts=tensors.get("starts"),
            base_starts=tensors.get("base_starts"),
            sample_weight=tensors.get("sample_weight"),
            warnings=[str(w) for w in meta["warnings"]],
            figures=dict(meta["figures"]),
            versions={str(k): str(v) for k, v in meta["versions"].items()},
        )


def loss_name(loss: Callable[..., Tensor]) -> str:
    """A stable description of a loss, to tell two apart."""
    if isinstance(loss, functools.partial):
        keywords = ", ".join(f"{k}={v!r}" for k, v in sorted(loss.keywords.items()))
        return f"{loss_name(loss.func)}({keywords})"
    name = getattr(loss, "__qualname__", None)
    return f"{loss.__module__}.{name}" if name is not None else repr(loss)


def sample_digests(key: DigestKey, samples: Any, positions: Sequence[int]) -> Tensor:
    """Keyed digests (n, 16) uint8 of ``positions`` of a :class:`lightning_muter.model.dataset.SampleSource`."""
    rows = [
        torch.frombuffer(bytearray(key.digest(x, y)), dtype=torch.uint8) for _, x, y in samples.raw_samples(positions)
    ]
    return torch.stack(rows) if rows else torch.zeros(0, 16, dtype=torch.uint8)
