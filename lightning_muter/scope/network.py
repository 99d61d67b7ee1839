"""Any subset of the parameters, a whole network included, with the retained data at hand.

Nothing of the size p x p is stored: Newton steps on the retained objective F_R, from the weights at hand,

    (H_R + mu |R| I) d = -grad F_R(w),      H_R = sum_R D2 phi_i + |R| Lambda_d  by products (`curvature.hessian.products`)

with the maximisers moving along by their response. Levenberg and Marquardt decide (`minimise.levenberg_marquardt`): a step is
accepted where the robust objective, its inner problems solved anew, falls; mu grows where it does not and shrinks where the model
predicts well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_muter.called_with import called_with
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.network import WideObjective
from lightning_muter.curvature.problem.network import WideProblem, parameters_in
from lightning_muter.errors import ArgumentError
from lightning_muter.forgotten.modules import recalled, remember
from lightning_muter.forgotten.rows import Forgotten, barred_of, known_keys, remember_key
from lightning_muter.minimise.levenberg_marquardt import Found, LevenbergMarquardt
from lightning_muter.model.modes import full_precision
from lightning_muter.model.reading import Reading
from lightning_muter.scope.asked import DAMPING, Take, Training, UnlearnWide
from lightning_muter.scope.base import Extent, Proposal, Removal, Retained, Scope
from lightning_muter.scope.network_taking import taken
from lightning_muter.snapshot.ranks import ranks_agree
from lightning_muter.snapshot.remarks import left_outside, warn
from lightning_muter.snapshot.retaken import positions_to_leave_out
from lightning_muter.snapshot.snapshot import WIDE_BATCH, WideSnapshot
from lightning_muter.solvers.base import Solver
from lightning_muter.solvers.cg import CG, TruncatedCG
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint
from lightning_muter.unlearning.commit import commit
from lightning_muter.unlearning.positions import checked_positions
from lightning_muter.unlearning.result import UnlearnResult

if TYPE_CHECKING:
    from lightning_muter.unlearning.unlearn import Unlearn

#: A relative difference of stationarities that is rounding.
_SAME = 0.05


@dataclass(frozen=True)
class NetworkScope(Scope[WideSnapshot]):
    """Parameters by name: "all" that are trainable, or patterns."""

    patterns: str | Sequence[str] = "all"

    record = WideSnapshot
    useless = ("budget", "fit", "examples", "tolerance", "like", "resume")
    refusal = ("None beyond the head", "It is of stored sums.")
    polishing = (0, "steps")

    @classmethod
    def of(cls, snapshot: WideSnapshot) -> NetworkScope:
        return cls(snapshot.patterns)

    def extent(self, module: nn.Module, reading: Reading | None, cap: int) -> Extent:
        return Extent(parameters_in(module, self.patterns), damped=True)

    def take(self, asked: Take) -> WideSnapshot:
        self.check_useful(asked)
        asked = replace(asked, scope=self.patterns, batch_size=min(asked.batch_size, WIDE_BATCH))
        return taken(asked, self.passes(asked.polish))

    def refresh(self, left: Retained[WideSnapshot], polish: str | int, progress: bool) -> WideSnapshot:
        """The same objective, measured anew; nothing is polished."""
        left.snapshot.check_parameters(left.model)
        now = self._now(left)
        return replace(
            left.snapshot,
            forgotten=list(left.snapshot.forgotten),
            fingerprint=weight_fingerprint(left.model.state_dict()),
            stationarity=now.stationarity,
            figures={"objective": now.value, "converged": now.converged},
        )

    def difference(self, left: Retained[WideSnapshot]) -> tuple[float, float]:
        """Of how stationary the weights are."""
        found, stored = self._now(left).stationarity, left.snapshot.stationarity
        return abs(found - stored) / max(found, stored, 1e-12), _SAME

    def _now(self, left: Retained[WideSnapshot]) -> Evaluation:
        training = Training.of(left.snapshot, left.access)
        objective = training.objective(left.model, left.data, left.kept, left.reading)
        return objective.evaluate(objective.problem.read())

    def check(self, asked: Unlearn) -> None:
        """Systems are known by their products alone: "auto", "cg", a `CG` or a `TruncatedCG` solves them."""
        if asked.within is not None:
            raise ArgumentError(
                "within", asked.within, "None beyond the head", "Only linear models have a certificate."
            )
        if asked.method is not None:
            advice = "Methods solve with stored sums; take a snapshot of scope='head'."
            raise ArgumentError("method", asked.method, "None beyond the head", advice)
        _as_cg(asked.solver)

    def propose(self, removal: Removal[WideSnapshot]) -> Proposal:
        """One accepted Newton-CG step and ``refine`` more."""
        snapshot, asked = removal.snapshot, removal.access
        snapshot.check_parameters(removal.model)
        read = removal.data if asked.retain is None else asked.retain
        training = Training.of(snapshot, asked)
        objective = training.objective(removal.model, read, removal.kept, removal.reading, asked.shards)
        descent = _descent(objective, _as_cg(asked.solver), asked.progress)
        result, new = _carry_out(descent, snapshot.scope, removal.positions, len(removal.kept), 1 + asked.refine)
        result.dry_run = asked.dry_run
        assert result.stationarity_after is not None
        after = replace(snapshot.without(removal.positions), stationarity=result.stationarity_after)
        return Proposal(result, after, *_writes(objective.problem, new), said=result.warnings)


@ranks_agree
@torch.inference_mode(False)
@full_precision()
@called_with(UnlearnWide)
def unlearn_wide(asked: UnlearnWide) -> UnlearnResult:
    """Remove samples from all parameters in ``scope``; on success the model holds the new weights, else the old ones.

    Args:
        model: any module that gives logits.
        forget: positions in ``data``.
        data: the full training dataset; rows that are forgotten are not read.
        scope: "all" trainable parameters, or patterns over their names (``["layer4.*", "head.*"]``).
        threat_model: norm, eps, box; read off ``attack`` or the module's adversarial training when not given.
        attack: what the model was trained against, where no ``threat_model`` is given.
        trades_beta: the model was trained by TRADES with this beta.
        response: "auto", "none", "unconstrained", "l2", "linf" or a Response.
        curvature: "ggn" (positive semidefinite with the response, the default) or "hessian" (exact).
        loss: of the training, where it is not read off the module.
        weight_decay: as in :func:`lightning_muter.take_snapshot`; 0 is allowed, damping then carries the solve.
        optimizers: those of the training, for ``weight_decay="auto"``.
        forgotten: positions removed before, left out too.
        steps: accepted steps at most.
        damping: mu at the start, per sample.
        cg: the solver of one step, by products with H_R.
        tolerance: on the stationarity |grad F_R| / sqrt(|R| sum |grad phi_i|^2) (the sum estimated once).
        seconds: no new step is begun after this time.
        smoothing: of L-infinity switches.
        inner: how inner maxima are climbed.
        sample_weight: c_i (n,) of the objective; None: 1 each.
        collate: the training loader's ``collate_fn``, where it had one of its own.
        batch_size: samples at a time.
        num_workers: of the loader that reads the dataset.
        inputs: key or position in a batch, where it cannot be told which tensor is the input.
        label: the same for the label.
        shards: this process's share; None asks torch.distributed. Every process gets the same weights.
        dry_run: compute everything, change nothing.
        progress: show a bar on a terminal.

    Returns:
        What was done: ``solver`` holds the last accepted solve's status and ``steps``, one entry per trial; ``refine`` the
        stationarity after each accepted step.

    Raises:
        ArgumentError: an option out of range, or positions that are none of the dataset.
        RequestError: positions that were forgotten before, or nothing would be left.
        UnsuitableError: FSDP, decoupled weight decay.
        SolveError: no trial lowered the objective. After any error the model is as it was.

    >>> from torch.utils.data import TensorDataset
    >>> from lightning_muter import ThreatModel
    >>> x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = TensorDataset(x, (x[:, 0] > 0.5).long())
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    >>> result = unlearn_wide(
    ...     model, [3, 17], rows, threat_model=ThreatModel("l2", 0.05), weight_decay=1e-2, steps=10, progress=False)
    >>> result.n_retained, result.stationarity_after < result.stationarity_before
    (28, True)
    """
    began = time.perf_counter()
    if not (isinstance(asked.steps, int) and asked.steps >= 1) or not asked.damping >= 0:
        raise ArgumentError("steps, damping", (asked.steps, asked.damping), "steps >= 1 and damping >= 0")
    model, data = asked.model, asked.data
    record = recalled(model)
    before = sorted({*(int(i) for i in asked.forgotten), *positions_to_leave_out(record, data, asked.collate)})
    n_total = len(data)  # type: ignore[arg-type]
    stand_in: Any = SimpleNamespace(n_total=n_total, forgotten=before, absent=[], n_retained=n_total - len(set(before)))
    positions = checked_positions(asked.forget, stand_in)
    gone = {*positions, *before}
    kept = [i for i in range(n_total) if i not in gone]
    objective = asked.objective(model, data, kept, asked.read(model, data, kept, whole=True), asked.shards)
    descent = _descent(objective, asked.cg or TruncatedCG(), asked.progress, asked.damping)
    descent.deadline = None if asked.seconds is None else began + asked.seconds
    result, new = _carry_out(descent, asked.scope, positions, len(kept), asked.steps, asked.tolerance)
    result.dry_run = asked.dry_run
    warn(result.warnings)
    commit(model, *_writes(objective.problem, new), lambda fingerprint: None, result)
    if not asked.dry_run:
        key = known_keys().get(record.key_id) or DigestKey.generate()
        remember_key(key)
        barred = barred_of(key, data, positions, kept, asked.collate)
        remember(model, Forgotten(n_total, tuple(sorted(gone)), key.key_id, record.barred | barred))
    result.seconds = time.perf_counter() - began
    return result


def _descent(objective: WideObjective, cg: TruncatedCG, progress: bool, damping: float = DAMPING) -> LevenbergMarquardt:
    return LevenbergMarquardt(objective, cg, damping, title="unlearn" if progress and objective.leads else None)


def _carry_out(
    descent: LevenbergMarquardt,
    scope: str | Sequence[str],
    positions: list[int],
    n_retained: int,
    steps: int,
    tolerance: float = 1e-6,
) -> tuple[UnlearnResult, Tensor]:
    """What a descent finds on the retained objective, and the weights it proposes; nothing is changed yet."""
    objective, problem = descent.objective, descent.objective.problem
    w = problem.read()
    found = descent.run(w, steps, tolerance)
    result = UnlearnResult(
        method="newton-cg",
        response=objective.response.name,
        scope=scope if isinstance(scope, str) else ", ".join(scope),
        forgotten=positions,
        n_retained=n_retained,
        step_norm=float((found.w - w).norm()),
        solver=found.solver | {"steps": found.trials, "counts": {k: v for k, v in objective.counts.items() if v}},
        stationarity_before=found.first.stationarity,
        stationarity_after=found.last.stationarity,
        fingerprint_before=weight_fingerprint(problem.module.state_dict()),
        refine=found.history,
    )
    result.quality = {
        "objective_before": found.first.value,
        "objective_after": found.last.value,
        "maximisers_converged": found.last.converged,
    }
    result.warnings += _remarks(problem, found)
    return result, found.w


def _as_cg(solver: str | Solver | TruncatedCG) -> TruncatedCG:
    if isinstance(solver, TruncatedCG):
        return solver
    if isinstance(solver, CG):
        return TruncatedCG(max_iter=solver.max_iter, tolerance=solver.tolerance)
    if solver in ("auto", "cg"):
        return TruncatedCG()
    raise ArgumentError(
        "solver", solver, "'auto', 'cg', CG or TruncatedCG beyond the head", "The others need the matrix itself."
    )


def _remarks(problem: WideProblem, found: Found) -> list[str]:
    notes = left_outside(problem.module, problem.parameters())
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in problem.module.modules()):
        notes.append(
            "Running statistics of batch normalisation are constants here: they keep an average over the forgotten "
            "samples. Recompute them on retained data, or use normalisation without running statistics."
        )
    if found.solver["status"] not in ("converged", "flat"):
        notes.append(
            f"The last system ended with status {found.solver['status']!r} (relative residual "
            f"{found.solver['residual']:.1e}); its step lowered the retained objective and was accepted."
        )
    return notes


def _writes(problem: WideProblem, new: Tensor) -> tuple[list[nn.Parameter], Callable[[], None]]:
    """The parameters of a problem, and what writes new values into them."""
    return problem.parameters(), lambda: problem.write(new)
