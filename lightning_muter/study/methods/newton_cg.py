"""The matrix-free method as a competitor: Newton-CG on the retained samples, for any subset of the parameters."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.objective.network import WideCurvature
from lightning_muter.snapshot.take import take_wide_snapshot
from lightning_muter.study.methods.base import Competitor, Outcome, State
from lightning_muter.study.methods.muter import outcome_of
from lightning_muter.study.models.base import Classifier
from lightning_muter.study.setup.problem import World
from lightning_muter.unlearning.unlearn import unlearn


class NewtonCG(Competitor):
    """``take_wide_snapshot`` once (nothing dense is stored), ``unlearn`` with the retained data per request.

    Args:
        scope: "all" trainable parameters or patterns over their names. Where a study has frozen the backbone, "all" is the
            head; a model trained end to end is changed in all its layers.
        response: as for ``Unlearn``; curvature: direct part, "ggn" or "hessian".
        steps: accepted steps of Newton-CG.
    """

    default_label = "Newton-CG"

    def __init__(
        self,
        scope: str | Sequence[str] = "all",
        response: Any = "auto",
        curvature: WideCurvature = "ggn",
        steps: int = 3,
        label: str | None = None,
    ) -> None:
        super().__init__(label)
        self.scope, self.response, self.curvature, self.steps = scope, response, curvature, steps

    def start(self, world: World) -> State:
        began = time.perf_counter()
        model = world.copy_model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the stationarity reached is a column of the table
            snapshot = take_wide_snapshot(
                model,
                world.data,
                scope=self.scope,
                threat_model=world.threat if world.threat is not None else ThreatModel("l2", 0.0, None),
                response=self.response,
                curvature=self.curvature,
                weight_decay=world.weight_decay,
                progress=False,
            )
        return State(world, model, time.perf_counter() - began, snapshot.nbytes, snapshot)

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        assert isinstance(state.model, Classifier)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            result = unlearn(
                state.model, state.stored, request, state.world.data, refine=self.steps - 1, progress=False
            )
        return outcome_of(state.model, result)
