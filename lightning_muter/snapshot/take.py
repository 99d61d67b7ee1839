"""How a snapshot is taken: of any trained model, at the end of a fit (the callback calls this), or anew (`refresh`)."""

from __future__ import annotations

import time
import warnings as warning_module
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.objective.sharded import ShardedObjective
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.response.choose import Response, as_response
from lightning_muter.errors import ArgumentError, MismatchError
from lightning_muter.forgotten.digests import sample_digests
from lightning_muter.minimise.budget import Budget, Fit
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.losses import Loss
from lightning_muter.model.modes import full_precision
from lightning_muter.model.read_step import read_objective
from lightning_muter.model.reading import Reading
from lightning_muter.scope.asked import TakeWide
from lightning_muter.scope.wide_taking import wide_snapshot
from lightning_muter.snapshot.polishing import AIM, Examples, Polish, Polished
from lightning_muter.snapshot.progress import bar
from lightning_muter.snapshot.ranks import ranks_agree
from lightning_muter.snapshot.resume import Resumable
from lightning_muter.snapshot.retaken import leaves_out_forgotten
from lightning_muter.snapshot.size import DEFAULT_CAP, parameter_names, without_matrix
from lightning_muter.snapshot.snapshot import WIDE_BATCH, Snapshot, WideSnapshot
from lightning_muter.snapshot.taken import Taken
from lightning_muter.snapshot.trained import Decay, head_decay, trained_threat
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lightning_muter.snapshot.take_options import Options


@overload
def take_snapshot(
    model: nn.Module, dataset: Dataset[Any], *, scope: Literal["head"] = "head", **options: Unpack[Options]
) -> Snapshot: ...


@overload
def take_snapshot(
    model: nn.Module, dataset: Dataset[Any], *, scope: Literal["all"] | list[str], **options: Unpack[Options]
) -> WideSnapshot: ...


