"""The ends of the scale: retraining, and keeping the model as it is."""

from __future__ import annotations

import torch

from lightning_muter.study.methods.base import Competitor, Outcome, State, head_outcome
from lightning_muter.study.models.base import Classifier
from lightning_muter.study.report.rows import FLOORS, NOTHING
from lightning_muter.study.setup.problem import head_vector


class Nothing(Competitor):
    """Keep the model: w_u = w. Relative distance 1 by definition."""

    default_label = NOTHING

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        outcome = head_outcome(state.world.model, status="")
        outcome.seconds = 0.0
        return outcome


class RetrainCold(Competitor):
    """Retraining on the retained samples from a random head: beside the reference (from a zero head) it shows how far
    apart two retrainings are, the noise floor of every distance.
    """

    default_label = FLOORS[0]

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

    default_label = FLOORS[1]

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        assert isinstance(state.model, Classifier)
        model, stationarity, seconds, _ = state.world.retrain(forgotten, state.model)
        state.model = model
        return Outcome(model, seconds, head_vector(model), stationarity=stationarity)
