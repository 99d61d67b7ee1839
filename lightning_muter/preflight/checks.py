"""Everything about model, loss, data, optimiser and trainer that unlearning cares about, in one list, at fit start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_muter.adversarial.adversary import Adversary
from lightning_muter.adversarial.climb import check_box
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.adversarial.training import adversary_of
from lightning_muter.curvature.response.choose import Response, as_response
from lightning_muter.errors import ArgumentError, MismatchError, UnsuitableError
from lightning_muter.lightning_names import is_overridden
from lightning_muter.model.distributed import SHARDED
from lightning_muter.model.loss_identity import loss_identity, same_loss
from lightning_muter.model.losses import Loss
from lightning_muter.model.normalization import Normalization, normalization_in
from lightning_muter.model.read_step import read_objective
from lightning_muter.model.reading import Reading
from lightning_muter.model.rows import collate_of
from lightning_muter.preflight.data import inspect_loaders, same_randomness_afterwards
from lightning_muter.preflight.findings import Finding
from lightning_muter.preflight.model import inspect_layers, inspect_outside, inspect_size
from lightning_muter.preflight.optimizers import inspect_optimizers
from lightning_muter.scope.base import Extent, Scope
from lightning_muter.scope.choose import as_scope
from lightning_muter.snapshot.codec import storable
from lightning_muter.snapshot.size import DEFAULT_CAP

#: What callers of :func:`inspect_fit` may say of a training.
OPTIONS = ("scope", "threat_model", "response", "loss", "weight_decay", "inputs", "label", "normalization")
_AVERAGING = ("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging")


def inspect_fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    *,
    scope: str | Sequence[str] | Scope[Any] = "head",
    threat_model: ThreatModel | None = None,
    response: str | Response = "auto",
    loss: Loss | None = None,
    inputs: Any = None,
    label: Any = None,
    normalization: Any = None,
    weight_decay: object = "auto",
    callback: pl.Callback | None = None,
    cap: int = DEFAULT_CAP,
) -> list[Finding]:
    """The whole list, for ``on_fit_start`` (optimisers exist, parameters are on their device).

    Args:
        trainer, module: as Lightning hands them to a callback.
        scope: "head", or "all" or patterns over parameter names (then no head is looked for).
        threat_model, response, loss, weight_decay: as given to ``MUterCallback``; an explicit one overrides what is read.
        callback: the one that snapshots; weight averaging must come before it.
        cap: largest snapshot in bytes; a head whose sums alone exceed it has none stored.
    """
    scope = as_scope(scope)
    trainer.fit_loop.setup_data()  # Lightning does the same right after; it keeps the loaders
    loaders = _loaders(trainer)
    about_data = inspect_loaders(loaders)
    out = [*inspect_trainer(trainer, callback), *inspect_hooks(trainer, module), *about_data]
    adversary: Adversary | None = None
    try:
        adversary = adversary_of(module)
    except (ArgumentError, UnsuitableError) as e:
        out.append(Finding("error", str(e)))
    else:
        out += inspect_adversary(adversary, threat_model, scope)
    readable = not any(f.level == "error" for f in about_data)
    reading: Reading | None = None
    threat = threat_model or (adversary.threat if adversary is not None else None)
    if threat is not None:
        if (doubt := threat.doubt()) is not None:
            out.append(Finding("warning", doubt))
        out += _caught(lambda: storable(as_response(response, threat)))
    if readable:
        if normalization is None and adversary is not None:
            normalization = adversary.normalization
        whole = scope.record.beyond_head
        found, reading = inspect_objective(module, loaders[0], loss, inputs, label, threat, normalization, whole)
        out += [*found, *inspect_layers(module)]
        if adversary is not None and reading is not None:
            out += inspect_climb(adversary, reading)
    inside, found = inspect_extent(scope, module, trainer, reading, threat, cap)
    penalty = {} if reading is None else reading.penalty
    optimizers = inspect_optimizers(
        trainer.optimizers, module, inside.names, weight_decay, damped=inside.damped, penalty=penalty
    )
    return [*out, *found, *optimizers]


def inspect_extent(
    scope: Scope[Any],
    module: nn.Module,
    trainer: pl.Trainer,
    reading: Reading | None,
    threat: ThreatModel | None,
    cap: int,
) -> tuple[Extent, list[Finding]]:
    """What the scope covers: how large what is stored of it will be, and what else is trained."""
    try:
        inside = scope.extent(module, reading, cap)
    except ArgumentError as e:
        return Extent(list(_trained(module, trainer)), damped=True), [Finding("error", str(e))]
    if inside is None:
        return Extent(list(_trained(module, trainer)), damped=False), []
    found = inspect_outside(module, inside.names, trainer.optimizers)
    if inside.head is not None and reading is not None:
        rows, x = len(_loaders(trainer)[0].dataset), reading.split(reading.example)[0]
        found = [*inspect_size(inside.head, rows, x[0].numel(), threat, cap), *found]
    return inside, found


def _trained(module: nn.Module, trainer: pl.Trainer) -> Iterator[str]:
    """What an optimiser trains: all that is known of a head that could not be found."""
    held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    return (n for n, p in module.named_parameters() if p.requires_grad and id(p) in held)


def inspect_trainer(trainer: pl.Trainer, callback: pl.Callback | None = None) -> list[Finding]:
    """Precision, strategy, limits on the data, weight averaging."""
    out = []
    strategy = next((c.__name__ for c in type(trainer.strategy).__mro__ if c.__name__ in SHARDED), None)
    if strategy is not None:
        advice = "Use strategy='ddp' or a single device."
        cli = "--trainer.strategy ddp"
        out.append(Finding("error", f"{strategy} shards parameters; curvature needs them whole.", advice, cli))
    if "spawn" in type(trainer.strategy).__name__.lower() or getattr(trainer.strategy, "_start_method", None) in (
        "spawn",
        "fork",
    ):
        advice = "Set dirpath, or use strategy='ddp'."
        cli = "--trainer.strategy ddp"
        out.append(Finding("warning", "Spawned processes keep results to themselves: only files survive.", advice, cli))
    precision = str(trainer.precision)
    if "16" in precision or "transformer" in precision:
        advice = "Polish and unlearning are better with precision='32-true' or '64-true'."
        cli = "--trainer.precision 32-true"
        out.append(Finding("warning", f"Precision {precision} limits how stationary the model can be.", advice, cli))
    advice = "Unlearning weighs every sample of the dataset once; train on a Subset instead."
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        out.append(
            Finding(
                "skip",
                "fast_dev_run is a trial of the code.",
                "Fit without it for a snapshot.",
                "--trainer.fast_dev_run false",
            )
        )
    elif overfit:
        cli = "--trainer.overfit_batches 0"
        out.append(Finding("warning", f"overfit_batches={overfit} trains on a part only.", advice, cli))
    elif trainer.limit_train_batches not in (1.0, None):
        limit = trainer.limit_train_batches
        cli = "--trainer.limit_train_batches 1.0"
        out.append(Finding("warning", f"limit_train_batches={limit} trains on a part of each epoch only.", advice, cli))
    anew = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if anew:
        out.append(
            Finding(
                "warning",
                f"The training loader is made anew every {anew} epochs: where its rows change there will be no snapshot, for what "
                "was trained on earlier could not be unlearned.",
                "Give all rows in one dataset, or the same rows every time.",
                "--trainer.reload_dataloaders_every_n_epochs 0",
            )
        )
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    averaging = [c for c in callbacks if is_averaging(c)]
    if averaging:
        names = ", ".join(type(c).__name__ for c in averaging)
        late = callback in callbacks and any(callbacks.index(c) > callbacks.index(callback) for c in averaging)
        if late:
            advice = "List it before the callback that unlearns."
            out.append(Finding("error", f"{names} averages the weights after they were snapshot.", advice))
        else:
            out.append(Finding("note", f"{names}: the averaged weights are polished and snapshot."))
    return out


def is_averaging(callback: Any) -> bool:
    """Whether a callback replaces the weights by an average at the end of a fit (SWA, EMA)."""
    return any(c.__name__ in _AVERAGING or "EMA" in c.__name__ for c in type(callback).__mro__)


def inspect_hooks(trainer: pl.Trainer, module: pl.LightningModule) -> list[Finding]:
    """Hooks that change a batch between the dataset and the step: they are run for every sample that is read."""
    out = []
    for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
        if is_overridden(name, module):
            text = f"{type(module).__name__}.{name} is run for every sample that is read; it may not draw at random."
            out.append(Finding("note", text))
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is not None and is_overridden(name, datamodule):
            out.append(
                Finding(
                    "warning",
                    f"{type(datamodule).__name__}.{name} changes batches after they were loaded; requests that come without this "
                    "datamodule's trainer read samples without it.",
                    "Move what it does into the dataset or the module.",
                )
            )
    return out


def inspect_adversary(
    adversary: Adversary | None, threat_model: ThreatModel | None, scope: Scope[Any]
) -> list[Finding]:
    """Whether the threat model is known and is the one that is trained against."""
    if adversary is None:
        if threat_model is not None:
            return []
        return [
            Finding(
                "error",
                "Nothing tells the threat model: no adversarial training was found.",
                "Add AdversarialTraining(attack=...) or the mixin, or pass threat_model=ThreatModel(norm, eps, box) "
                "(eps=0 for plain training).",
                "--trainer.callbacks.threat_model '{norm: linf, eps: 0.03}'",
            )
        ]
    out = []
    if threat_model is not None and threat_model != adversary.threat:
        out.append(
            Finding(
                "error",
                f"Training uses {adversary.threat}, unlearning was given {threat_model}.",
                "Give the same one to both, or leave it out here.",
                "--trainer.callbacks.threat_model null",
            )
        )
    if adversary.trades_beta is not None and "trades_beta" in scope.useless:
        out.append(
            Finding(
                "skip",
                "TRADES is not convex even in a linear head; its unlearning from stored sums is refused.",
                "Train with PGD (no trades_beta) to unlearn, or use scope='all' (matrix-free).",
                "--trainer.callbacks.scope all",
            )
        )
    elif adversary.note is not None:
        out.append(Finding("warning", adversary.note))
    return out


def inspect_objective(
    module: nn.Module,
    loader: Any,
    loss: Loss | None,
    inputs: Any,
    label: Any,
    threat: ThreatModel | None,
    normalization: Any = None,
    whole: bool = False,
) -> tuple[list[Finding], Reading | None]:
    """What the step's own loss is, or why it cannot be read; whether it is finite and the inputs lie in the box."""
    try:
        with same_randomness_afterwards():
            reading = read_objective(
                module,
                loader.dataset,
                loss=loss,
                collate=collate_of(loader),
                inputs=inputs,
                label=label,
                normalization=normalization,
                rows_per_step=loader.batch_size,
                whole=whole,
            )
    except (UnsuitableError, MismatchError) as e:
        return [Finding("skip", str(e))], None
    except ArgumentError as e:
        return [Finding("error", str(e))], None
    out = [Finding("warning", note) for note in reading.notes]
    x = reading.split(reading.example)[0]
    if threat is not None:
        outside = _caught(lambda: check_box(x, threat))
        given = Normalization.of(normalization_in(loader.dataset)) if outside and normalization is None else None
        if given is not None:
            advice = f"The dataset normalises: pass normalization=({given.mean}, {given.std})."
            outside = [replace(f, advice=advice) for f in outside]
        out += outside
    return out, reading


def inspect_climb(adversary: Adversary, reading: Reading) -> list[Finding]:
    """Whether what is raised in training is what is minimised."""
    if adversary.asks or same_loss(loss_identity(adversary.loss), reading.identity):
        return []
    return [
        Finding(
            "warning",
            f"Training raises {loss_identity(adversary.loss)} and minimises {reading.identity}: its result is no minimum of a "
            "maximum, however long it trains.",
            "Leave loss= and maximise= of the adversarial training out, so that the step's own loss is raised.",
            "--trainer.callbacks.maximise step",
        )
    ]


def _loaders(trainer: pl.Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def _caught(check: Any) -> list[Finding]:
    try:
        check()
    except (ArgumentError, UnsuitableError) as e:
        return [Finding("error", str(e))]
    return []
