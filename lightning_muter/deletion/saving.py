"""What a callback holds in memory, brought to the disk as the command line does it: one transaction, entered in the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L

from lightning_muter.deletion.chain import ANEW
from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger_access import check_agreement, open_ledger
from lightning_muter.deletion.request_flow import commit, known_key, receipt_content
from lightning_muter.deletion.requests import asked_digest, new_request_id
from lightning_muter.deletion.transactions import exclusive
from lightning_muter.errors import MismatchError
from lightning_muter.snapshot.stored import Stored
from lightning_muter.storage.fingerprint import DigestKey
from lightning_muter.unlearning.result import UnlearnResult


def save_requests(
    places: Places,
    model: L.LightningModule,
    snapshot: Stored,
    results: Sequence[UnlearnResult],
    *,
    before: str,
    base: Mapping[str, Any],
    wait: float = 0.0,
) -> dict[str, Any]:
    """Enter what was done to a model since its files were written: requests, or a refresh. Returns the receipt.

    Args:
        results: the requests since then; none: a refresh, or the first snapshot.
        before: fingerprint of the weights that the files hold, where there are any.
        base: hyperparameters and counters for a first checkpoint.

    Raises:
        MismatchError: the files hold other weights, or model and snapshot do not belong together.
    """
    snapshot.check_model(model)
    with exclusive(places, wait=wait), open_ledger(places) as ledger:
        key = _own_key(places, snapshot) if not len(ledger) else known_key(places, ledger)
        if key.key_id != snapshot.key_id:
            raise MismatchError(f"{places.key}: another key than this snapshot's ({snapshot.key_id}).")
        checkpoint: Mapping[str, Any] = base
        exists = places.checkpoint.exists()
        if exists:
            checkpoint = load_checkpoint(places.checkpoint)
            check_agreement(places, ledger)
            if (found := checkpoint_fingerprint(checkpoint)) != before:
                raise MismatchError(
                    f"{places.checkpoint}: it holds weights {found[:16]}…, those that the requests in memory began with were "
                    f"{before[:16]}…: other requests were carried out on the files meanwhile. Load the files and ask again."
                )
        kind = "unlearn" if results else "refresh" if exists else "snapshot"
        request_id = new_request_id(kind)
        content = receipt_content(kind, request_id, snapshot, before, model, _together(results))
        asked = asked_digest(kind, {"indices": sorted(content["forgotten"])} if results else {})
        return commit(places, ledger, content, dict(checkpoint), model, snapshot, asked, key)


def save_fit(
    places: Places, model: L.LightningModule, snapshot: Stored, checkpoint: Mapping[str, Any], before: str
) -> dict[str, Any]:
    """Enter the snapshot at the end of a fit in the ledger there is; positions count in its training set from now on."""
    snapshot.check_model(model)
    with exclusive(places), open_ledger(places) as ledger:
        key = known_key(places, ledger)
        content = receipt_content("snapshot", new_request_id("snapshot"), snapshot, before, model)
        last = ledger.last()
        if last is not None:
            content["metrics"]["counting"] = ANEW
        return commit(places, ledger, content, checkpoint, model, snapshot, asked_digest("snapshot", {}), key)


def _own_key(places: Places, snapshot: Stored) -> DigestKey:
    if snapshot.key is None:
        raise MismatchError(f"{places.key}: the key {snapshot.key_id} of this snapshot is not at hand. Restore it.")
    snapshot.key.keep(places.key)
    return snapshot.key


def _together(results: Sequence[UnlearnResult]) -> UnlearnResult | None:
    """Several requests as one receipt: all their rows, the figures of the last."""
    if not results:
        return None
    rows = [row for result in results for row in result.forgotten]
    seconds = sum(result.seconds for result in results)
    return replace(results[-1], forgotten=rows, seconds=seconds, fingerprint_before=results[0].fingerprint_before)
