"""The comparison itself: each method answers each scenario's requests and is measured against retraining."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_muter.errors import MuterError
from lightning_muter.study import metrics
from lightning_muter.study.attacks import stacked
from lightning_muter.study.methods.base import Competitor, Outcome, State
from lightning_muter.study.report.rows import PARTS, REFERENCE, Row
from lightning_muter.study.requests import Scenario
from lightning_muter.study.setup.cache import Cache, digest
from lightning_muter.study.setup.problem import World, head_vector, set_head

STATIONARY = 1e-2  # |gradient| / sum of the samples' |gradients|: above this no reference is one


@dataclass
class Part:
    """One set of samples: clean inputs, the reference's adversarial ones, and the reference's logits on both."""

    x: Tensor
    y: Tensor
    attacked: Tensor
    clean_logits: Tensor
    robust_logits: Tensor


@dataclass
class Reference:
    """The model retrained without the forgotten samples, and what it predicts; ``bound``: its own certified distance to the
    minimiser (NaN: not known).
    """

    model: nn.Module
    vector: Tensor
    stationarity: float
    seconds: float
    bound: float
    parts: dict[str, Part]


class Referee:
    """Retrains (once per forgotten set; kept in the cache) and measures."""

    def __init__(self, world: World, cache: Cache) -> None:
        self.world, self.cache = world, cache
        self.before = head_vector(world.model)
        self._key = world.key()
        self._test = stacked(world.test, world.model.head.weight.dtype)
        self._current: tuple[tuple[int, ...], Reference] | None = None

    def reference(self, forgotten: Sequence[int]) -> Reference:
        """The reference for a forgotten set; the last one is kept in memory, all of them on disk."""
        wanted = tuple(forgotten)
        if self._current is None or self._current[0] != wanted:
            self._current = (wanted, self._make(list(wanted)))
        return self._current[1]

    def _make(self, forgotten: list[int]) -> Reference:
        def retrain() -> tuple[dict[str, float], dict[str, Tensor]]:
            found = self.world.retrain(forgotten)
            bound = self.world.certified(found, forgotten)
            figures = {"stationarity": found.stationarity, "seconds": found.seconds}
            return figures | ({} if math.isnan(bound) else {"bound": bound}), {"head": head_vector(found.model)}

        (meta, tensors), _ = self.cache.get_or_make("reference", digest([self._key, forgotten]), retrain)
        model = self.world.copy_model()
        set_head(model, tensors["head"])
        samples = {
            "forget": self.world.tensors(forgotten),
            "retain": self.world.tensors(self.world.retained(forgotten)),
            "test": self._test,
        }
        parts = {name: self._part(model, *samples[name]) for name in PARTS}
        stationarity, seconds, bound = (
            float(meta.get(name, math.nan)) for name in ("stationarity", "seconds", "bound")
        )
        return Reference(model, tensors["head"], stationarity, seconds, bound, parts)

    def _part(self, model: nn.Module, x: Tensor, y: Tensor) -> Part:
        judge, world = self.world.evaluation, self.world
        attacked = judge.adversarial(model, x, y, world.threat, world.loss)
        return Part(x, y, attacked, judge.logits(model, x), judge.logits(model, attacked))

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, row: Row, outcome: Outcome, reference: Reference) -> Row:
        """The row with the outcome's figures filled in."""
        judge, world = self.world.evaluation, self.world
        figures: dict[str, float] = {}
        if outcome.parameters is not None:
            absolute, _ = metrics.parameter_distances(outcome.parameters, reference.vector, self.before)
            figures["distance_absolute"] = float(absolute)
            if not torch.equal(self.before, reference.vector):
                relative = metrics.relative_parameter_distance(outcome.parameters, reference.vector, self.before)
                figures["distance"] = float(relative)
        for name in PARTS:
            part = reference.parts[name]
            clean = judge.logits(outcome.model, part.x)
            on_attacked = judge.logits(outcome.model, part.attacked)
            for kind, logits, other in (
                ("clean", clean, part.clean_logits),
                ("robust", on_attacked, part.robust_logits),
            ):
                figures[f"agreement_{name}_{kind}"] = float(metrics.agreement(logits, other))
                figures[f"kl_{name}_{kind}"] = float(metrics.prediction_kl(logits, other))
            if name == "retain":
                continue
            own = part.attacked
            if outcome.model is not reference.model:
                own = judge.adversarial(outcome.model, part.x, part.y, world.threat, world.loss)
            robust = judge.logits(outcome.model, own)
            clean_accuracy, robust_accuracy = (float(metrics.accuracy(z, part.y)) for z in (clean, robust))
            if name == "forget":
                figures["forget_clean_acc"], figures["forget_robust_acc"] = clean_accuracy, robust_accuracy
            else:
                figures["clean_acc"], figures["robust_acc"] = clean_accuracy, robust_accuracy
                figures["clean_gap"] = float(metrics.accuracy_gap(clean, part.clean_logits, part.y))
                figures["robust_gap"] = float(metrics.accuracy_gap(robust, part.robust_logits, part.y))
        return replace(
            row,
            **figures,  # type: ignore[arg-type]
            status=outcome.status,
            residual=outcome.residual,
            bound=outcome.bound,
            stationarity=outcome.stationarity,
            seconds_request=outcome.seconds,
            seconds_retrain=reference.seconds,
            note=outcome.note,
        )


