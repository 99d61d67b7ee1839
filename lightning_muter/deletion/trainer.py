"""The subcommands of `muter` that need a model and its training data: snapshot, unlearn, refresh.

They are methods of a Trainer, as LightningCLI wants it; each is one transaction (:mod:`lightning_muter.deletion.transactions`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.response.choose import Response
from lightning_muter.deletion.authority import current, key_of, record_of, refuse_other_rows
from lightning_muter.deletion.chain import ANEW
from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.gate import Gate, Watch, test_batches
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.ledger_access import check_agreement, fork, ledgers_near, open_ledger, reading
from lightning_muter.deletion.lost_key import new_key, under_new_key
from lightning_muter.deletion.request_flow import (
    commit,
    forgotten_rows,
    insist_on_snapshot,
    known_key,
    load_snapshot,
    receipt_content,
    repeated,
    report,
    report_dry_run,
    snapshot_key,
    vouched,
)
from lightning_muter.deletion.requests import ForgetConfig, asked_digest, checked_request_id, refuse_forgotten, resolve
from lightning_muter.deletion.training_data import load_into, threat_of, trades_beta_of, trained_decay, training_data
from lightning_muter.deletion.transactions import exclusive
from lightning_muter.errors import UnsuitableError
from lightning_muter.forgotten.modules import remember, remember_instead
from lightning_muter.forgotten.rows import Forgotten
from lightning_muter.minimise.budget import Fit
from lightning_muter.preflight.check import check
from lightning_muter.scope.head_methods import Method
from lightning_muter.scope.wide_taking import take_wide_snapshot
from lightning_muter.snapshot.part import snapshot_of_rows
from lightning_muter.snapshot.refreshing import refresh
from lightning_muter.snapshot.snapshot import WIDE_BATCH, Snapshot, WideSnapshot
from lightning_muter.snapshot.summary import decay_text
from lightning_muter.snapshot.take import take_snapshot
from lightning_muter.solvers.base import Solver
from lightning_muter.unlearning.unlearn import unlearn


class MuterTrainer(L.Trainer):
    """A Trainer that also takes snapshots and honours deletion requests, from the command line."""

    def check(self, model: L.LightningModule, datamodule: L.LightningDataModule | None = None) -> None:
        """Say in seconds whether a fit with these options will end with a snapshot, what weakens it, and how long that takes.

        Nothing is trained and nothing is written. Findings block, prevent the snapshot, weaken it, or are good to know.

        Args:
            model: the module, as for fit.
            datamodule: the data, as for fit.
        """
        found = check(model, datamodule, trainer=self)
        print(found)
        if not found.ok:
            raise UnsuitableError("a fit with these options would end without a snapshot; the table says why")

    def snapshot(
        self,
        model: L.LightningModule,
        ckpt_path: str,
        datamodule: L.LightningDataModule | None = None,
        threat_model: ThreatModel | None = None,
        scope: str | list[str] = "head",
        response: str | Response = "auto",
        curvature: Literal["hessian", "ggn", "fisher"] | None = None,
        loss: Callable[..., torch.Tensor] | None = None,
        weight_decay: float | Literal["auto"] = "auto",
        polish: int | Literal["auto"] = "auto",
        budget: float | Literal["auto"] | None = "auto",
        batch_size: int = 1024,
        out: str | None = None,
        request_id: str | None = None,
        wait: float = 0.0,
    ) -> None:
        """Store beside a checkpoint what unlearning needs to know; works for checkpoints trained by any script.

        Writes <stem>.muter.ckpt (the weights made stationary), <stem>.muter.snapshot, a key and a ledger; the
        checkpoint itself is not touched.

        Args:
            model: the module whose weights the checkpoint holds.
            ckpt_path: the checkpoint.
            datamodule: provides the training data, as in fit.
            threat_model: norm, eps and box of the attack it was trained against; read off the module's
                configure_attack() or the AdversarialTraining callback when not given.
            scope: what unlearning changes: "head", the last linear layer, whose sums are stored; "all" or a list of
                patterns over parameter names, for which requests read the retained data instead.
            response: how the attack reacts to the weights: auto, none, unconstrained, l2, linf or a Response.
            curvature: the direct part: hessian, ggn or fisher; by default hessian for the head, ggn beyond it.
            loss: the training loss, callable(logits, y, reduction="none"); the module's criterion or cross-entropy.
            weight_decay: the optimiser's weight decay; "auto" reads it off the optimiser that the checkpoint holds, and
                off configure_optimizers() where it holds none.
            polish: steps of further minimisation until stationary (beyond the head "auto" takes none); 0 never touches
                the weights.
            budget: of polish and snapshot, in gradients per sample: auto, the larger of a tenth of the fit and three of its
                epochs; a share of the fit; or null, no limit.
            batch_size: samples at a time.
            out: write under this name (<name>.ckpt) instead of beside the checkpoint.
            request_id: your own id of this request; the same id again returns the first receipt.
            wait: seconds to wait for another process that works on the same files.
        """
        source, places = Places.of(ckpt_path), Places.of(out or ckpt_path)
        path = Path(ckpt_path)
        request_id = checked_request_id(request_id, "snapshot")
        asked = asked_digest(
            "snapshot", {"scope": scope, "response": str(response), "curvature": curvature or "hessian"}
        )
        with (
            exclusive(places, wait=wait, say=_say),
            open_ledger(places) as ledger,
            _looking(source, places) as there,
            ledgers_near(path) as near,
        ):
            if repeated(places, ledger, request_id, asked):
                return
            checkpoint = load_checkpoint(path)
            before = checkpoint_fingerprint(checkpoint)
            record, old = _lineage(source, places, there, ledger)
            record = current(path, checkpoint, record, (ledger, there, *near))
            data = training_data(self, model, datamodule)
            load_into(model, checkpoint, path)
            with snapshot_key(places, ledger, lambda: key_of(record, places, source) if record else None) as key:
                remember(model, record)
                same_rows = record and len(data.dataset) == record.n_total
                refuse_other_rows(record, old, data.dataset, data.collate)
                if old is not None and same_rows and scope in ("head", old.scope):
                    # Trained further, on what is retained: the list of forgotten rows stays, and so do the settings.
                    snapshot = refresh(model, old, data.dataset, loss=loss, collate=data.collate, batch_size=batch_size)
                else:
                    decay, read = (
                        trained_decay(checkpoint, model) if weight_decay == "auto" else (weight_decay, "given")
                    )
                    threat_model, attack = threat_of(self, model, threat_model)
                    wide = scope != "head"
                    take: Callable[..., Snapshot | WideSnapshot] = take_wide_snapshot if wide else take_snapshot
                    snapshot = snapshot_of_rows(
                        take,
                        model,
                        data.dataset,
                        data.rows(),
                        threat_model=threat_model,
                        attack=attack,
                        scope=scope,
                        response=response,
                        curvature=curvature or ("ggn" if wide else "hessian"),
                        loss=loss,
                        weight_decay=decay,
                        polish=polish,
                        collate=data.collate,
                        batch_size=min(batch_size, WIDE_BATCH) if wide else batch_size,
                        device=self.strategy.root_device,
                        key=key,
                        **_of_scope(self, model, checkpoint, wide, budget),
                    )
                    snapshot.figures["weight_decay_read"] = read
                    print(f"weight_decay: {decay_text(snapshot)}, {read}")
                content = receipt_content("snapshot", request_id, snapshot, before, model)
                if record and not same_rows:
                    content["metrics"]["counting"] = ANEW
                receipt = commit(places, ledger, content, checkpoint, model, snapshot, asked, key)
                report(places, receipt, source)

    def unlearn(
        self,
        model: L.LightningModule,
        ckpt_path: str,
        datamodule: L.LightningDataModule | None = None,
        forget: ForgetConfig = ForgetConfig(),  # noqa: B008  (LightningCLI shows it as the default)
        method: Method | None = None,
        solver: str | Solver = "auto",
        refine: int = 0,
        within: float | None = None,
        accept: Literal["worse"] | None = None,
        certify: bool = True,
        gate: Gate | None = None,
        accept_held: bool = False,
        loss: Callable[..., torch.Tensor] | None = None,
        batch_size: int = 1024,
        dry_run: bool = False,
        out: str | None = None,
        request_id: str | None = None,
        wait: float = 0.0,
    ) -> None:
        """Remove rows of the training data from a model: all of a request or nothing of it, with a receipt.

        Args:
            model: the module whose weights the checkpoint holds.
            ckpt_path: the checkpoint (<name>.ckpt or <name>.muter.ckpt) that a snapshot was taken of.
            datamodule: provides the training data, the same rows in the same order as for the snapshot.
            forget: whom or what to forget.
            method: how; the constraint-aware MUter by default.
            solver: how the linear system is solved: auto, cholesky, cg, neumann, schur or a Solver.
            refine: further steps with the retained data, each closer to retraining (beyond the head: of Newton-CG).
            accept: worse takes a step that raises the robust objective; without it such a step is refused.
            within: refine until the certified distance to retraining is below this, else refuse. `muter publish` needs it;
                choose it before you see any request, and keep to it.
            certify: measure the result on the retained data: stationarity, and a certificate for linear models. It
                costs about one pass over the data; without it the retained data are not read (unless refined, or the
                scope is wider than the head, where every request reads them).
            gate: measure accuracy on test (or validation) rows, and the step beside random requests; a request beyond its
                thresholds is held: nothing is written. `--gate lightning_muter.deletion.gate.Gate` takes the usual ones.
            accept_held: carry out what the gate would hold; the receipt says so.
            loss: the loss that the snapshot was taken with, if it was given there.
            batch_size: samples at a time.
            dry_run: compute everything, write nothing, say what would change.
            out: leave the checkpoint as it is and write the new one, with its own snapshot and ledger, under this name.
            request_id: your own id of this request, e.g. a ticket number; the same id again returns the first receipt.
            wait: seconds to wait for another process that works on the same files.
        """
        source = Places.of(ckpt_path)
        places = Places.of(out) if out is not None else source
        request_id = checked_request_id(request_id, "unlearn")
        with _at_work(source, places, dry_run, wait) as ledger:
            insist_on_snapshot(places if not dry_run else source)
            here = source if dry_run else places
            key = known_key(here, ledger)
            check_agreement(here, ledger)
            checkpoint = load_checkpoint(here.checkpoint)
            data = training_data(self, model, datamodule)
            rows = resolve(forget, len(data.dataset), datamodule)
            asked = asked_digest("unlearn", {"indices": rows.indices})
            if ledger is not None and repeated(here, ledger, request_id, asked):
                return
            snapshot = load_snapshot(here.snapshot, key, unsealed=vouched(ledger))
            record_of(here, ledger)
            refuse_forgotten(rows.indices, forgotten_rows(snapshot, ledger))
            load_into(model, checkpoint, here.checkpoint)
            model.to(self.strategy.root_device)
            before = checkpoint_fingerprint(checkpoint)
            watch = Watch.of(gate, model, snapshot, accept_held)
            result = unlearn(
                model,
                snapshot,
                forget=rows.indices,
                data=data.dataset,
                method=method,
                solver=solver,
                retain=data.dataset if refine or certify or within is not None else None,
                refine=refine,
                within=within,
                accept=accept,
                dry_run=dry_run,
                loss=loss,
                collate=data.collate,
                batch_size=batch_size,
            )
            if watch is not None:
                watch.judge(model, result, data.dataset, test_batches(datamodule), loss=loss, collate=data.collate)
            content = receipt_content("unlearn", request_id, snapshot, before, model, result, rows.digests(key))
            if dry_run:
                for line in rows.per_user(forget.show_ids):
                    print(line)
                report_dry_run(here, content)
                return
            assert ledger is not None
            receipt = commit(places, ledger, content, checkpoint, model, snapshot, asked, key)
            report(places, receipt, source)

    def refresh(
        self,
        model: L.LightningModule,
        ckpt_path: str,
        datamodule: L.LightningDataModule | None = None,
        loss: Callable[..., torch.Tensor] | None = None,
        batch_size: int = 1024,
        recover_key: bool = False,
        request_id: str | None = None,
        wait: float = 0.0,
    ) -> None:
        """Take a new snapshot of the retained data at the current weights: nothing computed at the old ones remains.

        Args:
            model: the module whose weights the checkpoint holds.
            ckpt_path: the checkpoint.
            datamodule: provides the training data, the same rows in the same order as before (all of them).
            loss: the loss that the snapshot was taken with, if it was given there.
            batch_size: samples at a time.
            recover_key: the key of the digests is lost for good: make a new one, and the digests anew from the data, once
                the stored sums have shown that these are the rows that were trained on. What was forgotten stays forgotten.
            request_id: your own id of this request; the same id again returns the first receipt.
            wait: seconds to wait for another process that works on the same files.
        """
        places = Places.of(ckpt_path)
        request_id = checked_request_id(request_id, "refresh")
        asked = asked_digest("refresh", {})
        with _at_work(places, places, False, wait) as ledger:
            assert ledger is not None
            if repeated(places, ledger, request_id, asked):
                return
            insist_on_snapshot(places)
            check_agreement(places, ledger)
            key = new_key(places) if recover_key else known_key(places, ledger)
            checkpoint = load_checkpoint(places.checkpoint)
            data = training_data(self, model, datamodule)
            load_into(model, checkpoint, places.checkpoint)
            model.to(self.strategy.root_device)
            before = checkpoint_fingerprint(checkpoint)
            if recover_key:
                old = under_new_key(places, model, data, key, loss, batch_size)
                remember_instead(model, Forgotten.of(old))
            else:
                old = load_snapshot(places.snapshot, key, unsealed=vouched(ledger))
                remember(model, record_of(places, ledger)[0])
            snapshot = refresh(model, old, data.dataset, loss=loss, collate=data.collate, batch_size=batch_size)
            snapshot.warnings += [warning for warning in old.warnings if warning not in snapshot.warnings]
            content = receipt_content("refresh", request_id, snapshot, before, model)
            receipt = commit(places, ledger, content, checkpoint, model, snapshot, asked, key)
            report(places, receipt, places)


@contextlib.contextmanager
def _looking(source: Places, places: Places) -> Iterator[Ledger | None]:
    """The source's ledger to look at, where it is another model's than the one written to."""
    if source == places:
        yield None
        return
    with reading(source) as seen:
        yield seen


def _lineage(
    source: Places, places: Places, there: Ledger | None, here: Ledger
) -> tuple[Forgotten, Snapshot | WideSnapshot | None]:
    """What was forgotten of the model that a snapshot is taken of, and the snapshot there is."""
    record, old = record_of(places, here)
    if source == places:
        return record, old
    of_source, theirs = record_of(source, there)
    return record | of_source, old or theirs


def _of_scope(
    trainer: L.Trainer, model: L.LightningModule, checkpoint: dict[str, Any], wide: bool, budget: Any
) -> dict[str, Any]:
    """What only one kind of snapshot is asked for with."""
    if wide:
        return {"trades_beta": trades_beta_of(trainer, model)}
    return {"budget": budget, "fit": Fit(float(checkpoint.get("epoch", 0)))}


@contextlib.contextmanager
def _at_work(source: Places, places: Places, dry_run: bool, wait: float) -> Iterator[Ledger | None]:
    """The ledger to write to, under lock; for a dry run the source's ledger (if any), to read."""
    if dry_run:
        with reading(source) as seen:
            yield seen
        return
    insist_on_snapshot(source)
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(source, wait=wait, say=_say))
        if places != source:
            stack.enter_context(exclusive(places, wait=wait, say=_say))
            stack.enter_context(fork(source, places))
        yield stack.enter_context(open_ledger(places))


def _say(line: str) -> None:
    print(f"recovery: {line}")