@overload
def take_snapshot(
    model: nn.Module, dataset: Dataset[Any], *, scope: str | Sequence[str], **options: Unpack[Options]
) -> Snapshot | WideSnapshot: ...


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
    scope: str | Sequence[str] = "head",
    trades_beta: float | None = None,
    response: str | Response = "auto",
    curvature: Curvature | None = None,
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
    size_cap: int = DEFAULT_CAP,
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
) -> Snapshot | WideSnapshot:
    """Statistics of a trained model's head, from which samples of ``dataset`` can be unlearned later.

    Of the robust objective F = sum_i c_i phi_i(theta) + n (lambda / 2) |theta|^2, with phi_i the loss at sample i's worst
    perturbation, it stores the total Hessian M = sum D2 phi_i (K q, K q) and the gradient sum d phi_i (K, q) at the polished
    head theta = [W | b] (K, q): the maximisers move with theta, which M counts (J. Liu et al., *MUter*, ICCV 2023).

    Args:
        model: any module whose last ``nn.Linear`` gives the logits; its head is polished in place unless ``polish=0``.
        dataset: the full training dataset (map-style); positions to forget are counted in it.
        threat_model: norm, eps, box; read off ``attack`` or the module's adversarial training when not given.
            ``ThreatModel("l2", 0.0)`` for standard training.
        attack: what the model was trained against, where no ``threat_model`` is given: as of ``ThreatModel.from_attack``.
        scope: what requests will change. "head": sums are stored, of which this page tells. "all" or patterns over parameter names:
            nothing of size p x p is stored, and requests read the retained rows (`WideSnapshot`). So it is of
            a head beyond ``size_cap``.
        trades_beta: beyond the head, the model was trained by TRADES with this beta.
        response: "auto", "none", "unconstrained", "l2", "linf" or a Response.
        curvature: direct part of M: "hessian", "ggn" or "fisher"; None: "hessian" for the head, "ggn" beyond it.
        loss: None reads it off the module's own ``training_step``; a plain module has its ``criterion``, else cross-entropy, or
            what is given: ``callable(logits, y, reduction="none")``. A given one must be the step's, where there is a step.
        inputs: key or position in a batch, where it cannot be told which tensor is the input.
        label: the same for the label.
        normalization: (mean, std) where the dataset gives normalised inputs; threat model and box are then in the scale of the
            data (``ThreatModel("linf", 8 / 255)``).
        reading: what :func:`lightning_muter.model.read_step.read_objective` gave, if it was read before.
        weight_decay: lambda (one number, or by parameter name); "auto" reads it off ``optimizers`` or
            ``configure_optimizers()``. An L2 penalty that the training step adds by itself is added to it.
        optimizers: those of the training, for ``weight_decay="auto"``.
        polish: "auto" minimises until stationary (1e-6 in float64; networks in float32: until the objective is within a
            thousandth of the least), a number limits the passes over the data, 0 leaves the weights as they are. Beyond the head
            a number of Newton-CG steps; "auto" takes none.
        budget: of polish and snapshot together, in gradients per sample: "auto" is the larger of a tenth of the fit and three
            of its epochs, a number a share of the fit, None no limit. What stopped polish is in ``figures["polish"]``.
        fit: what the fit cost (:class:`lightning_muter.minimise.budget.Fit`); by default epochs of PGD-10 are counted.
        examples: inputs (n, ...) -> perturbations (n, D) and which are known (n,): adversarial examples of the training, from
            which the polish of a network starts.
        tolerance: on the stationarity |grad F| / sum |grad phi_i| that polish aims at; None: by dtype, as above.
        smoothing: of L-infinity switches, by default :meth:`Smoothing.of` the model; given with an anchor it is taken as it is
            (to compare models on one objective).
        inner: how inner maxima are climbed (:class:`lightning_muter.curvature.inner.maximiser.InnerSolver`).
        sample_weight: c_i (n,) of the objective; None: 1 each.
        size_cap: bytes of M, 8 (K q)^2, above which none is stored of a head: its parameters become the scope of a `WideSnapshot`,
            to which ``budget``, ``fit``, ``examples``, ``tolerance`` and ``resume`` say nothing.
        collate: the training loader's ``collate_fn``, where it had one of its own.
        batch_size: samples at a time (beyond the head at most 256).
        num_workers: of the loader that reads the dataset.
        device: where the model goes before; None leaves it.
        key: of the samples' digests; a new one when not given.
        like: another snapshot of the same weights and data: its maximisers' starting points and smoothing are used.
        resume: keep partial sums in a file, and go on from it after an interruption (polishing is done again).
        progress: show a bar on a terminal.

    Returns:
        The snapshot (beyond the head a `WideSnapshot`); ``snapshot.fingerprint`` is the polished model's.

    Raises:
        ArgumentError: an option out of range, or no threat model.
        UnsuitableError: model, data, loss or weight decay cannot be handled.
        MismatchError: ``like`` is of other weights.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = TensorDataset(x, (x[:, 0] > 0.5).long())
    >>> model = torch.nn.Linear(4, 2)  # of any script
    >>> snapshot = take_snapshot(model, rows, threat_model=ThreatModel("l2", 0.05), weight_decay=1e-2, progress=False)
    >>> snapshot.theta_ref.shape, snapshot.hessian.dense().shape, snapshot.stationarity < 1e-4
    (torch.Size([2, 5]), torch.Size([10, 10]), True)
    """
    began = time.perf_counter()
    if scope == "head":
        _check_options(polish, trades_beta)
        how = {"loss": loss, "collate": collate, "inputs": inputs, "label": label, "normalization": normalization}
        reading = _read(model, dataset, device, reading, how)
        if (large := without_matrix(reading.linear_head, size_cap)) is not None:
            scope, reading = parameter_names(reading.linear_head), replace(reading, notes=[*reading.notes, large])
            budget = fit = examples = tolerance = resume = None
    if scope != "head":
        return _beyond_head(
            scope, {"budget": budget, "fit": fit, "examples": examples, "tolerance": tolerance, "like": like, "resume": resume},
            model=model, dataset=dataset, threat_model=threat_model, attack=attack, trades_beta=trades_beta,
            response=response, curvature=curvature or "ggn", loss=loss, weight_decay=weight_decay, optimizers=optimizers,
            polish=polish, smoothing=smoothing, inner=inner, sample_weight=sample_weight, collate=collate,
            batch_size=min(batch_size, WIDE_BATCH), num_workers=num_workers, device=device, key=key, inputs=inputs, label=label,
            normalization=normalization, reading=reading, progress=progress,
        )  # fmt: skip
    curvature = curvature or "hessian"
    threat = trained_threat(model, threat_model, attack)
    assert reading is not None
    parameter = next(model.parameters())
    source = SampleSource(
        dataset, collate=collate, batch_size=batch_size, num_workers=num_workers, device=parameter.device, weight=sample_weight,
        threat=threat, reading=reading,
    ).settle()  # fmt: skip
    problem = HeadProblem(model, reading.loss, source.examples(), reading)
    decay = head_decay(problem, model, weight_decay, optimizers, reading.penalty)
    inner = inner or (like.inner if like is not None else InnerSolver())
    objective = ShardedObjective(problem, threat, source, decay, inner, smoothing or Smoothing.of(problem))
    anchored = _anchor(objective, model, smoothing, like)
    polishing = Polish(
        limit=polish,
        aim=tolerance if tolerance is not None else AIM.get(parameter.dtype, 1e-3),
        budget=Budget((fit or Fit()).allowance(budget)),
        examples=examples,
        given=isinstance(response, Response),
        anchored=anchored,
        own_smoothing=smoothing is None and not anchored,
        progress=progress,
    )
    before = problem.read_theta()
    polished = polishing.run(objective, before, as_response(response, threat).resolved(problem.backbone, source.n))
    taken = _take(objective, polished, curvature, like, resume, progress)
    figures = polished.figures(objective, reading.loss, before) | taken.figures(polishing)
    notes = [*reading.notes, *taken.notes(polishing, attack)]
    key = key or (like.key if like is not None else None) or DigestKey.generate()
    digests = _digests(source, key, like)
    for note in notes:  # before anything is changed: a warning may be an error
        warning_module.warn(note, stacklevel=5)
    if polish != 0:
        problem.write_theta(polished.theta)
    return taken.record(
        reading,
        curvature=curvature,
        warnings=notes,
        figures=figures | {"seconds": time.perf_counter() - began},
        fingerprint=weight_fingerprint(model.state_dict()),
        digests=digests,
        key=key,
    )


