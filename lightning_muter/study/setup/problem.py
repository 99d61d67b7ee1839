"""What every method of a study starts from: one trained model, its data, its threat model, and how it was trained."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.certificate.certificate import certify, why_no_certificate
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards
from lightning_muter.scope.head_methods import objective_of
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.take import take_snapshot
from lightning_muter.storage.fingerprint import weight_fingerprint
from lightning_muter.study.attacks import Evaluation, stacked
from lightning_muter.study.data.arrays import ArrayDataset
from lightning_muter.study.models.base import Classifier


class Retrained(NamedTuple):
    """A model minimised on what is left, how stationary, in what time, and the snapshot taken there."""

    model: Classifier
    stationarity: float
    seconds: float
    snapshot: Snapshot | None = None


@dataclass
class World:
    """A model that is stationary on ``data`` (head scope), and what is needed to answer and to judge requests.

    Args:
        model: trained; its backbone frozen.
        data: the private part; positions to forget count in it.
        test: the test part.
        threat: what the model was trained against, None for standard training.
        weight_decay: lambda of the objective.
        evaluation: the attack for testing.
        seed: of everything random in a method.
        snapshot_options: further keywords of every ``take_snapshot`` (``inner``, ``polish``, ``batch_size``, ...).
        base: the snapshot that left the model stationary: others of the same weights start from its maximisers.
        retrainer: replaces :meth:`minimise` (tests).
    """

    model: Classifier
    data: ArrayDataset
    test: ArrayDataset
    threat: ThreatModel | None
    weight_decay: float
    evaluation: Evaluation
    seed: int
    snapshot_options: dict[str, Any] = field(default_factory=dict)
    base: Snapshot | None = None
    retrainer: Callable[[Classifier, Any], float] | None = None

    @property
    def loss(self) -> Callable[..., Tensor]:
        return self.model.criterion

    def copy_model(self) -> Classifier:
        return copy.deepcopy(self.model)

    def retained(self, forgotten: Sequence[int]) -> list[int]:
        gone = set(forgotten)
        return [i for i in range(len(self.data)) if i not in gone]

    def tensors(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets at some positions, in the model's precision."""
        return stacked(self.data, self.model.head.weight.dtype, list(positions))

    def snapshot(self, model: Classifier, data: Any = None, **options: Any) -> Snapshot:
        """A snapshot of ``model`` on ``data`` (default: the private part) under this world's objective."""
        with warnings.catch_warnings():
            # the status and the stationarity reached are columns of the table
            warnings.simplefilter("ignore", UserWarning)
            return take_snapshot(
                model,
                self.data if data is None else data,
                threat_model=self.threat if self.threat is not None else ThreatModel("l2", 0.0, None),
                weight_decay=self.weight_decay,
                progress=False,
                **{**self.snapshot_options, **options},
            )

    def statistics(self, model: Classifier, **options: Any) -> Snapshot:
        """A snapshot of this world's own weights, which are left as they are."""
        if self.base is not None:
            options = {"like": self.base, **options}
        return self.snapshot(model, **{**options, "polish": 0})

    def settle(self) -> None:
        """Leave the model where its objective on the private part is stationary, and keep that snapshot as the base."""
        self.base = self.snapshot(self.model)

    def minimise(self, model: Classifier, data: Any) -> tuple[float, Snapshot | None]:
        """Minimise the robust objective on a dataset further, from where the head stands; the stationarity reached, and the
        snapshot taken there.

        The objective is the base snapshot's: the smoothing of an L-infinity adversary belongs to it, as eps does.
        """
        if self.retrainer is not None:
            return self.retrainer(model, data), None
        options: dict[str, Any] = {}
        if self.base is not None and self.base.smoothing.anchor is not None:
            options["smoothing"] = self.base.smoothing
        snapshot = self.snapshot(model, data, **options)
        return float(snapshot.figures["stationarity_smoothed"]), snapshot  # as references are told

    def retrain(self, forgotten: Sequence[int], start: Classifier | None = None) -> Retrained:
        """Minimise on what is left, from a zero head or from ``start``'s."""
        model = copy.deepcopy(self.model if start is None else start)
        began = time.perf_counter()
        if start is None:
            model.reset_head()
        reached, snapshot = self.minimise(model, Subset(self.data, self.retained(forgotten)))
        return Retrained(model, reached, time.perf_counter() - began, snapshot)

    def certified(self, retrained: Retrained, forgotten: Sequence[int]) -> float:
        """How far the retrained head is from the minimiser at most; NaN where no bound is known."""
        snapshot = retrained.snapshot
        if snapshot is None:
            return math.nan
        source = SampleSource(Subset(self.data, self.retained(forgotten)))
        problem = HeadProblem(retrained.model, self.loss, source.examples())
        if why_no_certificate(problem, snapshot.decay, snapshot.threat_model) is not None:
            return math.nan
        objective = objective_of(snapshot, problem, source, list(range(source.n)), snapshot.starts, Shards())
        theta = problem.read_theta()
        return certify(objective, theta, objective.evaluate(theta))

    def key(self) -> str:
        """Digest of everything that a retrained reference depends on, the forgotten samples aside."""
        anchor = None if self.base is None else self.base.smoothing.anchor
        parts = {
            "weights": weight_fingerprint(
                {k: v for k, v in self.model.state_dict().items() if k.startswith("backbone")}
            ),
            "data": data_digest(self.data),
            "threat": None if self.threat is None else self.threat.to_dict(),
            "weight_decay": self.weight_decay,
            "model": type(self.model).__name__,
            "loss": repr(self.loss)
            if isinstance(self.loss, nn.Module)
            else getattr(self.loss, "__name__", repr(self.loss)),
            "head": list(self.model.head.weight.shape),
            "dtype": str(self.model.head.weight.dtype),
            "options": {k: repr(v) for k, v in sorted(self.snapshot_options.items())},
            "smoothing": None if anchor is None else weight_fingerprint({"anchor": anchor}),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def data_digest(data: ArrayDataset) -> str:
    """Digest of inputs, labels and their order."""
    digest = hashlib.sha256(data.targets.numpy().tobytes())
    digest.update(data.x.contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def head_vector(model: Classifier) -> Tensor:
    """Weight and bias of the head as one float64 vector: what distances are measured in."""
    return torch.cat([p.detach().reshape(-1).double().cpu() for p in (model.head.weight, model.head.bias)])


@torch.no_grad()
def set_head(model: Classifier, vector: Tensor) -> None:
    """Write [W | b], flattened, into the head."""
    weight, bias = model.head.weight, model.head.bias
    cut = weight.numel()
    weight.copy_(vector[:cut].reshape(weight.shape))
    bias.copy_(vector[cut:])
