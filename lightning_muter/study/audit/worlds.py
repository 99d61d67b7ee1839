"""One world of an audit: draw the data, train, unlearn by every method from the same model, retrain; score all of them.

The pool (samples that nobody asks to forget) gives two thirds of itself to each world, drawn anew; of the candidates (what a study's
requests ask for) a third is kept, a third removed in one request, a third never seen. Training and retraining are one
procedure: from a zero head to the minimiser of the robust objective.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from lightning_muter import __version__
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import MuterError
from lightning_muter.evidence.observed import KEPT, REMOVED, draw_roles
from lightning_muter.study.attacks import stacked
from lightning_muter.study.compare import STATIONARY
from lightning_muter.study.methods.base import Competitor, Outcome
from lightning_muter.study.metrics import class_logits, correct_predictions
from lightning_muter.study.report.rows import NOTHING, REFERENCE
from lightning_muter.study.setup.cache import Cache, Entry, digest
from lightning_muter.study.setup.problem import World

BEFORE = NOTHING  # the model as it was trained


@dataclass(frozen=True)
class Plan:
    """What all worlds of an audit share.

    Args:
        world: the trained problem of the study; its backbone, its data and its settings are every world's.
        candidates: positions in ``world.data`` that are asked for.
        methods: competitors by a key that changes with their settings.
        worlds, seed: how many draws, and of what.
        pool: share of the other samples that a world trains on.
        population: test samples for RMIA.      points: random points in the ball around each candidate.
    """

    world: World
    candidates: tuple[int, ...]
    methods: Mapping[str, Competitor]
    worlds: int
    seed: int
    pool: float = 2 / 3
    population: int = 100
    points: int = 200

    def roles(self) -> np.ndarray:
        """(candidates, worlds); the first worlds are the same however many there are."""
        return draw_roles(len(self.candidates), self.worlds, self.seed)

    def positions(self, index: int) -> tuple[list[int], list[int]]:
        """Positions in the study's data that world ``index`` trains on, and those among them that are removed."""
        chosen = set(self.candidates)
        others = np.array([i for i in range(len(self.world.data)) if i not in chosen])
        size = round(self.pool * len(others))
        drawn = np.random.default_rng([self.seed, index]).permutation(others)[:size].tolist()
        roles = self.roles()[:, index]
        held = [c for c, role in zip(self.candidates, roles, strict=True) if role in (KEPT, REMOVED)]
        removed = [c for c, role in zip(self.candidates, roles, strict=True) if role == REMOVED]
        return sorted([*drawn, *held]), removed

    def key(self, index: int, method: str) -> str:
        """Of a cached entry: everything its figures depend on."""
        judge = vars(self.world.evaluation)
        settings = [
            self.seed,
            index,
            self.pool,
            self.population,
            self.points,
            type(self.world.evaluation).__name__,
            judge,
        ]
        return digest([__version__, self.world.key(), list(self.candidates), settings, method])

    def trained(self, stationarity: float) -> str:
        """How a world was trained, in words: two worlds that differ in it are no shadows of each other."""
        threat = self.world.threat
        ended = f"{stationarity:.0e} only" if stationarity > STATIONARY else "stationary"
        return json.dumps(
            {
                "settings": self.world.key(),
                "threat": None if threat is None else threat.to_dict(),
                "decay": self.world.weight_decay,
                "pool": self.pool,
                "ended": ended,
            },
            sort_keys=True,
        )


def missing(plan: Plan, cache: Cache, index: int) -> list[str]:
    """Keys of what is not in the cache yet of a world."""
    return [name for name in (BEFORE, *plan.methods, REFERENCE) if cache.get("audit", plan.key(index, name)) is None]


