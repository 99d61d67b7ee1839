"""How a snapshot is taken: of any trained model, at the end of a fit (the callback calls this), or anew (`refresh`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn
from torch.utils.data import Dataset

from lightning_muter.called_with import called_with
from lightning_muter.model.modes import full_precision
from lightning_muter.scope.asked import Options, Take, TakeWide
from lightning_muter.scope.base import Scope
from lightning_muter.scope.choose import as_scope
from lightning_muter.snapshot.ranks import ranks_agree
from lightning_muter.snapshot.retaken import leaving_out_forgotten
from lightning_muter.snapshot.snapshot import Snapshot, WideSnapshot
from lightning_muter.snapshot.stored import Stored

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    model: nn.Module, dataset: Dataset[Any], *, scope: str | Sequence[str] | Scope[Any], **options: Unpack[Options]
) -> Stored: ...


@ranks_agree
@torch.inference_mode(False)
@full_precision()
@called_with(Take)
def take_snapshot(asked: Take) -> Any:
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
            a head beyond ``size_cap``. Or a :class:`lightning_muter.scope.base.Scope` of your own.
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
    >>> from lightning_muter import ThreatModel
    >>> x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = TensorDataset(x, (x[:, 0] > 0.5).long())
    >>> model = torch.nn.Linear(4, 2)  # of any script
    >>> snapshot = take_snapshot(model, rows, threat_model=ThreatModel("l2", 0.05), weight_decay=1e-2, progress=False)
    >>> snapshot.theta_ref.shape, snapshot.hessian.dense().shape, snapshot.stationarity < 1e-4
    (torch.Size([2, 5]), torch.Size([10, 10]), True)
    """
    return _taken(asked)


@ranks_agree
@torch.inference_mode(False)
@full_precision()
@called_with(TakeWide)
def take_wide_snapshot(asked: TakeWide) -> WideSnapshot:
    """What a later request on the parameters in ``scope`` needs to know; one pass over ``dataset``, nothing of size p x p.

    As :func:`lightning_muter.take_snapshot` with this scope.

    Args:
        model: any module that gives logits; FSDP is refused.
        dataset: the full training dataset (map-style); positions to forget are counted in it.
        scope: "all" trainable parameters, or patterns over their names.
        threat_model: norm, eps, box; read off ``attack`` or the module's adversarial training when not given.
        attack: what the model was trained against, where no ``threat_model`` is given.
        trades_beta: the model was trained by TRADES with this beta.
        response: "auto", "none", "unconstrained", "l2", "linf" or a Response.
        curvature: "ggn" or "hessian".
        loss: as in :func:`lightning_muter.take_snapshot`.
        weight_decay: as there.
        optimizers: as there.
        polish: accepted Newton-CG steps towards a stationary point before; "auto" and 0 leave the weights as they are.
        smoothing: of L-infinity switches.
        inner: how inner maxima are climbed.
        sample_weight: c_i (n,) of the objective; None: 1 each.
        collate: the training loader's ``collate_fn``, where it had one of its own.
        batch_size: samples at a time.
        num_workers: of the loader that reads the dataset.
        device: where the model goes before; None leaves it.
        key: of the samples' digests; a new one when not given.
        inputs: key or position in a batch, where it cannot be told which tensor is the input.
        label: the same for the label.
        normalization: (mean, std) where the dataset gives normalised inputs.
        reading: what :func:`lightning_muter.model.read_step.read_objective` gave, if it was read before.
        progress: show a bar on a terminal.

    Returns:
        The snapshot, for :func:`lightning_muter.unlearn`.

    Raises:
        ArgumentError: an option out of range, or no threat model.
        UnsuitableError: FSDP, decoupled weight decay, or an objective that is not finite.

    >>> from torch.utils.data import TensorDataset
    >>> from lightning_muter import ThreatModel
    >>> x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = TensorDataset(x, (x[:, 0] > 0.5).long())
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    >>> snapshot = take_wide_snapshot(
    ...     model, rows, threat_model=ThreatModel("l2", 0.05), weight_decay=1e-2, polish=20, progress=False)
    >>> snapshot.parameters
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    return _taken(Take(**vars(asked)))


def _taken(asked: Take) -> Any:
    return leaving_out_forgotten(as_scope(asked.scope).take, asked)
