"""What unlearning is compared with: one class per way to answer a deletion request, all with the same two steps.

``start(world)`` prepares once (a snapshot, shards, nothing); ``forget(state, request, forgotten)`` answers the next
request. Methods that only descend or ascend on samples are here; those that solve with curvature are in ``curved``.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.adversarial.adversary import LossAttack
from lightning_muter.errors import ArgumentError
from lightning_muter.model.losses import per_sample
from lightning_muter.study.models.base import Classifier
from lightning_muter.study.setup.problem import World, head_vector


@dataclass
class State:
    """What a method keeps between requests."""

    world: World
    model: nn.Module
    seconds: float = 0.0
    bytes: float = math.nan
    stored: Any = None


@dataclass
class Outcome:
    """The model after a request. ``parameters`` is None where there is no single head to compare."""

    model: nn.Module
    seconds: float
    parameters: Tensor | None = None
    status: str = "done"
    residual: float = math.nan
    bound: float = math.nan
    stationarity: float = math.nan
    note: str = ""


class Competitor(ABC):
    """One way to answer deletion requests.

    Args:
        label: the name in tables and pictures.
    """

    default_label = "method"

    def __init__(self, label: str | None = None) -> None:
        self.label = label if label is not None else self.default_label

    def start(self, world: World) -> State:
        """Prepare, before any request is known."""
        return State(world, world.copy_model())

    def forget(self, state: State, request: Sequence[int], forgotten: Sequence[int]) -> Outcome:
        """Answer the next request; ``forgotten`` are all positions asked for so far, this request included."""
        began = time.perf_counter()
        outcome = self.answer(state, list(request), list(forgotten))
        if math.isnan(outcome.seconds):
            outcome.seconds = time.perf_counter() - began
        return outcome

    @abstractmethod
    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome: ...


def head_outcome(model: Classifier, **figures: Any) -> Outcome:
    return Outcome(model, math.nan, parameters=head_vector(model), **figures)


class Nothing(Competitor):
    """Keep the model: w_u = w. Relative distance 1 by definition."""

    default_label = "doing nothing"

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        outcome = head_outcome(state.world.model, status="")
        outcome.seconds = 0.0
        return outcome


class RetrainCold(Competitor):
    """Retraining on the retained samples from a random head: beside the reference (from a zero head) it shows how far
    apart two retrainings are, the noise floor of every distance."""

    default_label = "retraining, random start"

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        start = state.world.copy_model()
        generator = torch.Generator().manual_seed(state.world.seed + 1)
        with torch.no_grad():
            for parameter in start.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
        model, stationarity, seconds, _ = state.world.retrain(forgotten, start)
        return Outcome(model, seconds, head_vector(model), stationarity=stationarity)


class RetrainWarm(Competitor):
    """Retraining on the retained samples from the current head: the fastest honest competitor."""

    default_label = "retraining, warm start"

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        assert isinstance(state.model, Classifier)
        model, stationarity, seconds, _ = state.world.retrain(forgotten, state.model)
        state.model = model
        return Outcome(model, seconds, head_vector(model), stationarity=stationarity)


# -- stochastic gradients ----------------------------------------------------------------------------------------------


def descend(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    world: World,
    *,
    epochs: int,
    lr: float,
    seed: int,
    batch_size: int = 64,
    momentum: float = 0.9,
    sign: float = 1.0,
    attack_steps: int = 10,
) -> None:
    """Adversarial SGD on the head: ``w <- w - lr (sign * grad of the batch's mean robust loss + weight_decay w)``.

    The order of the samples depends on ``seed`` alone, the adversarial points on the weights alone.
    """
    if len(x) == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    attack = (
        None if world.threat is None else LossAttack(world.threat, world.loss, steps=attack_steps, random_start=False)
    )
    decay = world.weight_decay if sign > 0 else 0.0
    optimiser = torch.optim.SGD(model.head.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    model.eval()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(batch_size):
            points = x[batch] if attack is None or world.threat is None else attack(model, x[batch], y[batch])
            loss = sign * per_sample(world.loss, model(points), y[batch]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    optimiser.zero_grad()


class FineTune(Competitor):
    """A few epochs of adversarial SGD on the retained samples, from the current head.

    Source: the "fine-tuning" baseline of A. Golatkar et al., CVPR 2020.
    """

    default_label = "fine-tuning"

    def __init__(self, epochs: int = 5, lr: float = 0.05, label: str | None = None) -> None:
        super().__init__(label)
        self.epochs, self.lr = epochs, lr

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        assert isinstance(state.model, Classifier)
        x, y = state.world.tensors(state.world.retained(forgotten))
        descend(state.model, x, y, state.world, epochs=self.epochs, lr=self.lr, seed=state.world.seed)
        return head_outcome(state.model)


class NegativeGradient(Competitor):
    """Adversarial gradient *ascent* on the forgotten samples: ``w <- w + lr grad of their mean robust loss``.

    Source: the "negative gradient" baseline of A. Golatkar et al., CVPR 2020.
    """

    default_label = "negative gradient"

    def __init__(self, epochs: int = 1, lr: float = 0.01, label: str | None = None) -> None:
        super().__init__(label)
        self.epochs, self.lr = epochs, lr

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        assert isinstance(state.model, Classifier)
        x, y = state.world.tensors(request)
        descend(
            state.model,
            x,
            y,
            state.world,
            epochs=self.epochs,
            lr=self.lr,
            momentum=0.0,
            sign=-1.0,
            seed=state.world.seed,
        )
        return head_outcome(state.model)


# -- SISA --------------------------------------------------------------------------------------------------------------


class Ensemble(nn.Module):
    """Mean of the constituents' predicted probabilities, as logits, on one shared backbone."""

    def __init__(self, model: Classifier, heads: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.model, self.heads = model, nn.ModuleList(heads)
        self.criterion = model.criterion

    def forward(self, x: Tensor) -> Tensor:
        features = self.model.features(x)
        logits = torch.stack([head(features) for head in self.heads])
        if logits.shape[-1] == 1:
            mean = torch.sigmoid(logits).mean(0)
            return torch.log(mean) - torch.log1p(-mean)
        return torch.logsumexp(torch.log_softmax(logits, dim=-1), dim=0) - math.log(len(self.heads))


class SISA(Competitor):
    """Sharded, isolated, sliced, aggregated training: retrain only what the forgotten samples touched.

    The private part is dealt into ``shards``; each trains a head of its own, slice after slice (after slice r on slices
    1..r, ``epochs`` each), keeping a checkpoint before every slice. A request retrains the shards it touches, from the
    first slice it touches. Predictions are averaged, so there is no single head to measure a distance of.

    Source: L. Bourtoule et al., "Machine Unlearning", IEEE S&P 2021.
    """

    default_label = "SISA"

    def __init__(
        self, shards: int = 5, slices: int = 3, epochs: int = 10, lr: float = 0.1, label: str | None = None
    ) -> None:
        super().__init__(label)
        if shards < 1 or slices < 1:
            raise ArgumentError("shards", shards, "at least one shard of at least one slice")
        self.shards, self.slices, self.epochs, self.lr = shards, slices, epochs, lr

    def start(self, world: World) -> State:
        began = time.perf_counter()
        if self.shards * self.slices > len(world.data):
            raise ArgumentError("shards", self.shards, f"shards x slices of at most {len(world.data)} samples")
        order = torch.randperm(len(world.data), generator=torch.Generator().manual_seed(world.seed)).tolist()
        dealt = [order[s :: self.shards] for s in range(self.shards)]
        plan = [[shard[r :: self.slices] for r in range(self.slices)] for shard in dealt]
        trained = [self.train(world, s, parts) for s, parts in enumerate(plan)]
        stored = {"plan": plan, "checkpoints": trained}
        heads = [saved for checkpoints in trained for saved in checkpoints]
        size = sum(tensor.numel() * tensor.element_size() for saved in heads for tensor in saved.values())
        state = State(world, world.copy_model(), time.perf_counter() - began, size, stored)
        state.model = self.ensemble(state)
        return state

    def train(
        self,
        world: World,
        shard: int,
        parts: Sequence[Sequence[int]],
        checkpoints: Sequence[dict[str, Tensor]] = (),
    ) -> list[dict[str, Tensor]]:
        """Checkpoints before slice 0, 1, ... and after the last; those given (up to where training starts) are kept."""
        model = world.copy_model()
        if checkpoints:
            model.head.load_state_dict(checkpoints[-1])
        else:
            model.reset_head()
        saved = list(checkpoints) or [_saved(model)]
        for r in range(len(saved) - 1, len(parts)):
            x, y = world.tensors([i for part in parts[: r + 1] for i in part]) if any(parts[: r + 1]) else (None, None)
            if x is not None and y is not None and parts[r]:
                seed = world.seed * 1_000_003 + shard * 1009 + r
                descend(model, x, y, world, epochs=self.epochs, lr=self.lr, seed=seed)
            saved.append(_saved(model))
        return saved

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        gone, plan, checkpoints = set(request), state.stored["plan"], state.stored["checkpoints"]
        touched = 0
        for s, parts in enumerate(plan):
            first = next((r for r, part in enumerate(parts) if gone & set(part)), None)
            if first is None:
                continue
            touched += 1
            plan[s] = [[i for i in part if i not in gone] for part in parts]
            checkpoints[s] = self.train(state.world, s, plan[s], checkpoints[s][: first + 1])
        state.model = self.ensemble(state)
        return Outcome(state.model, math.nan, status=f"{touched} of {len(plan)} shards")

    def ensemble(self, state: State) -> Ensemble:
        heads = []
        model = state.world.copy_model()
        for checkpoints in state.stored["checkpoints"]:
            head = nn.Linear(model.head.in_features, model.head.out_features, dtype=model.head.weight.dtype)
            head.load_state_dict(checkpoints[-1])
            heads.append(head)
        return Ensemble(model, heads)


def _saved(model: Classifier) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.head.state_dict().items()}
