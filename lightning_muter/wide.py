"""Unlearning any subset of the parameters, a whole network included, with the retained data at hand.

Nothing of the size p x p is stored: Newton steps on the retained objective F_R, from the weights at hand,

    (H_R + mu |R| I) d = -grad F_R(w),      H_R = sum_R D2 phi_i + |R| Lambda_d  by products (`curvature.matrix_free`)

with the maximisers moving along by their response. Levenberg and Marquardt decide: a step is accepted where the robust
objective, its inner problems solved anew, falls; mu grows where it does not and shrinks where the model predicts well.
"""

from __future__ import annotations

import logging
import time
import warnings as warning_module
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lightning_muter.curvature.inner import InnerSolver, Smoothing
from lightning_muter.curvature.matrix_free import WideCurvature, WideObjective
from lightning_muter.curvature.objective import Evaluation
from lightning_muter.curvature.response import Response, as_response
from lightning_muter.curvature.samples import SampleSource
from lightning_muter.curvature.sketch import rademacher
from lightning_muter.curvature.wide_problem import WideProblem
from lightning_muter.distributed import Shards, refuse_sharded_parameters
from lightning_muter.errors import ArgumentError, SolveError
from lightning_muter.identity import weight_fingerprint
from lightning_muter.losses import Loss, resolve_loss
from lightning_muter.preflight.decay import read_weight_decay
from lightning_muter.solvers import Product
from lightning_muter.taking import Decay, _optimizers, _threat
from lightning_muter.threat import ThreatModel
from lightning_muter.truncated import TruncatedCG
from lightning_muter.unlearning import UnlearnResult, checked_positions

_log = logging.getLogger(__name__)


