"""What a caller says of a training, of taking its snapshot, of a request; and the robust objective that is meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.network import WideCurvature, WideObjective
from lightning_muter.curvature.problem.network import WideProblem
from lightning_muter.curvature.response.choose import Response, as_response
from lightning_muter.errors import ArgumentError, MismatchError
from lightning_muter.forgotten.digests import sample_digests
from lightning_muter.minimise.budget import Fit
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards, refuse_sharded_parameters
from lightning_muter.model.losses import Loss
from lightning_muter.model.reading import Reading
from lightning_muter.model.weight_decay import WholeDecay, read_weight_decay, used_optimizers
from lightning_muter.snapshot.reread import Access
from lightning_muter.snapshot.resume import Resumable
from lightning_muter.snapshot.size import DEFAULT_CAP
from lightning_muter.snapshot.snapshot import WIDE_BATCH, Snapshot, WideSnapshot
from lightning_muter.solvers.cg import TruncatedCG
from lightning_muter.storage.fingerprint import DigestKey

#: What knows adversarial examples of the training (`adversarial.examples`).
Examples = Callable[[Tensor], tuple[Tensor, Tensor]]
Decay = float | Mapping[str, float] | str
#: mu at the start, per sample.
DAMPING = 1e-2
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

    def threat(self, model: nn.Module) -> ThreatModel:
        """The threat model: given, of the attack, or of the model's own adversarial training.

        Raises:
            ArgumentError: none of them is known.
        """
        given = self.threat_model
        if isinstance(given, ThreatModel):
            return given
        if given is not None:
            advice = (
                f"Attacks go to attack=; of a norm: ThreatModel({given!r}, eps)."
                if isinstance(given, str)
                else ("Attacks go to attack=.")
            )
            raise ArgumentError("threat_model", given, "a ThreatModel(norm, eps, box)", advice)
        if self.attack is not None:
            return ThreatModel.from_attack(self.attack)
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
        threat = self.threat(model)
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
        """lambda of these parameters: given as one number or by name, or ("auto") read off the optimisers; and the ``penalty``
        that the training step adds by itself.

        Raises:
            ArgumentError: of another kind, negative or not finite; UnsuitableError: decoupled, or of an unknown optimiser.
        """
        given = self.weight_decay
        if isinstance(given, Mapping):
            values = {name: float(value) for name, value in given.items()}
        elif given == "auto":
            values = read_weight_decay(used_optimizers(model, self.optimizers), model.named_parameters())
        elif isinstance(given, (int, float)) and not isinstance(given, bool):
            values = dict.fromkeys(names, float(given))
        else:
            raise ArgumentError("weight_decay", given, "'auto', a number, or a dict of parameter names to numbers")
        found = {name: values.get(name, 0.0) for name in names}
        if not all(math.isfinite(value) and value >= 0 for value in found.values()):
            raise ArgumentError("weight_decay", given, "finite numbers, 0 or larger")
        if isinstance(given, WholeDecay):
            return found
        return {name: value + penalty.get(name, 0.0) for name, value in found.items()}

    def decay_of(self, model: nn.Module, problem: WideProblem, penalty: Mapping[str, float]) -> Tensor:
        """lambda per entry of w, (p,)."""
        values = self.decay_by_name(model, problem.names, penalty)
        found = torch.tensor([values[n] for n in problem.names], dtype=problem.dtype, device=problem.device)
        return torch.repeat_interleave(found, torch.tensor(problem.sizes, device=problem.device))


@dataclass(frozen=True, eq=False)
class TakeWide(Training):
    """What :func:`lightning_muter.take_wide_snapshot` is asked for."""

    model: nn.Module
    dataset: Dataset[Any]
    _: KW_ONLY
    polish: str | int = "auto"
    device: torch.device | str | None = None
    key: DigestKey | None = None
    normalization: Any = None
    reading: Reading | None = None

    def read_all(self, *, whole: bool = False) -> Reading:
        """What the model's step minimises, on the device where it is to be; ``whole``: its head need not be linear."""
        if self.device is not None:
            self.model.to(self.device)
        if self.reading is not None:
            return self.reading
        return self.read(self.model, self.dataset, normalization=self.normalization, whole=whole)


@dataclass(frozen=True, eq=False)
class Take(TakeWide):
    """What :func:`lightning_muter.take_snapshot` is asked for."""

    _: KW_ONLY
    scope: Any = "head"  # or "all", patterns, a `scope.base.Scope`
    batch_size: int = 1024
    budget: float | str | None = None
    fit: Fit | None = None
    examples: Examples | None = None
    tolerance: float | None = None
    size_cap: int = DEFAULT_CAP
    like: Snapshot | None = None
    resume: Resumable | None = None

    def identity(self, source: SampleSource, reading: Reading) -> dict[str, Any]:
        """What every kind of snapshot holds of the rows, their loss and the adversary.

        Raises:
            MismatchError: ``like`` is of other rows.
        """
        like = self.like
        key = self.key or (like.key if like is not None else None) or DigestKey.generate()
        digests = sample_digests(key, source, range(source.n))
        if like is not None and like.key_id == key.key_id and not torch.equal(digests, like.digests):
            raise MismatchError("like: it was taken of other rows, or in another order. Pass the same dataset.")
        return {
            "n_total": source.n,
            "forgotten": [],
            "threat_model": source.threat,
            "loss_name": reading.identity,
            "mass": source.mass,
            "normalization": reading.normalization,
            "input_shape": source.input_shape,
            "digests": digests,
            "key_id": key.key_id,
            "key": key,
            "sample_weight": source.weight,
        }


class Options(TypedDict, total=False):
    """The same besides the scope, which decides what comes back: for type checkers."""

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


@dataclass(frozen=True, eq=False)
class UnlearnWide(Training):
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
