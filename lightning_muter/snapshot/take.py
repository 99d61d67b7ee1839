"""How a snapshot is taken: of any trained model, at the end of a fit (the callback calls this), or anew (`refresh`)."""

from __future__ import annotations

import time
import warnings as warning_module
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from lightning_muter.adversarial.from_torchattacks import attack_note
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.hessian.sums import Sums
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.sharded import ShardedObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.response.choose import Response, as_response
from lightning_muter.errors import ArgumentError, MismatchError, UnsuitableError
from lightning_muter.forgotten.digests import check_digests, sample_digests
from lightning_muter.minimise.best import Best, best_head
from lightning_muter.minimise.budget import FORWARD, Budget, Fit
from lightning_muter.minimise.corners import least_subgradient
from lightning_muter.minimise.train_on import TrainedOn, affordable, cost_of_sums, train_on
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.losses import Loss
from lightning_muter.model.modes import full_precision
from lightning_muter.model.read_step import read_objective
from lightning_muter.model.reading import Reading
from lightning_muter.model.weight_decay import WholeDecay
from lightning_muter.snapshot.polished import polish_figures
from lightning_muter.snapshot.ranks import ranks_agree
from lightning_muter.snapshot.reread import read_stored
from lightning_muter.snapshot.resume import Resumable
from lightning_muter.snapshot.retaken import leaves_out_forgotten, spread
from lightning_muter.snapshot.snapshot import WIDE_BATCH, Snapshot, WideSnapshot
from lightning_muter.snapshot.trained import Decay, head_decay, trained_threat
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint
from lightning_muter.watching import watched

#: What knows adversarial examples of the training (`adversarial.examples`).
Examples = Callable[[Tensor], tuple[Tensor, Tensor]]
#: Share of the samples whose adversarial examples may be unknown (they start from 0), for these to be used at all.
_UNKNOWN = 0.1
#: Stationarity that polish aims at, by the dtype of the backbone.
AIM = {torch.float64: 1e-6, torch.float32: 1e-4}