def unlearn_wide(
    model: nn.Module,
    forget: Iterable[int],
    data: Dataset[Any],
    *,
    scope: str | Sequence[str] = "all",
    threat_model: ThreatModel | None = None,
    attack: Any = None,
    trades_beta: float | None = None,
    response: str | Response = "auto",
    curvature: WideCurvature = "ggn",
    loss: Loss | None = None,
    weight_decay: Decay = "auto",
    optimizers: Iterable[Any] | None = None,
    forgotten: Iterable[int] = (),
    steps: int = 5,
    damping: float = 1e-3,
    cg: TruncatedCG | None = None,
    tolerance: float = 1e-6,
    seconds: float | None = None,
    smoothing: Smoothing | None = None,
    inner: InnerSolver | None = None,
    sample_weight: Tensor | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    shards: Shards | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> UnlearnResult:
    """Remove samples from all parameters in ``scope``; on success the model holds the new weights, else the old ones.

    Args:
        forget: positions in ``data``, the full training dataset; ``forgotten``: positions removed before, left out too.
        scope: "all" trainable parameters, or patterns over their names (``["layer4.*", "head.*"]``).
        trades_beta: the model was trained by TRADES with this beta.
        curvature: "ggn" (positive semidefinite with the response, the default) or "hessian" (exact).
        weight_decay: as in :func:`lightning_muter.take_snapshot`; 0 is allowed, damping then carries the solve.
        steps: accepted steps at most.          damping: mu at the start, per sample.
        tolerance: on the stationarity |grad F_R| / sqrt(|R| sum |grad phi_i|^2) (the sum estimated once).
        seconds: no new step is begun after this time.
        shards: this process's share; None asks torch.distributed. Every process gets the same weights.

    Returns:
        ``solver`` holds the last accepted solve's status and ``steps``, one entry per trial; ``refine`` the
        stationarity after each accepted step.

    Raises:
        ArgumentError, RequestError: bad positions or options; UnsuitableError: FSDP, decoupled weight decay;
        SolveError: no trial lowered the objective. The model is as it was.
    """
    began = time.perf_counter()
    if not (isinstance(steps, int) and steps >= 1) or not damping >= 0:
        raise ArgumentError("steps, damping", (steps, damping), "steps >= 1 and damping >= 0")
    refuse_sharded_parameters(model)
    n_total = len(data)  # type: ignore[arg-type]
    before = [int(i) for i in forgotten]
    stand_in: Any = SimpleNamespace(n_total=n_total, forgotten=before, n_retained=n_total - len(set(before)))
    positions = checked_positions(forget, stand_in)
    gone = {*positions, *before}
    kept = [i for i in range(n_total) if i not in gone]
    shards = shards or Shards.current()
    threat = _threat(model, threat_model, attack)
    source = SampleSource(
        data,
        collate=collate,
        batch_size=batch_size,
        num_workers=num_workers,
        device=next(model.parameters()).device,
        weight=sample_weight,
        threat=threat,
    )
    problem = WideProblem(model, resolve_loss(loss, model), scope, source.examples(), trades_beta)
    w = problem.read()
    objective = WideObjective(
        problem,
        threat,
        source,
        wide_decay(problem, model, weight_decay, optimizers),
        as_response(response, threat),
        shards.share(kept),
        len(kept),
        curvature,
        inner or InnerSolver(max_iter=50),
        smoothing or Smoothing(),
        anchor=w if threat.norm == "linf" and threat.eps > 0 else None,
        reduce=shards.sum_,
    )
    deadline = None if seconds is None else began + seconds
    search = _Search(objective, cg or TruncatedCG(), damping, deadline, progress and shards.rank == 0)
    found = search.run(w, steps, tolerance)
    result = UnlearnResult(
        method="newton-cg",
        response=objective.response.name,
        scope=scope if isinstance(scope, str) else ", ".join(scope),
        forgotten=positions,
        n_retained=len(kept),
        step_norm=float((found.w - w).norm()),
        solver=found.solver | {"steps": found.trials, "counts": {k: v for k, v in objective.counts.items() if v}},
        stationarity_before=found.first.stationarity,
        stationarity_after=found.last.stationarity,
        fingerprint_before=weight_fingerprint(model.state_dict()),
        refine=found.history,
        dry_run=dry_run,
    )
    result.warnings += _notes(problem, model, found)
    _commit(problem, found.w, result, dry_run)
    for note in result.warnings:
        warning_module.warn(note, stacklevel=2)
    result.seconds = time.perf_counter() - began
    return result


@dataclass
class _Found:
    w: Tensor
    first: Evaluation
    last: Evaluation
    solver: dict[str, Any]
    trials: list[dict[str, Any]] = field(default_factory=list)
    history: list[float] = field(default_factory=list)


@dataclass
class _Search:
    """Levenberg-Marquardt around truncated CG."""

    objective: WideObjective
    cg: TruncatedCG
    damping: float
    deadline: float | None
    progress: bool

    def run(self, w: Tensor, steps: int, tolerance: float) -> _Found:
        objective = self.objective
        with tqdm(total=steps, desc="unlearn", unit="step", disable=not self.progress, leave=False) as line:
            now = objective.evaluate(w)
            objective.accept(now)
            found = _Found(w, now, now, {"status": "converged", "residual": 0.0, "iterations": 0})
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
                f"No step lowered the robust objective on the retained data (trials, damping and status: {tried}). "
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

    def _trial(self, found: _Found, line: Any) -> bool:
        objective, now, w = self.objective, found.last, found.w
        shift = self.damping * objective.count

        def product(v: Tensor) -> Tensor:
            return objective.product(w, v, shift)

        def on_step(step: int, residual: float) -> None:
            line.set_postfix_str(f"cg {step}, residual {residual:.1e}, stationarity {now.stationarity:.1e}")

        solution, predicted = self.cg.solve(product, -now.gradient, self._preconditioner(w, shift), on_step)
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
        if accepted:
            objective.accept(new)
            found.w, found.last, found.solver = trial, new, solution.to_dict()
            found.history.append(new.stationarity)
        return accepted

    def _preconditioner(self, w: Tensor, shift: float, probes: int = 2) -> Product:
        """The mean curvature of each parameter tensor, by a few products with signs (Hutchinson)."""
        objective, sizes = self.objective, self.objective.problem.sizes
        total = torch.zeros(len(sizes), dtype=w.dtype, device=w.device)
        for probe in range(probes):
            signs = rademacher(probe + 1, torch.zeros(1, dtype=torch.int64), len(w))[0].to(w)
            image = objective.product(w, signs, shift)
            total += torch.stack([p.mean() for p in (signs * image).split(sizes)])
        floor = total.abs().max() * 1e-3
        scale = torch.repeat_interleave(
            (total / probes).clamp(min=float(floor)), torch.tensor(sizes, device=w.device)
        ).reciprocal()
        return lambda v: scale * v


def wide_decay(problem: WideProblem, model: nn.Module, weight_decay: Decay, optimizers: Iterable[Any] | None) -> Tensor:
    """lambda per entry of w, (p,)."""
    if isinstance(weight_decay, Mapping):
        values = {name: float(weight_decay.get(name, 0.0)) for name in problem.names}
    elif weight_decay == "auto":
        values = read_weight_decay(_optimizers(model, optimizers), model.named_parameters())
    elif isinstance(weight_decay, (int, float)) and not isinstance(weight_decay, bool):
        values = dict.fromkeys(problem.names, float(weight_decay))
    else:
        raise ArgumentError("weight_decay", weight_decay, "'auto', a number, or a dict of parameter names to numbers")
    found = torch.tensor([values.get(n, 0.0) for n in problem.names], dtype=problem.dtype, device=problem.device)
    if not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        raise ArgumentError("weight_decay", weight_decay, "finite numbers, 0 or larger")
    return torch.repeat_interleave(found, torch.tensor(problem.sizes, device=problem.device))


def _notes(problem: WideProblem, model: nn.Module, found: _Found) -> list[str]:
    inside = set(problem.names)
    left = [n for n, p in model.named_parameters() if p.requires_grad and n not in inside]
    notes = []
    if left:
        notes.append(
            f"The scope leaves {len(left)} trainable parameters as they are ({', '.join(left[:3])}"
            f"{', ...' if len(left) > 3 else ''}): they keep what they learnt from forgotten samples. "
            "scope='all' covers them."
        )
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in model.modules()):
        notes.append(
            "Running statistics of batch normalisation are constants here: they keep an average over the forgotten "
            "samples. Recompute them on retained data, or use normalisation without running statistics."
        )
    if found.solver["status"] != "converged":
        notes.append(
            f"The last system ended with status {found.solver['status']!r} (relative residual "
            f"{found.solver['residual']:.1e}); its step lowered the retained objective and was accepted."
        )
    return notes


def _commit(problem: WideProblem, new: Tensor, result: UnlearnResult, dry_run: bool) -> None:
    named = dict(problem.module.named_parameters())
    before = {n: named[n].detach().clone() for n in problem.names}
    done = False
    try:
        problem.write(new)
        result.fingerprint_after = weight_fingerprint(problem.module.state_dict())
        done = not dry_run
    finally:
        if not done:
            with torch.no_grad():
                for name, value in before.items():
                    named[name].copy_(value)
