"""Never worse: what a step costs and is owed to, and the refusal of one that raises the retained objective."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.head import RobustObjective
from lightning_muter.errors import ArgumentError, SolveError
from lightning_muter.minimise.best import constant_head, move_to, rounding_of
from lightning_muter.scope.head_methods import Request, Step
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.unlearning.result import UnlearnResult

#: Gradients below this share of the step's are compared as they are, without another solve.
_SMALL = 1e-2
#: A step that is owed to the snapshot by more than this is not mainly the removal.
_MAINLY = 0.5
_OWED = "owed_step"
#: Relative error of a Newton step over the decrement per sample, the middle of what requests of softmax had.
_PER_DECREMENT = 0.75
#: A prediction of the error above which more steps are advised; what they are to bring it to; and how many are counted at most.
_MUCH, _LITTLE, _STEPS = 0.1, 0.02, 5


def check_accept(accept: str | None) -> None:
    """Raises ArgumentError: neither None nor "worse"."""
    if accept not in (None, "worse"):
        raise ArgumentError(
            "accept", accept, "None or 'worse'", "None refuses a step that raises the robust objective."
        )


def quality_of(request: Request, step: Step) -> dict[str, Any]:
    """What is known of a step before any retained row is read.

    Returns:
        predicted_fall: of the retained objective by its quadratic model, from the snapshot's weights.
        predicted_error: of one step, relative to the distance of doing nothing from retraining (:func:`predicted_error`).
        refine_steps: that bring it below 0.02 by the same token; 5: as many or more.
        owed_step: |H_R^-1 grad F(w)|, w the snapshot's weights: what of the step would be there without a removal, for they are not
            stationary;  owed_share: over |w_u - w|.
        maximisers_converged: share of the inner maxima that the snapshot's statistics are of.
        snapshot_stationarity.
    """
    snapshot, device = request.snapshot, step.theta.device
    base = snapshot.theta_base.to(device)
    moved = (base - step.theta).flatten()
    decay = snapshot.decay.to(device)
    needed = (step.gradient + request.n_retained * decay * base).flatten()
    owed = snapshot.figures.get(_OWED)
    if owed is None or not torch.equal(snapshot.theta_base, snapshot.theta_ref):
        left = (snapshot.gradient.to(device) + snapshot.n_retained * decay * base).flatten()
        ratio = float(left.norm()) / max(float(needed.norm()), 1e-300)
        owed = ratio * float(moved.norm())
        if ratio > _SMALL:
            owed = float(request.solver.solve(step.matrix, left).value.norm())
    counts = snapshot.figures.get("counts", {})
    solved = counts.get("samples", 0)
    fall = float(needed @ moved) / 2
    error = predicted_error(fall, request.n_retained)
    return {
        "predicted_fall": fall,
        "predicted_error": error,
        "refine_steps": refine_steps(error),
        _OWED: owed,
        "owed_share": owed / max(float(moved.norm()), 1e-300),
        "maximisers_converged": counts.get("maximisers converged", 0) / solved if solved else None,
        "snapshot_stationarity": snapshot.stationarity,
    }


def predicted_error(fall: float, n_retained: float) -> float:
    """Relative error of one Newton step s: three quarters of the decrement per sample, sqrt(s' H s / n) = sqrt(2 fall / n).

    A quadratic model errs by the third derivative along s, which for the logistic family is bounded by the second times the size of
    the logits' change (self-concordance: Bach, Electronic J. Statist. 4, 2010). What requests of softmax ended at beside
    it is measured by ``python -m tests.benchmarks DIR -k test_k_``; where maximisers switch corners (L-infinity) errors are larger.
    """
    return _PER_DECREMENT * math.sqrt(2 * max(fall, 0.0) / max(n_retained, 1.0))


def refine_steps(error: float) -> int:
    """Newton steps, of which each squares the error and doubles it, until 0.02.

    >>> [refine_steps(error) for error in (0.01, 0.05, 0.15, 0.3, 0.6)]
    [0, 1, 2, 3, 5]
    """
    steps = 0
    while error > _LITTLE and steps < _STEPS:
        error, steps = 2 * error * error, steps + 1
    return steps


def remember_owed(after: Snapshot, quality: dict[str, Any]) -> None:
    """Later requests start from the same weights, and owe them the same."""
    after.figures = after.figures | {_OWED: quality[_OWED]}


def warnings_of(quality: dict[str, Any]) -> list[str]:
    """What of it should be said."""
    notes = []
    if quality["owed_share"] > _MAINLY:
        notes.append(
            f"{min(quality['owed_share'], 9.99):.0%} of the step's length is owed to the snapshot, whose weights are not stationary "
            f"({quality['snapshot_stationarity']:.1e}), and not to the removal. Polish the snapshot, or refine with retained data."
        )
    if quality["predicted_error"] > _MUCH:
        steps = quality["refine_steps"]
        notes.append(
            f"One step is predicted to end {min(quality['predicted_error'], 9.99):.0%} of the way short of retraining (or beside it; "
            f"within a factor of three): these rows change the model much. Pass retain=train_dataset with refine={steps}"
            f"{' or more' if steps == _STEPS else ''}."
        )
    share = quality["maximisers_converged"]
    if share is not None and share < 0.9:
        notes.append(
            f"The inner maximiser converged for {share:.0%} of the samples behind the snapshot: its statistics are less exact."
        )
    return notes


def require_trust(snapshot: Snapshot, quality: dict[str, Any], accept: str | None) -> None:
    """Where no retained row is read: a step that is mainly what polish could not do is not taken.

    Raises:
        SolveError: polish found no step that lowers the objective, and most of this one is the same step.
    """
    polish = snapshot.figures.get("polish", {})
    failed = polish.get("constant") or (polish.get("status") == "stalled" and snapshot.stationarity > 1e-2)
    if accept == "worse" or not failed or quality["owed_share"] <= _MAINLY:
        return
    why = "no head is better than a constant one" if polish.get("constant") else "no step was found that lowers it"
    raise SolveError(
        f"The snapshot is not stationary ({snapshot.stationarity:.1e}) and cannot be made so: {why}. "
        f"{min(quality['owed_share'], 9.99):.0%} of this step's length is owed to that, not to the removal; it would likely "
        "raise the objective. Nothing was changed. Pass retain=train_dataset with refine=2 or more, or accept='worse'."
    )


def start_of(
    objective: RobustObjective, now: Tensor, at_now: Evaluation, theta: Tensor, at_theta: Evaluation
) -> tuple[Tensor, Evaluation]:
    """Where refinement starts: at the better of the weights at hand and the step."""
    if at_theta.value > at_now.value + rounding_of(objective, at_now.value):
        objective.accept(at_now)
        return now, at_now
    return theta, at_theta


def shortened(
    objective: RobustObjective,
    now: Tensor,
    at_now: Evaluation,
    theta: Tensor,
    at_theta: Evaluation,
    result: UnlearnResult,
) -> tuple[Tensor, Evaluation]:
    """The step of a linear model, or as much of it as does not raise the retained objective, said in the result's warnings.

    A step that crosses switches (w_j = 0 in L-infinity) does not see them in the curvature where it began.
    """
    most = at_now.value + rounding_of(objective, at_now.value)
    if at_theta.value <= most or not objective.problem.backbone.affine:
        return theta, at_theta
    for share in (0.5, 0.25, 0.125, 0.0625):
        nearer = now + share * (theta - now)
        reached = objective.evaluate(nearer)
        if reached.value <= most:
            objective.accept(reached)
            result.warnings.append(
                f"{share:.0%} of the step was taken: the whole of it raises the robust objective of the retained rows (it "
                "crosses switches of the maximisers). Pass refine=2 or more."
            )
            return nearer, reached
    return theta, at_theta


def or_constant(
    objective: RobustObjective, snapshot: Snapshot, theta: Tensor, at: Evaluation
) -> tuple[Tensor, Evaluation]:
    """The best constant head instead, where the snapshot's was no better than one, and this is not."""
    if not snapshot.figures.get("polish", {}).get("constant"):
        return theta, at
    fixed, value = constant_head(objective)
    if value >= at.value:
        return theta, at
    move_to(objective, fixed)
    return fixed, objective.evaluate(fixed)


def require_no_worse(
    objective: RobustObjective, now: Tensor, before: float, after: float, accept: str | None, quality: dict[str, Any]
) -> None:
    """Raise where the retained objective rose, and note both values.

    Raises:
        SolveError: it rose by more than rounding, and that was not accepted.
    """
    if after > before + rounding_of(objective, before) and not objective.problem.backbone.affine:
        before = max(before, objective.evaluate(now, explore=True).value)  # a larger maximum may have been overlooked
    quality["objective_before"], quality["objective_after"] = before, after
    if accept != "worse" and not after <= before + rounding_of(objective, before):
        raise SolveError(
            f"The step raises the robust objective of the retained rows from {before:.6g} to {after:.6g}. Nothing was changed. "
            "Pass refine=2 or more, which starts at the better of both and only goes down, take a new snapshot, or pass "
            "accept='worse'."
        )
