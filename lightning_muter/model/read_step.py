"""What a trained model's objective is: read off its training step, or off a given loss on its forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_muter.errors import ArgumentError, MismatchError, UnsuitableError
from lightning_muter.model.batches import split_batch
from lightning_muter.model.dataset import insist_on_positions
from lightning_muter.model.head import eval_mode, find_head
from lightning_muter.model.known_losses import Known
from lightning_muter.model.leaves import flatten, rows
from lightning_muter.model.loss_identity import in_words, loss_identity
from lightning_muter.model.losses import Loss, reduced, resolve_loss
from lightning_muter.model.normalization import Normalization
from lightning_muter.model.own_step import WAY_OUT
from lightning_muter.model.proof import objective_at
from lightning_muter.model.reader import Reader
from lightning_muter.model.reading import Layout, Reading, algebra
from lightning_muter.model.replay import has_step, prepared, run_step
from lightning_muter.model.rowwise import Probe, denominator, points, shares

_ROWS = 16


def read_objective(
    module: nn.Module,
    dataset: Dataset[Any],
    *,
    loss: Loss | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    positions: Sequence[int] | None = None,
    inputs: Any = None,
    label: Any = None,
    normalization: Any = None,
    rows_per_step: int | None = None,
    whole: bool = False,
) -> Reading:
    """The objective of ``module``, read off a few rows spread over ``dataset`` (over ``positions`` of it).

    A module with a training step is asked itself; a given ``loss`` must then be the step's own (where the step can be read).
    A plain module has its ``loss``, its ``criterion``, or cross-entropy. ``whole``: of a network, whose head need not be linear.

    Raises:
        UnsuitableError: nothing can be read; MismatchError: ``loss`` is not what the step minimises.
    """
    insist_on_positions(dataset)
    readable = range(len(dataset)) if positions is None else positions  # type: ignore[arg-type]
    if len(readable) == 0:
        raise ArgumentError("dataset", "an empty dataset", "at least one sample")
    spread = torch.linspace(0, len(readable) - 1, min(_ROWS, len(readable))).long().tolist()
    samples = [dataset[int(readable[i])] for i in spread]
    finite = [s for s in samples if _finite(s)]  # the others are named where all rows are read
    if not finite:
        raise ArgumentError(
            "dataset", "NaN or infinity in the first samples", "finite inputs and labels", "Clean the data."
        )
    batch = (collate or torch.utils.data.default_collate)(finite)
    return read_batch(
        module,
        batch,
        loss=loss,
        inputs=inputs,
        label=label,
        normalization=normalization,
        rows_per_step=rows_per_step,
        whole=whole,
    )


def _finite(sample: Any) -> bool:
    leaves = flatten(sample)[1]
    return all(bool(torch.isfinite(v).all()) for v in leaves if isinstance(v, Tensor) and v.is_floating_point())


def read_batch(
    module: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    inputs: Any = None,
    label: Any = None,
    normalization: Any = None,
    rows_per_step: int | None = None,
    ready: bool = False,
    fixed: bool = False,
    whole: bool = False,
) -> Reading:
    """:func:`read_objective` off one batch as collated, or (``ready``) as the step receives it; ``fixed``: the head stays.

    ``whole``: the head need not be linear. ``normalization``: (mean, std) of inputs that come normalised: perturbations are then
    of the data as it was before.
    """
    of = Normalization.of(normalization)
    reading = _read_batch(module, batch, loss, inputs, label, rows_per_step, ready, fixed, whole)
    if of is None:
        return reading
    return replace(reading, normalization=of, plain=False)


def _read_batch(
    module: nn.Module,
    batch: Any,
    loss: Loss | None,
    inputs: Any,
    label: Any,
    rows_per_step: int | None,
    ready: bool,
    fixed: bool,
    whole: bool,
) -> Reading:
    if not ready:
        batch = prepared(module, batch)
    batch = _on_device(module, _few_rows(batch))
    if not has_step(module):
        return _read_given(module, batch, loss, inputs, label, rows_per_step, whole)
    if loss is None:
        return _read_step(module, batch, inputs, rows_per_step, fixed, whole)
    given = _read_given(module, batch, loss, inputs, label, rows_per_step, whole)
    try:
        own = _read_step(module, batch, inputs, rows_per_step, fixed, whole)
    except UnsuitableError as error:
        given.notes.append(f"loss= is taken at its word: training_step itself could not be read ({str(error)[:300]})")
        return given
    _must_agree(given, own, batch)
    given.penalty = own.penalty
    return own if given.identity == own.identity else given


def _read_step(
    module: nn.Module, batch: Any, inputs: Any, rows_per_step: int | None, fixed: bool, whole: bool
) -> Reading:
    if getattr(module, "automatic_optimization", True) is False:
        raise UnsuitableError(
            "The module optimises by hand (automatic_optimization=False), so that no returned loss says what it minimises. "
            + WAY_OUT
        )
    return Reader(module, batch, lambda b: run_step(module, b), inputs, fixed=fixed, whole=whole).read(rows_per_step)


def _few_rows(batch: Any) -> Any:
    """Up to 16 rows spread over a batch: enough to read from."""
    _, leaves, rebuild = flatten(batch)
    n = max((len(v) for v in leaves if isinstance(v, Tensor) and v.dim() > 0), default=0)
    if n <= _ROWS:
        return batch
    at = torch.linspace(0, n - 1, _ROWS).long()
    return rebuild([v[at.to(v.device)] if rows(v, n) else v for v in leaves])


def _on_device(module: nn.Module, batch: Any) -> Any:
    """Floating tensors in the module's precision (as Lightning's precision plugins hand them over), all on its device."""
    first = next(module.parameters())
    _, leaves, rebuild = flatten(batch)
    return rebuild(
        [
            v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
            for v in leaves
        ]
    )


def _read_given(
    module: nn.Module, batch: Any, loss: Loss | None, inputs: Any, label: Any, rows_per_step: int | None, whole: bool
) -> Reading:
    chosen = resolve_loss(loss, module)
    of_batch = reduced(loss if loss is not None else getattr(module, "criterion", None), chosen)
    x, y, _ = split_batch(batch, inputs, label)

    def run(batch: Any) -> Tensor:
        x, y, _ = split_batch(batch, inputs, label)
        return of_batch(module(x), y)

    try:
        head = find_head(module, x)
    except UnsuitableError:
        return Reader(module, batch, run, inputs, "the loss on forward", whole=whole).read(rows_per_step)
    with torch.no_grad(), eval_mode(module):
        if not bool(torch.isfinite(run(batch))):
            raise UnsuitableError("The loss is NaN or infinite on the first samples. Check data and weights.")
    names, leaves, rebuild = flatten(batch)
    at, labels = (next(i for i, v in enumerate(leaves) if v is t) for t in (x, y))
    probe = Probe(leaves, len(x))
    dtype = algebra(x.device)

    def batch_loss(z: Tensor, leaves: list[Any]) -> Tensor:
        return of_batch(z, leaves[labels])

    known = Known(chosen, lambda leaves: leaves[labels], head.outputs)
    probes = [probe.rows(torch.arange(max(2, len(x))) % len(x)), probe.rows(torch.arange(3) % len(x))]
    found = [shares(batch_loss, p, head.outputs, dtype, x.device) for p in probes]
    kind = denominator(found, probes)
    counted = found[0].active
    reading = Reading(
        module, run, head, Layout(names, at, [labels]), chosen, loss_identity(chosen), batch_loss, kind,
        probes[0].rows(counted.nonzero()[:1, 0]), rebuild(leaves), known, rows_per_step=rows_per_step,
        plain=loss_identity(chosen) == loss_identity(torch.nn.functional.cross_entropy),
    )  # fmt: skip
    return reading


def _must_agree(given: Reading, own: Reading, batch: Any) -> None:
    """Compare a given loss with the step's own.

    Raises:
        MismatchError: the given loss is not the one that training_step minimises.
    """
    k, device = own.head.outputs, next(own.module.parameters()).device
    values = []
    for reading in (given, own):
        probe, _ = reading.layout.probe(batch)
        z = points(probe.n, k, algebra(device), device, 21)
        values.append(objective_at(reading, probe, z))
    (one, slope), (two, other) = values
    off = float((slope - other).abs().max() / other.abs().max().clamp(min=1e-30))
    if off > 1e-4:
        raise MismatchError(
            f"loss: got {in_words(given.identity)}, but training_step minimises {in_words(own.identity)}: {float(one):.5g} "
            f"against {float(two):.5g} on the same outputs, gradients apart by {off:.2g} of their size. Leave "
            "loss= out (the step's own is used), or train with this one."
        )
