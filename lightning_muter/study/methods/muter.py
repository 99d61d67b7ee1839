"""Methods that solve with curvature: this package's unlearning in all its variants, and the published closed forms."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.study.methods.base import Competitor, Outcome, State, head_outcome
from lightning_muter.study.models.base import Classifier
from lightning_muter.study.setup.problem import World
from lightning_muter.unlearning.result import UnlearnResult
from lightning_muter.unlearning.unlearn import unlearn


class Unlearn(Competitor):
    """``take_snapshot`` once, ``unlearn`` per request.

    Args:
        response: of the inner maximiser: "auto" (from the threat model), "none", "unconstrained", "l2", "linf" or a
            Response.
        curvature: direct part, "hessian", "ggn" or "fisher".
        solver: "auto", "cholesky", "cg", "neumann", "schur" or a Solver.
        refine: further steps with the retained data.
        method: a ``Method`` of ``lightning_muter.scope.head_methods``; None for the default.
        certify: read the retained data for the certificate, also without refinement.
    """

    default_label = "constraint-aware"

    def __init__(
        self,
        response: Any = "auto",
        curvature: Curvature = "hessian",
        solver: Any = "auto",
        refine: int = 0,
        method: Any = None,
        certify: bool = False,
        label: str | None = None,
    ) -> None:
        super().__init__(label)
        self.response, self.curvature, self.solver = response, curvature, solver
        self.refine, self.method, self.certify = refine, method, certify

    def start(self, world: World) -> State:
        began = time.perf_counter()
        model = world.copy_model()
        snapshot = world.statistics(model, response=self.response, curvature=self.curvature)
        return State(world, model, time.perf_counter() - began, stored_bytes(snapshot), snapshot)

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        assert isinstance(state.model, Classifier)
        result = unlearn(
            state.model,
            state.stored,
            request,
            state.world.data,
            method=self.method,
            solver=self.solver,
            retain=state.world.data if self.refine or self.certify else None,
            refine=self.refine,
            accept="worse",  # published formulas are measured as they are
            progress=False,
        )
        return outcome_of(state.model, result)


def outcome_of(model: Classifier, result: UnlearnResult) -> Outcome:
    """What a request came to."""
    return head_outcome(
        model,
        status=str(result.solver["status"]),
        residual=float(result.solver["residual"]),
        bound=math.nan if result.bound is None else result.bound,
        stationarity=math.nan if result.stationarity_after is None else result.stationarity_after,
    )


def stored_bytes(snapshot: Snapshot) -> float:
    """Bytes of the tensors that a snapshot keeps."""
    kept = [snapshot.hessian.blocks, snapshot.gradient, snapshot.theta_ref, snapshot.theta_base, snapshot.decay]
    kept += [t for t in (snapshot.digests, snapshot.starts, snapshot.sample_weight) if t is not None]
    return float(sum(t.numel() * t.element_size() for t in kept))
