"""The subcommands of `muter` that need a model and its training data: snapshot, unlearn, refresh.

They are methods of a Trainer, as LightningCLI wants it; each is one transaction (:mod:`lightning_muter.deletion.transactions`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_muter.deletion.authority import current, key_of, record_of, refuse_other_rows
from lightning_muter.deletion.chain import ANEW
from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.gate import Watch, test_batches
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.ledger_access import check_agreement, fork, ledgers_near, open_ledger, reading
from lightning_muter.deletion.lost_key import new_key, under_new_key
from lightning_muter.deletion.options import SnapshotOptions, UnlearnOptions
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
from lightning_muter.deletion.training_data import (
    load_into,
    refreshed,
    taken,
    training_data,
)
from lightning_muter.deletion.transactions import exclusive
from lightning_muter.errors import UnsuitableError
from lightning_muter.forgotten.modules import remember, remember_instead
from lightning_muter.forgotten.rows import Forgotten
from lightning_muter.preflight.check import check
from lightning_muter.snapshot.stored import Stored
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
        **options: Any,
    ) -> None:
        """Store beside a checkpoint what unlearning needs to know; works for checkpoints trained by any script.

        Writes <stem>.muter.ckpt (the weights made stationary), <stem>.muter.snapshot, a key and a ledger; the
        checkpoint itself is not touched.

        Args:
            model: the module whose weights the checkpoint holds.
            ckpt_path: the checkpoint.
            datamodule: provides the training data, as in fit.
            options: of :class:`lightning_muter.deletion.options.SnapshotOptions`.
        """
        said = SnapshotOptions(**options)
        source, places = Places.of(ckpt_path), Places.of(said.out or ckpt_path)
        path = Path(ckpt_path)
        request_id = checked_request_id(said.request_id, "snapshot")
        with (
            exclusive(places, wait=said.wait, say=_say),
            open_ledger(places) as ledger,
            _looking(source, places) as there,
            ledgers_near(path) as near,
        ):
            if repeated(places, ledger, request_id, said.asked()):
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
                if old is not None and same_rows and said.scope in ("head", old.scope):
                    # Trained further, on what is retained: the list of forgotten rows stays, and so do the settings.
                    snapshot = refreshed(self, model, old, data, said.loss, said.batch_size)
                else:
                    snapshot = taken(self, model, checkpoint, data, said, key)
                content = receipt_content("snapshot", request_id, snapshot, before, model)
                if record and not same_rows:
                    content["metrics"]["counting"] = ANEW
                receipt = commit(places, ledger, content, checkpoint, model, snapshot, said.asked(), key)
                report(places, receipt, source)

    def unlearn(
        self,
        model: L.LightningModule,
        ckpt_path: str,
        datamodule: L.LightningDataModule | None = None,
        forget: ForgetConfig = ForgetConfig(),  # noqa: B008  (LightningCLI shows it as the default)
        **options: Any,
    ) -> None:
        """Remove rows of the training data from a model: all of a request or nothing of it, with a receipt.

        Args:
            model: the module whose weights the checkpoint holds.
            ckpt_path: the checkpoint (<name>.ckpt or <name>.muter.ckpt) that a snapshot was taken of.
            datamodule: provides the training data, the same rows in the same order as for the snapshot.
            forget: whom or what to forget.
            options: of :class:`lightning_muter.deletion.options.UnlearnOptions`.
        """
        said = UnlearnOptions(**options)
        source = Places.of(ckpt_path)
        places = Places.of(said.out) if said.out is not None else source
        request_id = checked_request_id(said.request_id, "unlearn")
        with _at_work(source, places, said.dry_run, said.wait) as ledger:
            insist_on_snapshot(places if not said.dry_run else source)
            here = source if said.dry_run else places
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
            watch = Watch.of(said.gate, model, snapshot, said.accept_held)
            result = unlearn(
                model,
                snapshot,
                forget=rows.indices,
                data=data.dataset,
                retain=data.dataset if said.reads_retained else None,
                collate=data.collate,
                progress=self.progress_bar_callback is not None,
                **said.request(),
            )
            if watch is not None:
                watch.judge(model, result, data.dataset, test_batches(datamodule), loss=said.loss, collate=data.collate)
            content = receipt_content("unlearn", request_id, snapshot, before, model, result, rows.digests(key))
            if said.dry_run:
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
            snapshot = refreshed(self, model, old, data, loss, batch_size)
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


def _lineage(source: Places, places: Places, there: Ledger | None, here: Ledger) -> tuple[Forgotten, Stored | None]:
    """What was forgotten of the model that a snapshot is taken of, and the snapshot there is."""
    record, old = record_of(places, here)
    if source == places:
        return record, old
    of_source, theirs = record_of(source, there)
    return record | of_source, old or theirs


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