def make_world(plan: Plan, cache: Cache, index: int) -> None:
    """Train one world and put everything that is missing of it into the cache. Nothing else of it is kept, so that a world begun
    anew after an interruption goes the same way as one that was not.
    """
    wanted = missing(plan, cache, index)
    if not wanted:
        return
    world, request = _trained(plan, index)
    assert world.base is not None
    trained = plan.trained(float(world.base.stationarity))
    for name in wanted:
        if name == BEFORE:
            outcome: Outcome | MuterError = Outcome(world.model, 0.0)
        elif name == REFERENCE:
            found = world.retrain(request)
            outcome = Outcome(found.model, found.seconds, stationarity=found.stationarity)
        else:
            outcome = _answered(plan.methods[name], world, request)
        meta, tensors = _scored(plan, world, outcome)
        cache.put("audit", plan.key(index, name), {**meta, "trained": trained}, tensors)


def _trained(plan: Plan, index: int) -> tuple[World, list[int]]:
    """The world, and the positions in its own data that are asked for."""
    positions, removed = plan.positions(index)
    place = {position: i for i, position in enumerate(positions)}
    model = plan.world.copy_model()
    model.reset_head()
    world = replace(
        plan.world,
        model=model,
        data=plan.world.data.take(positions, every_class=False),
        base=None,
        seed=plan.world.seed,
    )
    world.settle()
    return world, [place[position] for position in removed]


def _answered(method: Competitor, world: World, request: list[int]) -> Outcome | MuterError:
    try:
        return method.forget(copy.deepcopy(method.start(world), {id(world): world}), request, request)
    except MuterError as error:
        return error


def _scored(plan: Plan, world: World, outcome: Outcome | MuterError) -> Entry:
    """Margins, hits around the candidates, and accuracies of one model."""
    if isinstance(outcome, MuterError):
        return {"refused": " ".join(str(outcome).split())[:400]}, {}
    dtype = world.model.head.weight.dtype
    candidates, labels = stacked(plan.world.data, dtype, list(plan.candidates))
    test, truth = stacked(world.test, dtype)
    few = slice(0, plan.population)
    tensors: dict[str, Tensor] = {}
    accuracies: dict[str, float] = {}
    for inputs in ("clean", "adversarial"):
        seen, other = (_inputs(world, outcome.model, x, y, inputs) for x, y in ((candidates, labels), (test, truth)))
        tensors[f"margins_{inputs}"] = margins(world.evaluation.logits(outcome.model, seen), labels)
        logits = world.evaluation.logits(outcome.model, other)
        tensors[f"population_{inputs}"] = margins(logits[few], truth[few])
        accuracies["clean" if inputs == "clean" else "robust"] = float(
            correct_predictions(logits, truth).double().mean()
        )
    tensors["hits"] = _hits(plan, world, outcome.model, candidates, labels)
    return {
        **accuracies,
        "status": outcome.status,
        "seconds": outcome.seconds,
        "stationarity": outcome.stationarity,
    }, tensors


def _inputs(world: World, model: nn.Module, x: Tensor, y: Tensor, inputs: str) -> Tensor:
    return x if inputs == "clean" else world.evaluation.adversarial(model, x, y, world.threat, world.loss)


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """``log p_y - log sum_{k != y} p_k``, (n,) float64.

    >>> margins(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([1])).exp()
    tensor([0.5000], dtype=torch.float64)
    """
    z = class_logits(logits).double()
    own = z.gather(1, y[:, None])[:, 0]
    return own - z.scatter(1, y[:, None], -math.inf).logsumexp(1)


def _hits(plan: Plan, world: World, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(candidates, points) uint8: whether random points around each candidate get its label; the points are always the same."""
    around = ball_points(x, world.threat, plan.points, plan.seed)
    logits = world.evaluation.logits(model, around.flatten(0, 1))
    return correct_predictions(logits, y.repeat_interleave(plan.points)).reshape(len(x), plan.points).to(torch.uint8)


def ball_points(x: Tensor, threat: ThreatModel | None, count: int, seed: int) -> Tensor:
    """Random points in the threat model's ball around each input, (n, count, ...); the inputs themselves without one."""
    repeated = x[:, None].expand(len(x), count, *x.shape[1:])
    if threat is None or threat.eps == 0:
        return repeated.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flat = repeated.reshape(len(x) * count, -1)
        moved = flat + threat.project(threat.ball.sample(flat, threat.eps), flat)
    return moved.reshape(repeated.shape)
