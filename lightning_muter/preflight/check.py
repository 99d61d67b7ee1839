"""`check`: whether a model, its data and its callbacks will give a snapshot, before hours of training, in seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import nn

from lightning_muter.adversarial.adversary import Adversary
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.adversarial.training import adversary_of
from lightning_muter.errors import ArgumentError
from lightning_muter.lightning_names import MODULES, Callback, other
from lightning_muter.model.rows import collate_of
from lightning_muter.preflight.checks import OPTIONS, inspect_fit
from lightning_muter.preflight.findings import Finding, as_table
from lightning_muter.scope.choose import as_scope
from lightning_muter.snapshot.part import snapshot_of_rows
from lightning_muter.snapshot.size import DEFAULT_CAP

#: Rows of the two trials.
_FEW, _MORE = 16, 64


@dataclass
class Check:
    """What :func:`check` found.

    Attributes:
        findings: everything, with levels blocks / no snapshot / weaker / note.
        seconds: an estimate of what the end of the fit will take (polish and sums), or None where a trial failed.
        passes: passes over the data that the estimate is for.

    >>> print(Check())
    Nothing stands against a snapshot.
    """

    findings: list[Finding] = field(default_factory=list)
    seconds: float | None = None
    passes: int = 0

    @property
    def ok(self) -> bool:
        """Whether a fit will end with a snapshot."""
        return not any(f.level in ("error", "skip") for f in self.findings)

    def __str__(self) -> str:
        console = Console(width=100, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(*([as_table(self.findings)] if self.findings else ["Nothing stands against a snapshot."]))
            if self.seconds is not None:
                console.print(f"End of the fit: about {_duration(self.seconds)} ({self.passes} passes over the data).")
        return captured.get().rstrip()

    __repr__ = __str__


def check(
    model: pl.LightningModule,
    data: Any = None,
    *,
    callbacks: Iterable[Any] = (),
    trainer: pl.Trainer | None = None,
    **options: Any,
) -> Check:
    """Look at model, loss, data, optimiser, attack and trainer as a fit would meet them, and try the end of the fit on a few rows.

    Nothing is trained: weights, gradients and random numbers are as they were.

    Args:
        model: a LightningModule (of ``lightning`` or ``pytorch_lightning``).
        data: training DataLoader or LightningDataModule, as for ``trainer.fit``.
        callbacks: those of the fit: ``AdversarialTraining`` and ``MUterCallback``, whose options are then taken.
        trainer: the trainer of the fit, if it exists already (its callbacks count).
        options: scope, threat_model, response, loss, weight_decay, inputs, label, normalization where no ``MUterCallback`` is given.

    Returns:
        A :class:`Check`; ``print`` it.

    Raises:
        TypeError: an unknown option.
        ArgumentError: ``model`` is no LightningModule.

    Example::

        print(check(model, train_loader, callbacks=[AdversarialTraining(attack=...), MUterCallback()]))
    """
    if unknown := set(options) - set(OPTIONS):
        raise TypeError(f"check: unexpected {sorted(unknown)}; allowed: {', '.join(OPTIONS)}")
    if not isinstance(model, MODULES):
        advice = "Of a plain module only take_snapshot(model, dataset, threat_model=..., weight_decay=...) is needed."
        raise ArgumentError("model", model, "a LightningModule", advice)
    if trainer is None:
        kind = other.Trainer if isinstance(model, MODULES[1]) and other is not pl else pl.Trainer
        trainer = kind(
            max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
    probe = _Probe(options)
    fitter: Any = trainer
    everyone: list[Any] = fitter.callbacks
    kept, loggers = list(everyone), list(fitter.loggers)
    writers = (pl.callbacks.Checkpoint, other.callbacks.Checkpoint)
    everyone[:] = [probe, *(c for c in kept if not isinstance(c, writers))]  # nothing is written
    fitter.loggers = []
    place = {"datamodule": data} if hasattr(data, "prepare_data") else {"train_dataloaders": data}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    before = getattr(model, "_trainer", None)
    try:
        with torch.random.fork_rng(devices=[]):
            fitter.fit(model, **place)
    except _Enough:
        pass
    except Exception as error:  # of Lightning, or of the user's own code
        text = f"The fit does not begin: {type(error).__name__}: {error}"
        probe.found.findings.append(Finding("error", text, "Training would stop there too."))
    finally:
        everyone[:] = kept
        fitter.loggers = loggers
        model.to(device)
        model._trainer = before
    return probe.found


class _Enough(Exception):
    """Ends a fit that was begun to be looked at."""


class _Probe(Callback):
    """At fit start: everything is inspected, the end of the fit is tried, and the fit ends."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.found = options, Check()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        muter = next((c for c in trainer.callbacks if hasattr(c, "size_cap")), None)  # type: ignore[attr-defined]
        options = self.options
        if muter is not None:
            options = {name: getattr(muter, name) for name in OPTIONS} | options
        cap = getattr(muter, "size_cap", DEFAULT_CAP)
        self.found.findings = inspect_fit(trainer, pl_module, callback=muter, cap=cap, **options)
        if self.found.ok:
            self._try(trainer, pl_module, options, getattr(muter, "polish", "auto"))
        raise _Enough

    def _try(self, trainer: pl.Trainer, module: pl.LightningModule, options: dict[str, Any], polish: str | int) -> None:
        """Two snapshots of a few rows: whether they can be taken, and how long a pass takes."""
        loader: Any = trainer.train_dataloader
        n = len(loader.dataset)
        sizes = sorted({min(n, _FEW), min(n, _MORE)})
        try:
            adversary = adversary_of(module)
            with _as_it_was(module):
                for size in (sizes[0], *sizes):  # the first time nothing is warm
                    spent, passes = _trial(module, loader, adversary, trainer.optimizers, size, options)
                    if size == sizes[0]:
                        least, few = spent, size
        except Exception as error:
            text = f"A trial on {sizes[0]} rows failed: {type(error).__name__}: {error}"
            self.found.findings.append(Finding("error", text, "It would fail at the end of the fit in the same way."))
            return
        slope = max(0.0, spent - least) / max(1, size - few)
        fixed = max(0.0, least - slope * few)
        usual = as_scope(options.get("scope", "head")).passes(polish) + 1
        self.found.passes, self.found.seconds = usual, fixed + slope / passes * n * usual


def _trial(
    module: nn.Module, loader: Any, adversary: Adversary | None, optimizers: Any, size: int, options: dict[str, Any]
) -> tuple[float, int]:
    """Seconds and passes of a snapshot of the first rows, without polishing."""
    threat: ThreatModel | None = options.get("threat_model") or (adversary.threat if adversary is not None else None)
    began = time.perf_counter()
    snapshot = snapshot_of_rows(
        module,
        loader.dataset,
        range(size),
        trades_beta=None if adversary is None else adversary.trades_beta,
        optimizers=optimizers,
        polish=0,
        collate=collate_of(loader),
        progress=False,
        **{"scope": "head", **options, "threat_model": threat},
    )
    return time.perf_counter() - began, max(1, int(snapshot.figures["passes"]))


@contextlib.contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Warnings of a trial are those of a few rows: not said. Weights come back, whatever it did."""
    import warnings

    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            module.load_state_dict(state)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
