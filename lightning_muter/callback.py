"""MUterCallback: snapshot at the end of a fit, `unlearn` afterwards. Adds to any Trainer; changes nothing while training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_muter.adversarial.from_torchattacks import attack_note
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.adversarial.training import adversary_of, examples_of
from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.response.choose import Response
from lightning_muter.deletion.in_memory import Requests
from lightning_muter.deletion.own_files import folders_of, kept_key, stem_of
from lightning_muter.errors import ArgumentError, MismatchError, UnsuitableError
from lightning_muter.forgotten.modules import recalled, remember
from lightning_muter.forgotten.rows import Forgotten
from lightning_muter.lightning_names import Callback
from lightning_muter.minimise.budget import Fit
from lightning_muter.model.losses import Loss
from lightning_muter.model.read_step import read_objective
from lightning_muter.model.reading import Reading
from lightning_muter.model.rows import collate_of
from lightning_muter.preflight.checks import OPTIONS, inspect_fit
from lightning_muter.preflight.findings import enforce
from lightning_muter.preflight.trained_rows import TrainedRows
from lightning_muter.scope.choose import as_scope
from lightning_muter.snapshot.part import snapshot_of_rows
from lightning_muter.snapshot.size import DEFAULT_CAP
from lightning_muter.snapshot.summary import logged
from lightning_muter.solvers.base import Solver
from lightning_muter.solvers.choose import as_solver
from lightning_muter.stopping import stopped_by_sigterm
from lightning_muter.storage.fingerprint import weight_fingerprint

#: Options that `take_snapshot` is given as they are.
_TAKEN = ("scope", "response", "curvature", "weight_decay", "polish", "budget", "size_cap", "batch_size")


class MUterCallback(Requests, Callback):
    """Keeps what is needed to unlearn training samples later.

    At fit start everything unsuitable is said in one list. At the end of the fit the head is polished until stationary
    (``polish``), the total Hessian is summed over the training set, and ``<stem>.muter.ckpt`` and
    ``<stem>.muter.snapshot`` are written next to the last checkpoint (or into ``dirpath``).

    Args:
        scope: "head" (dense sums are stored, requests read the forgotten rows alone); "all" or a list of patterns over
            parameter names (nothing dense is stored, requests read the retained rows and take Newton-CG steps).
        response: "auto" (from the threat model), "none", "unconstrained", "l2", "linf" or a Response.
        curvature: direct part, "hessian", "ggn" or "fisher"; None: "hessian" for the head, "ggn" for wider scopes.
        solver: how H_R delta = g is solved: "auto", "cholesky", "cg", "neumann", "schur" or a Solver.
        threat_model: read off the adversarial training when None; ``ThreatModel("l2", 0.0)`` for standard training.
        loss: None reads it off the module's own ``training_step``; a given ``callable(logits, y, reduction="none")`` must be the
            step's, or is taken at its word where the step cannot be read.
        weight_decay: lambda, one number or by parameter name; "auto" reads it off the optimiser.
        budget: of the end of the fit (polish and snapshot), in gradients per sample: "auto" is the larger of a tenth of the fit and
            three of its epochs, a number a share of the fit, None no limit: until converged, or at the noise floor.
        polish: "auto", a number of passes (wider scopes: of Newton-CG steps, "auto" takes none), or 0 to leave the weights as
            they are.
        dirpath: folder of the files; None puts them beside the last checkpoint, and writes none where there is none.
        size_cap: largest snapshot in bytes (default 2 GiB); of a head whose sums alone exceed it none are stored, and requests read
                the retained rows.
        inputs: key or position in a batch, where it cannot be told which tensor is the input.
        label: the same for the label.
        normalization: (mean, std) where the data come normalised; of the adversarial training when None.
        verbose: progress bars and a summary.
        batch_size: samples at a time at the end of the fit and in requests (wider scopes: at most 256).

    Attributes:
        snapshot: what requests need, None until a fit ended.
        paths: of the files that were written, "checkpoint" and "snapshot".

    Raises:
        ArgumentError: an unknown scope, solver or budget.
        UnsuitableError: at fit start, with everything that stands against a snapshot.

    Example::

        muter = MUterCallback(dirpath="run")
        trainer = L.Trainer(max_epochs=5, callbacks=[AdversarialTraining(attack), muter])
        trainer.fit(model, datamodule=data)
        result = muter.unlearn(model, forget=[3, 17], retain=data.train, refine=2)
        muter.save()
    """

    def __init__(
        self,
        scope: str | list[str] = "head",
        response: str | Response = "auto",
        curvature: Curvature | None = None,
        solver: str | Solver = "auto",
        threat_model: ThreatModel | None = None,
        loss: Loss | None = None,
        weight_decay: float | Mapping[str, float] | str = "auto",  # numbers first, for command lines and YAML
        polish: int | str = "auto",
        dirpath: str | Path | None = None,
        verbose: bool = True,
        batch_size: int = 1024,
        size_cap: int = DEFAULT_CAP,
        budget: float | str | None = "auto",
        inputs: str | int | None = None,
        label: str | int | None = None,
        normalization: Any = None,
    ) -> None:
        if not scope or (isinstance(scope, str) and scope not in ("head", "all")):
            raise ArgumentError("scope", scope, "'head', 'all' or a list of patterns", "A pattern goes in a list.")
        as_solver(solver)
        Fit().allowance(budget)
        super().__init__()
        self.budget = budget
        self.scope, self.response, self.curvature, self.solver = scope, response, curvature, solver
        self.threat_model, self.loss, self.weight_decay, self.polish = threat_model, loss, weight_decay, polish
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.verbose, self.batch_size, self.size_cap = verbose, batch_size, size_cap
        self.inputs, self.label, self.normalization = inputs, label, normalization
        self._rows: TrainedRows | None = None
        self._earlier_rows: dict[str, Any] | None = None  # of the run that is resumed
        self._stepped = False

    # -- during a fit ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say everything unsuitable in one list, and refuse rows that were forgotten."""
        self._bars = trainer.progress_bar_callback is not None
        findings = inspect_fit(
            trainer,
            pl_module,
            callback=self,
            cap=self.size_cap,
            **{name: getattr(self, name) for name in OPTIONS},
        )
        skip = enforce(findings, show=self.verbose and trainer.is_global_zero)
        own = self.snapshot.key if self.snapshot is not None else None
        self._door.opens(trainer, pl_module, folders_of(trainer, self.dirpath), own)
        self._skip = skip
        self._stepped = False  # until then an earlier snapshot is still that of the weights
        self._rows = TrainedRows(trainer, pl_module, self._earlier_rows if trainer.ckpt_path is not None else None)
        self._earlier_rows = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count this epoch's rows."""
        if self._rows is not None:
            self._rows.epoch_starts()
        if self._skip is None and "examples" not in as_scope(self.scope).useless and self.polish != 0:
            examples_of(pl_module).next_epoch()  # the last epoch's adversarial examples are where polish begins
        self._door.looks_at(trainer.train_dataloader)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the rows of a batch; an earlier snapshot is none of these weights any more."""
        if not self._stepped:
            self._stepped, self.snapshot = True, None
        if self._rows is not None:
            self._rows.batch(batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle which rows this epoch trained on."""
        if self._rows is not None:
            self._rows.epoch_ends()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Polish, sum, write."""
        if self._skip is not None:
            return
        loader: Any = trainer.train_dataloader
        if loader is None or not self._stepped or self._rows is None:
            if self.snapshot is None:
                self._skip = "No snapshot was taken: the fit made no step. Use take_snapshot(model, dataset, ...)."
            return
        try:
            rows = self._rows.positions()
            reading = self._read(pl_module, loader, rows)
        except (UnsuitableError, MismatchError) as error:
            self._skip = str(error)
            rank_zero_warn(self._skip)
            return
        with stopped_by_sigterm(trainer):
            self._take(trainer, pl_module, loader, rows, reading)

    def _take(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loader: Any,
        rows: list[int] | None,
        reading: Reading | None,
    ) -> None:
        """Polish, sums, files."""
        collate = collate_of(loader)
        adversary = adversary_of(pl_module)
        threat = self.threat_model or (adversary.threat if adversary is not None else None)
        trained = weight_fingerprint(pl_module.state_dict())
        stem, key = stem_of(trainer, self.dirpath), self._door.key
        if stem is not None and trainer.is_global_zero:
            key = kept_key(stem, key, anew=bool(self._door.record))
        snapshot = snapshot_of_rows(
            pl_module,
            loader.dataset,
            rows,
            threat_model=threat,
            trades_beta=None if adversary is None else adversary.trades_beta,
            fit=Fit(trainer.current_epoch, 1 if adversary is None else adversary.gradients),
            examples=examples_of(pl_module).of,
            reading=reading,
            optimizers=trainer.optimizers,
            collate=collate,
            key=key,
            progress=self.verbose and trainer.is_global_zero and self._bars,
            **{name: getattr(self, name) for name in _TAKEN},
        )
        note = attack_note(adversary.attack) if adversary is not None else None
        if note is not None:
            rank_zero_warn(note)
            snapshot.warnings.append(note)
        self.snapshot, self._dataset, self._collate = snapshot, loader.dataset, collate
        remember(pl_module, Forgotten.of(snapshot))
        self._door.record = recalled(pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(logged(snapshot), step=trainer.global_step)
        if self.verbose:
            rank_zero_info(f"MUter: {snapshot!r}")
        self._files.at_the_end_of_fit(trainer, pl_module, snapshot, stem, trained, verbose=self.verbose)

    def _normalization(self, pl_module: pl.LightningModule) -> Any:
        adversary = adversary_of(pl_module)
        return self.normalization or (None if adversary is None else adversary.normalization)

    def _read(self, pl_module: pl.LightningModule, loader: Any, rows: list[int] | None) -> Reading:
        """What the step minimises, as the module stands now."""
        return read_objective(
            pl_module,
            loader.dataset,
            positions=rows,
            loss=self.loss,
            collate=collate_of(loader),
            inputs=self.inputs,
            label=self.label,
            normalization=self._normalization(pl_module),
            rows_per_step=getattr(loader, "batch_size", None),
            whole=as_scope(self.scope).record.beyond_head,
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remember why there is no snapshot."""
        if self.snapshot is None:
            self._skip = (
                f"No snapshot was taken: the fit ended with {type(exception).__name__}. Use take_snapshot(model, dataset, "
                "...), or `muter snapshot` on a checkpoint."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of what counted the rows."""
        self._rows = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of this callback: who was forgotten, and which rows were trained on."""
        return {
            **self._door.state(),
            "fingerprint": self.snapshot.fingerprint if self.snapshot is not None else None,
            "rows": self._rows.state() if self._rows is not None else self._earlier_rows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; what is known to be forgotten only grows."""
        self._door.load_state(state_dict)
        self._earlier_rows = state_dict.get("rows")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """An unlearned checkpoint carries the list of what may not be trained on again."""
        self._door.checkpoint(checkpoint, fits=trainer.state.fn == "fit")
