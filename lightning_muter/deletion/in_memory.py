"""What may be asked of a snapshot in memory: requests, a refresh, what is retained, and to bring it all to the disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import Dataset, Subset

from lightning_muter.deletion.fit_door import Door, retained_of
from lightning_muter.deletion.own_files import OwnFiles
from lightning_muter.errors import ArgumentError, UnsuitableError
from lightning_muter.forgotten.modules import remember
from lightning_muter.forgotten.rows import Forgotten
from lightning_muter.model.losses import Loss
from lightning_muter.scope.head_methods import Method
from lightning_muter.snapshot.refreshing import refresh
from lightning_muter.snapshot.stored import Stored
from lightning_muter.solvers.base import Solver
from lightning_muter.unlearning.result import UnlearnResult
from lightning_muter.unlearning.unlearn import CERTIFY_SECONDS, unlearn


class Requests:
    """The half of :class:`lightning_muter.MUterCallback` that works after a fit."""

    solver: str | Solver
    loss: Loss | None
    batch_size: int
    inputs: str | int | None
    label: str | int | None
    verbose: bool

    def __init__(self) -> None:
        self.snapshot: Stored | None = None
        self._skip: str | None = "No snapshot was taken yet: fit a model with this callback, or use take_snapshot."
        self._dataset: Dataset[Any] | None = None
        self._collate: Any = None
        self._door = Door()
        self._files = OwnFiles()
        self._bars = True  # as the trainer of the fit had them

    @property
    def paths(self) -> dict[str, Path]:
        """Of the files that were written, "checkpoint" and "snapshot"."""
        return self._files.paths

    def _at_hand(self) -> Stored:
        if self.snapshot is None:
            nothing = "No snapshot was taken: the fit made no step. Use take_snapshot(model, dataset, ...)."
            raise UnsuitableError(self._skip or nothing)
        return self.snapshot

    def _data(self, given: Dataset[Any] | None) -> Dataset[Any]:
        found = self._dataset if given is None else given
        if found is None:
            raise ArgumentError("data", None, "the training dataset", "Pass data=train_dataset.")
        return found

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
            certify: seconds that the search for a certificate may take, True: a minute, False: none.
            accept: "worse" takes a step that raises the robust objective; None refuses it.
            method: how the step is made of stored sums; default :class:`lightning_muter.MUter`.
            solver: None takes the callback's.
            dry_run: compute everything, change nothing.
            progress: show a bar; None: as ``verbose`` and the trainer of the fit have it.

        Returns:
            what was done, and how near it is: ``print`` it.

        Raises:
            UnsuitableError: there is no snapshot; the message says why.
            MuterError: all others of :func:`lightning_muter.unlearn`. Model and snapshot are as they were.
        """
        snapshot = self._at_hand()
        dataset = self._data(data if data is not None else retain)
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
            progress=self.verbose and self._bars if progress is None else progress,
        )
        if not dry_run:
            remember(model, Forgotten.of(snapshot))
            self._door.record |= Forgotten.of(snapshot)
            self._files.changed(model, [result])
        return result

    def refresh(self, model: pl.LightningModule, data: Dataset[Any] | None = None) -> Stored:
        """A new snapshot of the retained samples at the current weights: nothing computed at the old ones remains.

        Args:
            model: with the weights the snapshot belongs to, or trained further on the retained rows.
            data: the full training dataset, if it is another object than that of the fit.

        Returns:
            the new snapshot, which requests use from now on; :meth:`save` writes it.
        """
        dataset = self._data(data)
        self.snapshot = refresh(
            model,
            self._at_hand(),
            dataset,
            progress=self.verbose and self._bars,
            loss=self.loss,
            collate=self._collate,
            inputs=self.inputs,
            label=self.label,
        )
        self._files.changed(model)
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
        if self.snapshot is None and not self._door.record:
            self._at_hand()
        return retained_of(dataset, self._door.record, self.snapshot, self._collate)

    def save(self, path: str | Path | None = None) -> Path:
        """Bring model, snapshot and what was requested to the disk: checkpoint, snapshot and ledger in one transaction.

        Args:
            path: `<name>.muter.snapshot` or `<name>.ckpt`; by default where the fit wrote its files.

        Returns:
            The snapshot's path; checkpoint, ledger, receipts and key lie beside it.

        Raises:
            MismatchError: the files were changed since by somebody else, or the model was trained further.
        """
        return self._files.save(self._at_hand(), path)