@ranks_agree
@leaves_out_forgotten
@torch.inference_mode(False)
@full_precision()
def take_snapshot(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    threat_model: ThreatModel | None = None,
    attack: Any = None,
    scope: str = "head",
    response: str | Response = "auto",
    curvature: Curvature = "hessian",
    loss: Loss | None = None,
    weight_decay: Decay = "auto",
    optimizers: Iterable[Any] | None = None,
    polish: str | int = "auto",
    budget: float | str | None = None,
    fit: Fit | None = None,
    examples: Examples | None = None,
    tolerance: float | None = None,
    smoothing: Smoothing | None = None,
    inner: InnerSolver | None = None,
    sample_weight: Tensor | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 1024,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    key: DigestKey | None = None,
    like: Snapshot | None = None,
    resume: Resumable | None = None,
    inputs: Any = None,
    label: Any = None,
    normalization: Any = None,
    reading: Reading | None = None,
    progress: bool = True,
) -> Snapshot:
    """Statistics of a trained model's head, from which samples of ``dataset`` can be unlearned later.

    Args:
        model: any module whose last ``nn.Linear`` gives the logits; its head is polished in place unless ``polish=0``.
        dataset: the full training dataset (map-style); positions to forget are counted in it.
        threat_model: norm, eps, box; read off ``attack`` or the module's adversarial training when not given.
            ``ThreatModel("l2", 0.0)`` for standard training.
        response: "auto", "none", "unconstrained", "l2", "linf" or a Response.
        loss: None reads it off the module's own ``training_step``; a plain module has its ``criterion``, else cross-entropy, or
            what is given: ``callable(logits, y, reduction="none")``. A given one must be the step's, where there is a step.
        inputs, label: key or position in a batch, where it cannot be told which tensor is the input (or the label).
        normalization: (mean, std) where the dataset gives normalised inputs; threat model and box are then in the scale of the
            data (``ThreatModel("linf", 8 / 255)``).
        reading: what :func:`lightning_muter.model.read_step.read_objective` gave, if it was read before.
        weight_decay: lambda (one number, or by parameter name); "auto" reads it off ``optimizers`` or
            ``configure_optimizers()``. An L2 penalty that the training step adds by itself is added to it.
        polish: "auto" minimises until stationary (1e-6 in float64; networks in float32: until the objective is within a
            thousandth of the least), a number limits the passes over the data, 0 leaves the weights as they are.
        budget: of polish and snapshot together, in gradients per sample: "auto" is the larger of a tenth of the fit and three
            of its epochs, a number a share of the fit, None no limit. What stopped polish is in ``figures["polish"]``.
        fit: what the fit cost (:class:`lightning_muter.minimise.budget.Fit`); by default epochs of PGD-10 are counted.
        examples: inputs (n, ...) -> perturbations (n, D) and which are known (n,): adversarial examples of the training, from
            which the polish of a network starts.
        smoothing: of L-infinity switches, by default :meth:`Smoothing.of` the model; given with an anchor it is taken as it is
            (to compare models on one objective).
        sample_weight: w_i (n,) of an objective sum_i w_i phi_i.
        key: of the samples' digests; a new one when not given.
        like: another snapshot of the same weights and data: its maximisers' starting points and smoothing are used.

        resume: keep partial sums in a file, and go on from it after an interruption (polishing is done again).

    Returns:
        The snapshot; ``snapshot.fingerprint`` is the polished model's.

    Raises:
        UnsuitableError: model, data, loss or weight decay cannot be handled; MismatchError: ``like`` is of other weights.
    """
    began = time.perf_counter()
    if scope != "head":
        raise ArgumentError(
            "scope", scope, "'head' for stored sums", "Other scopes: lightning_muter.take_wide_snapshot."
        )
    if polish != "auto" and not (isinstance(polish, int) and polish >= 0):
        raise ArgumentError("polish", polish, "'auto', 0 or a number of passes")
    if device is not None:
        model.to(device)
    threat = trained_threat(model, threat_model, attack)
    parameter = next(model.parameters())
    if reading is None:
        reading = read_objective(
            model, dataset, loss=loss, collate=collate, inputs=inputs, label=label, normalization=normalization
        )
    loss = reading.loss
    source = SampleSource(
        dataset,
        collate=collate,
        batch_size=batch_size,
        num_workers=num_workers,
        device=parameter.device,
        weight=sample_weight,
        threat=threat,
        reading=reading,
    ).settle()
    problem = HeadProblem(model, loss, source.examples(), reading)
    decay = head_decay(problem, model, weight_decay, optimizers, reading.penalty)
    chosen = as_response(response, threat).resolved(problem.backbone, source.n)
    inner = inner or (like.inner if like is not None else InnerSolver())
    objective = ShardedObjective(problem, threat, source, decay, inner, smoothing or Smoothing.of(problem))
    theta = problem.read_theta()
    anchored = smoothing is not None and smoothing.anchor is not None
    if like is not None:
        like.check_model(model)
        anchored = True
        objective.set_smoothing(like.smoothing)
        if like.starts is not None:
            objective.restore(like.starts)
    elif not anchored:
        objective.anchor(theta)
    aim = tolerance if tolerance is not None else AIM.get(parameter.dtype, 1e-3)
    metric = chosen if chosen.norm is not None else as_response("auto", threat).resolved(problem.backbone, source.n)
    figures: dict[str, Any] = {}
    done: TrainedOn | None = None
    best: Best | None = None
    before_theta = theta
    spending = Budget((fit or Fit()).allowance(budget))
    if polish != 0:
        if not isinstance(response, Response):
            chosen = affordable(chosen, objective, spending)
        spending.spend(cost_of_sums(objective, chosen) + 2 * FORWARD)  # what comes after, with the accuracies
        with bar(objective, "polish", progress, spending) as told:
            done = train_on(
                objective,
                theta,
                metric,
                tolerance=aim,
                limit=polish,
                anchored=anchored,
                budget=spending,
                first=None if examples is None else known_examples(objective, examples),
                on_step=told.step,
                on_pass=told.gap,
                sharpen=smoothing is None and not anchored,
            )
        best = best_head(objective, before_theta, done, constants=polish == "auto", anchored=anchored)
        theta = problem.rounded(best.theta)
    if done is not None and done.as_found:
        aim = max(aim, AIM[torch.float32])  # cutting sets aim at the objective, not at the gradient
    as_found = done.as_found if done is not None else like is not None and like.inner.as_found
    objective.inner = inner = replace(inner, as_found=as_found)
    if objective.delta is None and not objective.reproducible:
        objective.accept(objective.evaluate(theta, explore=True))
    starts = objective.stored_starts()
    with bar(objective, "snapshot", progress):
        if resume is not None:
            sums, final = resume.sums(objective, theta, chosen, curvature, not as_found)
        else:
            sums, final = objective.sums(theta, response=chosen, curvature=curvature, settle=not as_found)
    reached = objective.evaluation(theta, sums, final)
    notes = [*reading.notes, *_notes(problem, model, theta, reached, aim, polish, decay, sums, attack)]
    if done is not None:
        assert best is not None
        figures |= polish_figures(objective, problem, loss, before_theta, theta, done, best)
        if best.is_constant:
            notes.append(_constant_note(best, threat))
    figures |= {
        "stationarity": reached.stationarity,
        "stationarity_unsmoothed": least_subgradient(objective, theta, final),
        "objective": reached.value,
        "passes": objective.passes,
        "seconds": time.perf_counter() - began,
        "counts": {k: int(v) for k, v in sums.counts.items() if v},
    }
    if not bool(torch.isfinite(theta).all()) or not bool(torch.isfinite(reached.gradient).all()):
        raise UnsuitableError("The objective is not finite at the model's weights. Check the weights and the loss.")
    key = key or (like.key if like is not None else None) or DigestKey.generate()
    digests = sample_digests(key, source, range(source.n))
    if like is not None and like.key_id == key.key_id and not torch.equal(digests, like.digests):
        raise MismatchError("like: it was taken of other rows, or in another order. Pass the same dataset.")
    assert sums.hessian is not None
    for note in notes:  # before anything is changed: a warning may be an error
        warning_module.warn(note, stacklevel=5)
    if done is not None:
        problem.write_theta(theta)
    return Snapshot(
        theta_ref=theta.cpu(),
        theta_base=theta.cpu(),
        gradient=sums.gradient.cpu(),
        hessian=replace(sums.hessian, blocks=sums.hessian.blocks.cpu()),
        decay=decay.cpu(),
        n_total=source.n,
        forgotten=[],
        threat_model=threat,
        response=chosen,
        curvature=curvature,
        loss_name=reading.identity,
        mass=source.mass,
        normalization=reading.normalization,
        head_name=problem.head.name,
        input_shape=source.input_shape,
        smoothing=replace(
            objective.smoothing,
            anchor=None if objective.smoothing.anchor is None else objective.smoothing.anchor.cpu(),
        ),
        inner=inner,
        digests=digests,
        key_id=key.key_id,
        fingerprint=weight_fingerprint(model.state_dict()),
        stationarity=reached.stationarity,
        starts=starts,
        sample_weight=source.weight,
        warnings=notes,
        figures=figures,
        key=key,
    )


