"""Newton-CG with the damping of Levenberg and Marquardt, on the robust objective of any parameters:

(H + mu n I) d = -grad F(w),     accepted iff F falls;     mu falls where the model predicts well, grows where it does not
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.kfac import Kronecker
from lightning_muter.curvature.objective.network import WideObjective
from lightning_muter.errors import SolveError
from lightning_muter.solvers.cg import TruncatedCG
from lightning_muter.watching import watched

_log = logging.getLogger(__name__)


@dataclass
class Found:
    """Where a search ended: w, first and last evaluation, the last accepted solve, every trial, and the stationarity after
    each accepted step.
    """

    w: Tensor
    first: Evaluation
    last: Evaluation
    solver: dict[str, Any]
    trials: list[dict[str, Any]] = field(default_factory=list)
    history: list[float] = field(default_factory=list)


@dataclass
class LevenbergMarquardt:
    """Damped steps around truncated CG.

    Attributes:
        damping: mu of the next trial, per sample.
        deadline: no trial is begun after this ``time.perf_counter()``; None: no limit.
        title: of the progress bar, None shows none.
    """

    objective: WideObjective
    cg: TruncatedCG
    damping: float = 1e-3
    deadline: float | None = None
    title: str | None = None
    _factors: Kronecker | None = field(default=None, init=False, repr=False)

    def run(self, w: Tensor, steps: int, tolerance: float) -> Found:
        """At most ``steps`` accepted steps from w, until ``tolerance`` on the stationarity.

        Raises:
            SolveError: not one trial was accepted.
        """
        objective = self.objective
        with tqdm(
            total=steps, desc=self.title, unit="step", disable=not watched(self.title is not None), leave=False
        ) as line:
            now = objective.evaluate(w)
            objective.accept(now)
            found = Found(w, now, now, {"status": "converged", "residual": 0.0, "iterations": 0})
            rejected = 0
            while len(found.history) < steps and found.last.stationarity > tolerance and rejected < 8:
                if self.deadline is not None and self._late():
                    break
                accepted = self._trial(found, line)
                rejected = 0 if accepted else rejected + 1
                line.update(int(accepted))
        if not found.history and found.first.stationarity > tolerance:
            tried = [(t["damping"], t["status"]) for t in found.trials]
            raise SolveError(
                f"No step lowered the robust objective (trials, damping and status: {tried}). "
                "Nothing was changed. Allow more iterations of the inner solver (inner=InnerSolver(max_iter=300)), a "
                "larger damping, or more seconds."
            )
        return found

    def _late(self) -> bool:
        """Asked of all processes together, so that all stop together."""
        late = torch.tensor([float(time.perf_counter() > (self.deadline or 0.0))], dtype=torch.float64)
        late = late.to(self.objective.problem.device, self.objective.problem.dtype)
        self.objective.reduce([late])
        return bool(late > 0)

    def _trial(self, found: Found, line: Any) -> bool:
        objective, now, w = self.objective, found.last, found.w
        shift = self.damping * objective.count
        if self._factors is None:
            self._factors = Kronecker(objective, w)

        def product(v: Tensor) -> Tensor:
            return objective.product(w, v, shift)

        def on_step(step: int, residual: float) -> None:
            line.set_postfix_str(f"cg {step}, residual {residual:.1e}, stationarity {now.stationarity:.1e}")

        solution, predicted = self.cg.solve(product, -now.gradient, self._factors.inverse(shift), on_step)
        trial = w + solution.value
        finite = bool(torch.isfinite(trial).all())
        new = objective.evaluate(trial) if finite else now
        fall = now.value - new.value
        ratio = fall / predicted if predicted > 0 else float("nan")
        accepted = finite and fall > 0 and bool(torch.isfinite(new.gradient).all())
        found.trials.append(
            solution.to_dict() | {"damping": self.damping, "fall": fall, "predicted": predicted, "accepted": accepted}
        )
        _log.info("damping %.1e, %s, fall %.3e of %.3e", self.damping, solution.to_dict(), fall, predicted)
        if ratio > 0.75:
            self.damping /= 3
        elif not ratio > 0.25:
            self.damping = max(4 * self.damping, 1e-8)
        if accepted and ratio > 0.75:
            trial, new, reach = self._farther(w, trial, new)
            found.trials[-1]["reach"] = reach
        if accepted:
            objective.accept(new)
            self._factors = None
            found.w, found.last, found.solver = trial, new, solution.to_dict()
            found.history.append(new.stationarity)
        return accepted

    def _farther(self, w: Tensor, trial: Tensor, new: Evaluation) -> tuple[Tensor, Evaluation, float]:
        """Where the model predicts well the step is doubled as long as that falls farther: the losses of classification have
        exponential tails, along which Newton steps all have the same length.
        """
        reach = 1.0
        while reach < 64:
            ahead = w + 2 * (trial - w)
            there = self.objective.evaluate(ahead)
            if not (there.value < new.value and bool(torch.isfinite(there.gradient).all())):
                break
            trial, new, reach = ahead, there, 2 * reach
        return trial, new, reach
