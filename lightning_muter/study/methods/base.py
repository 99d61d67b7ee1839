"""What unlearning is compared with: one class per way to answer a deletion request, all with the same two steps.

``start(world)`` prepares once (a snapshot, shards, nothing); ``forget(state, request, forgotten)`` answers the next request.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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
    """The outcome of a method that changed the head alone."""
    return Outcome(model, math.nan, parameters=head_vector(model), **figures)
