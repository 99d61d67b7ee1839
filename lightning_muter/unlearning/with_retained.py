"""What the retained rows allow: refinement, stationarity before and after, the certificate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_muter.certificate.certificate import certify as certified
from lightning_muter.certificate.certificate import why_no_certificate
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.errors import UnsuitableError
from lightning_muter.minimise.descent import Descent
from lightning_muter.minimise.refine import polished, refined
from lightning_muter.minimise.train_on import refined_by_cuts
from lightning_muter.scope.base import Removal
from lightning_muter.scope.head_methods import Request, Step
from lightning_muter.snapshot.progress import bar
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.unlearning.certified import certified_from_nearby
from lightning_muter.unlearning.quality import or_constant, require_no_worse, shortened, start_of
from lightning_muter.unlearning.result import UnlearnResult
from lightning_muter.unlearning.within import refine_within


def with_retained(
    request: Request,
    step: Step,
    removal: Removal[Snapshot],
    now: Tensor,
    after: Snapshot,
    result: UnlearnResult,
) -> Tensor:
    """Stationarity before and after, refine steps, and the certificate; updates ``after`` and ``result``."""
    snapshot, theta, kept, asked = request.snapshot, step.theta, removal.kept, removal.access
    refine, within, accept = asked.refine, asked.within, asked.accept
    starts = snapshot.base_starts if snapshot.base_starts is not None else snapshot.starts
    objective = request.objective(kept, starts, request.retained)
    settle = not snapshot.inner.as_found
    with bar(objective, "refine" if refine else "certify", asked.progress) as on_step:
        at_now = objective.evaluate(now) if settle else objective.as_tracked(now)
        objective.accept(at_now)
        result.stationarity_before = at_now.stationarity
        why = why_no_certificate(request.problem, objective.decay, snapshot.threat_model)
        if within is not None and why is not None:
            raise UnsuitableError(f"within: {why}. Leave it out, or retrain.")
        evaluation = objective.evaluate(theta, explore=bool(refine)) if settle else objective.as_tracked(theta)

        def further(theta: Tensor, first: Evaluation, steps: int) -> Descent:
            if not settle:
                return refined_by_cuts(objective, theta, steps, on_step.gap)
            response, curvature = snapshot.response, snapshot.curvature
            told: dict[str, Any] = {"before": at_now, "first": first, "steps": steps, "on_step": on_step}
            return refined(objective, theta, step.matrix, response, curvature, **told)

        if refine or within is not None:
            theta, evaluation = start_of(objective, now, at_now, theta, evaluation)
            if within is None:
                found = further(theta, evaluation, refine)
            else:
                start = Descent(theta, evaluation, "capped", 0, [evaluation.stationarity])
                more = partial(polished, objective, snapshot.response, snapshot.curvature)
                found, result.bound = refine_within(further, more, partial(certified, objective), start, refine, within)
            theta, evaluation = or_constant(objective, snapshot, found.theta, found.evaluation)
            result.refine = found.history[1:]
        elif accept != "worse":
            theta, evaluation = shortened(objective, now, at_now, theta, evaluation, result)
        if theta is not step.theta:
            theta, result.bound = _rounded(request.problem, theta, result.bound)
            # from now on gradients count from here; curvature stays at theta_ref
            base_starts = objective.stored_starts()
            sums, delta = objective.sums(theta, settle=settle)
            evaluation = objective.evaluation(theta, sums, delta)
            after.theta_base, after.gradient = theta.cpu(), sums.gradient.cpu()
            if base_starts is not None:
                full = torch.zeros(snapshot.n_total, *base_starts.shape[1:], dtype=base_starts.dtype)
                full[torch.tensor(kept)] = base_starts
                after.base_starts = full
        before = at_now.value
        if refine and not settle:  # measured by what was found since
            before = max(before, objective.as_tracked(now).value)
        require_no_worse(objective, now, before, evaluation.value, accept, result.quality)
        result.quality["maximisers_converged"] = evaluation.converged
        result.stationarity_after = evaluation.stationarity
        after.stationarity = evaluation.stationarity
        if why is None and result.bound is None and asked.seconds is not None:
            how = (snapshot.response, snapshot.curvature, step.matrix)
            result.bound = certified_from_nearby(objective, theta, evaluation, *how, asked.seconds)
        if result.bound is None:
            result.warnings.append(why or "no certificate: certify=False did not ask for one")
    return theta


def _rounded(problem: HeadProblem, theta: Tensor, bound: float | None) -> tuple[Tensor, float | None]:
    """theta as the model will hold it, and its certified distance."""
    kept = problem.rounded(theta)
    return kept, None if bound is None else bound + float((kept - theta).norm())
