"""MUterCallback: snapshot at the end of a fit, `unlearn` afterwards. Adds to any Trainer; changes nothing while training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset, Subset

from lightning_muter.adversarial.from_torchattacks import attack_note
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.adversarial.training import adversary_of, examples_of
from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.response.choose import Response
from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.fit_door import (
    all_records,
    forgotten_nearby,
    refuse_earlier_training,
    refuse_forgotten_data,
    retained_of,
)
from lightning_muter.deletion.request_flow import entry_of
from lightning_muter.deletion.saving import save_fit, save_requests
from lightning_muter.errors import ArgumentError, MismatchError, MuterError, RequestError, UnsuitableError
from lightning_muter.forgotten.modules import ENTRY, entries_of, recalled, remember
from lightning_muter.forgotten.rows import Forgotten, known_keys
from lightning_muter.lightning_names import Callback
from lightning_muter.minimise.budget import Fit
from lightning_muter.model.losses import Loss
from lightning_muter.model.read_step import read_objective
from lightning_muter.model.reading import Reading
from lightning_muter.model.rows import collate_of
from lightning_muter.preflight.checks import inspect_fit
from lightning_muter.preflight.findings import enforce
from lightning_muter.preflight.model import DEFAULT_CAP
from lightning_muter.preflight.trained_rows import TrainedRows
from lightning_muter.scope.head_methods import Method
from lightning_muter.snapshot.part import snapshot_of_rows
from lightning_muter.snapshot.refreshing import refresh
from lightning_muter.snapshot.snapshot import Snapshot, WideSnapshot, key_path
from lightning_muter.solvers.base import Solver
from lightning_muter.solvers.choose import as_solver
from lightning_muter.stopping import stopped_by_sigterm
from lightning_muter.storage.atomic import commit_files
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint
from lightning_muter.storage.plain import Plain, plain
from lightning_muter.unlearning.result import UnlearnResult
from lightning_muter.unlearning.unlearn import CERTIFY_SECONDS, unlearn


class MUterCallback(Callback):
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
        size_cap: largest snapshot in bytes (default 2 GiB).
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
        self.budget = budget
        self.scope, self.response, self.curvature, self.solver = scope, response, curvature, solver
        self.threat_model, self.loss, self.weight_decay, self.polish = threat_model, loss, weight_decay, polish
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.verbose, self.batch_size, self.size_cap = verbose, batch_size, size_cap
        self.inputs, self.label, self.normalization = inputs, label, normalization
        self.snapshot: Snapshot | WideSnapshot | None = None
        self.paths: dict[str, Path] = {}
        self._skip: str | None = "No snapshot was taken yet: fit a model with this callback, or use take_snapshot."
        self._dataset: Dataset[Any] | None = None
        self._collate: Any = None
        self._record = Forgotten()  # rows once forgotten, kept over later fits
        self._key: DigestKey | None = None
        self._resumed: list[Forgotten] = []  # the lists in the checkpoint that a run is resumed from
        self._looked_at: Any = None  # the dataset that was searched for forgotten rows
        self._stale = False  # ... which does not list all that is known here
        # what save() needs: the module, what a checkpoint holds besides weights, and what was done since the files
        self._module: pl.LightningModule | None = None
        self._base: dict[str, Any] = {}
        self._on_disk: str | None = None
        self._unsaved: list[UnlearnResult] = []
        self._changed = False
        self._rows: TrainedRows | None = None
        self._earlier_rows: dict[str, Any] | None = None  # of the run that is resumed
        self._stepped = False

    # -- during a fit ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say everything unsuitable in one list, and refuse rows that were forgotten."""
        findings = inspect_fit(
            trainer,
            pl_module,
            scope=self.scope,
            threat_model=self.threat_model,
            response=self.response,
            loss=self.loss,
            inputs=self.inputs,
            label=self.label,
            normalization=self.normalization,
            weight_decay=self.weight_decay,
            callback=self,
            cap=self.size_cap,
        )
        skip = enforce(findings, show=self.verbose and trainer.is_global_zero)
        records = all_records(self._record, pl_module, self._folders(trainer))
        refuse_earlier_training(trainer.ckpt_path, self._resumed, records, known_before=self._stale)
        refuse_forgotten_data(records, trainer.train_dataloader)
        if trainer.is_global_zero and (
            doubt := forgotten_nearby(self._folders(trainer), trainer.train_dataloader, records)
        ):
            rank_zero_warn(doubt)
        self._looked_at = getattr(trainer.train_dataloader, "dataset", None)
        for record in records:
            remember(pl_module, record)
        self._record = recalled(pl_module)
        self._key = self._chosen_key()
        self._resumed, self._stale = [], False
        self._skip = skip
        self._stepped = False  # until then an earlier snapshot is still that of the weights
        self._rows = TrainedRows(trainer, pl_module, self._earlier_rows if trainer.ckpt_path is not None else None)
        self._earlier_rows = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count this epoch's rows."""
        if self._rows is not None:
            self._rows.epoch_starts()
        if self._skip is None and self.scope == "head" and self.polish != 0:
            examples_of(pl_module).next_epoch()  # the last epoch's adversarial examples are where polish begins
        loader: Any = trainer.train_dataloader
        if self._record and getattr(loader, "dataset", None) is not self._looked_at:  # reloaded
            refuse_forgotten_data([self._record], loader)

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

    def _chosen_key(self) -> DigestKey:
        """Of the digests to come; its id goes into every checkpoint of the run, and tells whose it is."""
        known = known_keys().get(self._record.key_id) if self._record else None
        return known or (self.snapshot.key if self.snapshot is not None else None) or DigestKey.generate()

    def _folders(self, trainer: pl.Trainer) -> list[Path]:
        """Where the files of this run go, and where the one that is resumed lies: who was forgotten there counts here."""
        own = getattr(trainer.checkpoint_callback, "dirpath", None)
        resumed = trainer.ckpt_path
        found = [self.dirpath, own, None if resumed is None else Path(resumed).parent]
        return [Path(folder) for folder in found if folder is not None]

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
        snapshot = snapshot_of_rows(
            pl_module,
            loader.dataset,
            rows,
            threat_model=threat,
            scope=self.scope,
            response=self.response,
            curvature=self.curvature,
            trades_beta=None if adversary is None else adversary.trades_beta,
            budget=self.budget,
            fit=Fit(trainer.current_epoch, 1 if adversary is None else adversary.gradients),
            examples=examples_of(pl_module).of,
            reading=reading,
            weight_decay=self.weight_decay,
            optimizers=trainer.optimizers,
            polish=self.polish,
            collate=collate,
            batch_size=self.batch_size,
            key=self._kept_key(trainer),
            progress=self.verbose and trainer.is_global_zero and trainer.progress_bar_callback is not None,
        )
        note = attack_note(adversary.attack) if adversary is not None else None
        if note is not None:
            rank_zero_warn(note)
            snapshot.warnings.append(note)
        self.snapshot, self._dataset, self._collate = snapshot, loader.dataset, collate
        self._module, self._unsaved, self._on_disk, self._changed = pl_module, [], None, True
        remember(pl_module, Forgotten.of(snapshot))
        self._record = recalled(pl_module)
        self._log(trainer, snapshot)
        if self.verbose:
            rank_zero_info(f"MUter: {snapshot!r}")
        dumped = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
        del dumped["state_dict"]
        written = plain(dumped)
        self._base = {**written.value, ENTRY: entry_of(snapshot)}
        stem = self._stem(trainer)
        if stem is not None and trainer.is_global_zero:
            self._write(snapshot, pl_module, written, stem, trained)

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

    # -- files -------------------------------------------------------------------------------------------------------

    def _stem(self, trainer: pl.Trainer) -> Path | None:
        """Path without suffix of the files: after the last checkpoint, in dirpath where one is given."""
        checkpoint = trainer.checkpoint_callback
        last = ""
        if checkpoint is not None:
            last = str(getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", ""))
        name = Path(last).stem if last else "model"
        if self.dirpath is not None:
            return self.dirpath / name
        return Path(last).parent / name if last else None

    def _kept_key(self, trainer: pl.Trainer) -> DigestKey | None:
        stem = self._stem(trainer)
        if stem is None or not trainer.is_global_zero:
            return self._key
        stem.parent.mkdir(parents=True, exist_ok=True)
        path = key_path(f"{stem}.muter.snapshot")
        if self._key is not None and (self._record or not path.exists()):
            self._key.keep(path)
        return DigestKey.load(path)

    def _write(
        self,
        snapshot: Snapshot | WideSnapshot,
        module: pl.LightningModule,
        written: Plain,
        stem: Path,
        trained: str,
    ) -> None:
        places = Places(stem.parent, stem.name)
        self.paths = {"checkpoint": places.checkpoint, "snapshot": places.snapshot}
        checkpoint = {**self._base, "state_dict": module.state_dict()}
        if snapshot.key is not None:
            snapshot.key.keep(places.key)
        if places.ledger.exists():  # requests were carried out on the files here: this is entered after them
            save_fit(places, module, snapshot, checkpoint, trained)
        else:
            commit_files(  # both or none: a crash in between must not leave a snapshot of other weights
                {places.checkpoint: lambda file: torch.save(checkpoint, file), places.snapshot: snapshot.writer()}
            )
        self._on_disk, self._changed = snapshot.fingerprint, False
        self._read_back(snapshot, written)
        if self.verbose:
            rank_zero_info(f"MUter: written: {self.paths['snapshot']} (weights: {self.paths['checkpoint'].name})")

    def _read_back(self, snapshot: Snapshot | WideSnapshot, written: Plain) -> None:
        """What was written must be what the command line can read; said now, not when the first request comes."""
        written.left_out.pop("hparams_type", None)  # of OmegaConf: a class
        notes = []
        if written.changed and self.verbose:
            shown = ", ".join(f"{name} ({kind})" for name, kind in written.changed.items())
            rank_zero_info(f"MUter: written as plain dicts and tensors, and so they come back: {shown}")
        if written.left_out:
            shown = ", ".join(f"{name} ({kind})" for name, kind in written.left_out.items())
            notes.append(
                f"{self.paths['checkpoint'].name} was written without {shown}: reading such objects would run code. "
                "Pass them again where the checkpoint is loaded: load_from_checkpoint(path, name=value), or in the "
                "command line's configuration."
            )
        try:
            found = checkpoint_fingerprint(load_checkpoint(self.paths["checkpoint"]))
            if found != snapshot.fingerprint:
                notes.append(f"{self.paths['checkpoint']} does not hold the weights of the snapshot ({found[:16]}…).")
        except MuterError as error:
            notes.append(f"Requests from the command line will not work: {error}")
        for note in notes:
            rank_zero_warn(note)
        snapshot.warnings += notes

    def _log(self, trainer: pl.Trainer, snapshot: Snapshot | WideSnapshot) -> None:
        figures: dict[str, float] = {
            "muter/stationarity": snapshot.stationarity,
            "muter/seconds": float(snapshot.figures["seconds"]),
            "muter/bytes": float(snapshot.nbytes),
            "muter/passes": float(snapshot.figures["passes"]),
        }
        for name, value in snapshot.figures.get("polish", {}).items():
            if isinstance(value, (int, float)):
                figures[f"muter/polish_{name}"] = float(value)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of this callback: who was forgotten, and which rows were trained on."""
        own = replace(self._record, key_id=self._key.key_id) if self._key is not None else self._record
        return {
            **own.to_dict(),
            "fingerprint": self.snapshot.fingerprint if self.snapshot is not None else None,
            "rows": self._rows.state() if self._rows is not None else self._earlier_rows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; what is known to be forgotten only grows."""
        loaded = Forgotten.from_dict(state_dict)
        self._stale = bool(self._record) and not loaded.covers(self._record)
        self._record = self._record | loaded
        self._earlier_rows = state_dict.get("rows")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """An unlearned checkpoint carries the list of what may not be trained on again."""
        self._resumed = entries_of(checkpoint, "ckpt_path")
        listed = Forgotten.from_dict(checkpoint[ENTRY]) if ENTRY in checkpoint else Forgotten()
        self._record = self._record | listed
        if listed and trainer.state.fn == "fit":
            raise RequestError(
                f"ckpt_path: the checkpoint is the result of a deletion request ({listed.count} forgotten rows) and "
                "holds no optimiser state to resume. Load its weights with load_from_checkpoint and train on "
                "Snapshot.load(<name>.muter.snapshot).retained(dataset)."
            )

    # -- afterwards --------------------------------------------------------------------------------------------------

    def _at_hand(self) -> Snapshot | WideSnapshot:
        if self.snapshot is None:
            nothing = "No snapshot was taken: the fit made no step. Use take_snapshot(model, dataset, ...)."
            raise UnsuitableError(self._skip or nothing)
        return self.snapshot

    def unlearn(
        self,
        model: pl.LightningModule,
        forget: Iterable[int],
        *,
        data: Dataset[Any] | None = None,
        retain: Dataset[Any] | None = None,
        refine: int = 0,
        within: float | None = None,
        certify: bool | float = CERTIFY_SECONDS,
        accept: str | None = None,
        method: Method | None = None,
        solver: str | Solver | None = None,
        dry_run: bool = False,
        progress: bool | None = None,
    ) -> UnlearnResult:
        """Remove training samples from ``model`` (in memory; :meth:`save` persists). All of it or nothing.

        Args:
            model: the fitted module, with the weights that the fit or the last request left.
            forget: positions in the training dataset of the fit.
            data: that dataset, if it is another object by now.
            retain: the full training dataset: allows ``refine``, stationarity and the certificate. Wider scopes read it in any
                case (from ``data`` if it is not given).
            refine: steps on the retained rows after the first.
            within: refine until the certified distance to retraining is below this, else refuse; for `publish`.
            certify: seconds that the search for a certificate may take, True: as long as a tight one may, False: none.
            accept: "worse" takes a step that raises the robust objective; None refuses it.
            method: how the step is made of stored sums; default :class:`lightning_muter.MUter`.
            solver: None takes the callback's.
            dry_run: compute everything, change nothing.
            progress: show a bar; None: as ``verbose``.

        Returns:
            what was done, and how near it is: ``print`` it.

        Raises:
            UnsuitableError: there is no snapshot; the message says why.
            MuterError: all others of :func:`lightning_muter.unlearn`. Model and snapshot are as they were.
        """
        snapshot = self._at_hand()
        dataset = data if data is not None else retain if retain is not None else self._dataset
        if dataset is None:
            raise ArgumentError("data", None, "the training dataset", "Pass data=train_dataset.")
        result = unlearn(
            model,
            snapshot,
            forget,
            dataset,
            method=method,
            solver=solver if solver is not None else self.solver,
            retain=retain,
            refine=refine,
            within=within,
            certify=certify,
            accept=accept,
            dry_run=dry_run,
            loss=self.loss,
            inputs=self.inputs,
            label=self.label,
            collate=self._collate,
            batch_size=self.batch_size,
            progress=self.verbose if progress is None else progress,
        )
        if not dry_run:
            remember(model, Forgotten.of(snapshot))
            self._record = self._record | Forgotten.of(snapshot)
            self._module, self._changed = model, True
            self._unsaved.append(result)
        return result

    def refresh(self, model: pl.LightningModule, data: Dataset[Any] | None = None) -> Snapshot | WideSnapshot:
        """A new snapshot of the retained samples at the current weights: nothing computed at the old ones remains.

        Args:
            model: with the weights the snapshot belongs to, or trained further on the retained rows.
            data: the full training dataset, if it is another object than that of the fit.

        Returns:
            the new snapshot, which requests use from now on; :meth:`save` writes it.
        """
        dataset = data if data is not None else self._dataset
        if dataset is None:
            raise ArgumentError("data", None, "the training dataset", "Pass data=train_dataset.")
        self.snapshot = refresh(
            model,
            self._at_hand(),
            dataset,
            progress=self.verbose,
            loss=self.loss,
            collate=self._collate,
            inputs=self.inputs,
            label=self.label,
        )
        self._module, self._changed = model, True
        return self.snapshot

    def retained(self, dataset: Dataset[Any]) -> Subset[Any]:
        """The part of the training dataset (or of one that it was made of) that may still be trained on.

        Args:
            dataset: the full training dataset, forgotten rows included.

        Returns:
            its rows that were never forgotten, in their order.

        Raises:
            MismatchError: these are other rows, or they are in another order; RequestError: it cannot be told.
        """
        if self.snapshot is None and not self._record:
            self._at_hand()
        return retained_of(dataset, self._record, self.snapshot, self._collate)

    def save(self, path: str | Path | None = None) -> Path:
        """Bring model, snapshot and what was requested to the disk: checkpoint, snapshot and ledger in one transaction.

        Args:
            path: `<name>.muter.snapshot` or `<name>.ckpt`; by default where the fit wrote its files.

        Returns:
            The snapshot's path; checkpoint, ledger, receipts and key lie beside it.

        Raises:
            MismatchError: the files were changed since by somebody else, or the model was trained further.
        """
        target = Path(path) if path is not None else self.paths.get("snapshot")
        if target is None:
            raise ArgumentError(
                "path", None, "a file name", "The fit wrote no files: say where, e.g. 'a.muter.snapshot'."
            )
        snapshot, places = self._at_hand(), Places.named(target)
        assert self._module is not None  # there is a snapshot
        if places.snapshot == self.paths.get("snapshot") and not self._changed:
            return places.snapshot  # as it was written
        before = self._on_disk or (self._unsaved[0].fingerprint_before if self._unsaved else snapshot.fingerprint)
        save_requests(places, self._module, snapshot, self._unsaved, before=before, base=self._base)
        self.paths = {"checkpoint": places.checkpoint, "snapshot": places.snapshot}
        self._on_disk, self._unsaved, self._changed = snapshot.fingerprint, [], False
        return places.snapshot