@ranks_agree
def refresh(
    model: nn.Module,
    snapshot: Snapshot | WideSnapshot,
    data: Dataset[Any],
    *,
    polish: str | int = "auto",
    progress: bool = True,
    loss: Loss | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 1024,
    inputs: Any = None,
    label: Any = None,
) -> Snapshot | WideSnapshot:
    """A new snapshot of the retained samples at the current weights: nothing computed at the old ones remains.

    Args:
        model: with the weights the snapshot belongs to, or trained further on ``snapshot.retained(data)``.
        data: the full training dataset; positions keep their meaning, forgotten rows are not read.

    Returns:
        The new snapshot; the old one is left as it is.
    """
    if isinstance(snapshot, WideSnapshot):
        from lightning_muter.scope.wide_taking import refresh_wide

        return refresh_wide(
            model, snapshot, data, loss=loss, collate=collate, batch_size=min(batch_size, WIDE_BATCH), inputs=inputs, label=label
        )  # fmt: skip
    snapshot.check_length(data, "data")
    kept = snapshot.retained_positions
    reading = read_stored(model, snapshot, data, kept, loss=loss, collate=collate, inputs=inputs, label=label)
    check_digests(snapshot, data, kept, "data", collate)
    part = take_snapshot(
        model,
        Subset(data, kept),
        threat_model=snapshot.threat_model,
        response=snapshot.response,
        curvature=snapshot.curvature,
        reading=reading.of_rows(kept),
        weight_decay=_by_name(snapshot, model),
        polish=polish,
        inner=snapshot.inner,
        smoothing=replace(snapshot.smoothing, anchor=None),
        collate=collate,
        batch_size=batch_size,
        key=snapshot.key,
        progress=progress,
    )
    part.barred = snapshot.barred
    return spread(part, snapshot.n_total, snapshot.forgotten, snapshot.absent)