def run(
    world: World,
    methods: Sequence[Competitor],
    scenarios: Sequence[Scenario],
    cache: Cache,
    row: Row,
    begin: Callable[[str], None] = lambda what: None,
) -> Iterator[Row]:
    """Rows of every scenario, request and method, each as soon as it is measured.

    ``row`` holds what all rows share. A method that refuses (a solver's bad status, an unsuitable threat model) gives a
    row that says so; the others go on.
    """
    referee = Referee(world, cache)
    states: dict[int, State | MuterError] = {}
    for scenario in scenarios:
        running: dict[int, State | MuterError] = {}
        for step, label in enumerate(scenario.labels):
            request, forgotten = scenario.requests[step], scenario.forgotten(step)
            shared = replace(
                row,
                setting=label,
                n_total=len(world.data),
                n_forgotten=len(forgotten),
                percent=100 * len(forgotten) / len(world.data),
            )
            begin(f"{label}: {REFERENCE}")
            reference = referee.reference(forgotten)
            yield _reference_row(referee, reference, shared)
            for j, method in enumerate(methods):
                begin(f"{label}: {method.label}")
                if j not in states:
                    states[j] = _started(method, world)
                if j not in running:
                    running[j] = copy.deepcopy(states[j], {id(world): world})
                state = running[j]
                own = replace(shared, method=method.label)
                if isinstance(state, State):
                    own = replace(own, seconds_snapshot=state.seconds, state_bytes=state.bytes)
                    try:
                        outcome = method.forget(state, request, forgotten)
                        yield referee.measure(own, outcome, reference)
                        continue
                    except MuterError as error:
                        state = running[j] = error  # later requests of this scenario have nothing to build on
                yield replace(own, status="refused", note=_one_line(state), seconds_retrain=reference.seconds)


def _started(method: Competitor, world: World) -> State | MuterError:
    try:
        return method.start(world)
    except MuterError as error:
        return error


def _reference_row(referee: Referee, reference: Reference, row: Row) -> Row:
    note = ""
    if reference.stationarity > STATIONARY:
        note = f"the reference is stationary to {reference.stationarity:.1e} only: distances below tell little"
    outcome = Outcome(
        reference.model,
        reference.seconds,
        reference.vector,
        status="reference",
        stationarity=reference.stationarity,
        bound=reference.bound,
        note=note,
    )
    return referee.measure(replace(row, method=REFERENCE), outcome, reference)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def steps(methods: Sequence[Competitor], scenarios: Sequence[Scenario]) -> int:
    """How often :func:`run` begins something."""
    return sum(len(s.labels) for s in scenarios) * (1 + len(methods))