def _beyond_head(scope: str | Sequence[str], of_head: Mapping[str, Any], **options: Any) -> WideSnapshot:
    for name, value in of_head.items():
        if value is not None:
            raise ArgumentError(name, value, "None beyond the head", "It is of stored sums.")
    return wide_snapshot(TakeWide(scope=scope, **options))


def _read(
    model: nn.Module,
    dataset: Dataset[Any],
    device: torch.device | str | None,
    reading: Reading | None,
    how: Mapping[str, Any],
) -> Reading:
    """What the model's step minimises, on the device where it is to be."""
    if device is not None:
        model.to(device)
    return read_objective(model, dataset, **how) if reading is None else reading


def _check_options(polish: str | int, trades_beta: float | None) -> None:
    if trades_beta is not None:
        raise ArgumentError(
            "trades_beta", trades_beta, "None for a head", "TRADES is a scope of its own: 'all' or patterns."
        )
    if polish != "auto" and not (isinstance(polish, int) and polish >= 0):
        raise ArgumentError("polish", polish, "'auto', 0 or a number of passes")


def _anchor(objective: ShardedObjective, model: nn.Module, smoothing: Smoothing | None, like: Snapshot | None) -> bool:
    """Say at which head switches are smoothed; whether that was given."""
    if like is not None:
        like.check_model(model)
        objective.set_smoothing(like.smoothing)
        if like.starts is not None:
            objective.restore(like.starts)
        return True
    if smoothing is not None and smoothing.anchor is not None:
        return True
    objective.anchor(objective.problem.read_theta())
    return False


def _digests(source: SampleSource, key: DigestKey, like: Snapshot | None) -> Tensor:
    """Keyed digests of all samples.

    Raises:
        MismatchError: ``like`` is of other rows.
    """
    digests = sample_digests(key, source, range(source.n))
    if like is not None and like.key_id == key.key_id and not torch.equal(digests, like.digests):
        raise MismatchError("like: it was taken of other rows, or in another order. Pass the same dataset.")
    return digests


def _take(
    objective: ShardedObjective,
    polished: Polished,
    curvature: Curvature,
    like: Snapshot | None,
    resume: Resumable | None,
    progress: bool,
) -> Taken:
    """The sums at a polished head, at the very maximisers that it was trained on."""
    done = polished.done
    as_found = done.as_found if done is not None else like is not None and like.inner.as_found
    objective.starts_as_found(as_found)
    if objective.delta is None and not objective.reproducible:
        objective.accept(objective.evaluate(polished.theta, explore=True))
    starts = objective.stored_starts()
    with bar(objective, "snapshot", progress):
        if resume is not None:
            sums, final = resume.sums(objective, polished.theta, polished.response, curvature, not as_found)
        else:
            sums, final = objective.sums(
                polished.theta, response=polished.response, curvature=curvature, settle=not as_found
            )
    return Taken(objective, polished, sums, final, starts)