def _by_name(snapshot: Snapshot, model: nn.Module) -> WholeDecay:
    """The decay of a snapshot by parameter name (one number per parameter, as optimisers have it)."""
    head = dict(model.named_modules())[snapshot.head_name]
    assert isinstance(head, nn.Linear)
    prefix = f"{snapshot.head_name}." if snapshot.head_name else ""
    found = WholeDecay({f"{prefix}weight": float(snapshot.decay[0, 0])})
    if head.bias is not None:
        found[f"{prefix}bias"] = float(snapshot.decay[0, -1])
    return found


def _notes(
    problem: HeadProblem,
    model: nn.Module,
    theta: Tensor,
    reached: Evaluation,
    aim: float,
    polish: str | int,
    decay: Tensor,
    sums: Sums,
    attack: Any,
) -> list[str]:
    notes = []
    outside = outside_head(model, problem)
    if outside:
        notes.append(outside)
    if reached.stationarity > 100 * aim:
        how = "polish=0 left the weights as they were" if polish == 0 else "polish stopped early"
        notes.append(
            f"The head is not stationary: |grad F| / sum |grad phi_i| = {reached.stationarity:.1e} ({how}; the aim is "
            f"{aim:g}). The step towards the retrained optimum also corrects this, and distances to retraining measure it. "
            "Train longer, use polish='auto', or refine with retained data."
        )
    n = sums.counts["samples"]
    converged = sums.counts["maximisers converged"]
    if n and converged < 0.9 * n:
        notes.append(
            f"The inner maximiser converged for {converged} of {n} samples only (kinks of the backbone, or a ball too "
            "large for a unique maximum): statistics are less exact there."
        )
    note = attack_note(attack) if attack is not None else None
    if note is not None:
        notes.append(note)
    return notes


def _constant_note(best: Best, threat: ThreatModel) -> str:
    return (
        f"The robust optimum is a constant predictor: the best head that was found has the objective {best.value:.6g}, one that "
        f"answers the same whatever it is shown {best.constant:.6g}. Balls of eps={threat.eps:g} swamp the classes: at this "
        "radius there is nothing to learn, nor to unlearn but the share of the classes. Use a smaller eps, or better features."
    )


def outside_head(model: nn.Module, problem: HeadProblem) -> str | None:
    """What head scope leaves behind, said loudly; None when every trained parameter is in the head."""
    inside = {id(p) for p in problem.head.linear.parameters()}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if not left:
        return None
    shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
    return (
        f"Head scope leaves {len(left)} trainable parameters as they are ({shown}): if they were trained on the same data "
        "they keep what they learnt from forgotten samples. Freeze the backbone (requires_grad=False) and train it on data "
        "that is never forgotten."
    )


@dataclass
class Told:
    """What a progress bar is told: accepted steps with their stationarity, or passes with their gap."""

    line: Any

    def __call__(self, step: int, now: Evaluation) -> None:
        self.line.set_postfix_str(f"step {step}, stationarity {now.stationarity:.1e}")

    step = __call__

    def gap(self, step: int, gap: float) -> None:
        self.line.set_postfix_str(f"pass {step}, gap {gap:.1e}")


@contextmanager
def bar(objective: ShardedObjective, what: str, show: bool, budget: Budget | None = None) -> Iterator[Told]:
    """A progress bar over samples read, or where a budget limits them over gradients; yields what to tell it."""
    own = len(objective.own)
    limited = budget is not None and budget.limit is not None
    total = int((budget.limit - budget.spent) * own) if budget is not None and budget.limit is not None else own
    if what == "polish" and not limited:
        total = None  # type: ignore[assignment]
    shown = show and objective.shards.rank == 0
    line = tqdm(total=total, desc=what, unit="samples", unit_scale=True, disable=not watched(shown), leave=False)
    objective.tick = line.update
    try:
        yield Told(line)
    finally:
        objective.tick = None
        line.close()


def known_examples(objective: ShardedObjective, examples: Examples) -> Tensor | None:
    """Adversarial examples (n, D) of this process's samples, if nearly all are known in every process."""
    found, known = [], 0
    for batch in objective.source.batches(objective.own):
        delta, there = examples(batch.x)
        found.append(delta)
        known += int(there.sum())
    missing = torch.tensor([1.0 - known / max(len(objective.own), 1)])
    if not found or float(objective.largest(missing.to(objective.problem.device))) > _UNKNOWN:
        return None
    return torch.cat(found)
