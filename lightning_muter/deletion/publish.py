"""`muter publish`: weights with noise for the world to see, and the ledger's account of what all of them are worth.

The receipt is entered before the file gets its name: a release that nobody has seen may be counted, never the other way round.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.ledger_access import check_agreement, open_ledger
from lightning_muter.deletion.receipts import content_of_files
from lightning_muter.deletion.request_flow import insist_on_snapshot, known_key
from lightning_muter.deletion.requests import asked_digest, new_request_id
from lightning_muter.deletion.transactions import commit_request, exclusive
from lightning_muter.errors import ArgumentError, RequestError
from lightning_muter.publication.gaussian import composed_epsilon, gaussian_sigma
from lightning_muter.publication.publish import with_noise
from lightning_muter.storage.atomic import STAGE, beside, fsync_folder, half_written, write_new
from lightning_muter.storage.fingerprint import weight_fingerprint


def publish_command(
    ckpt_path: str,
    out: str,
    *,
    eps: float = 1.0,
    delta: float = 1e-5,
    limit: float | None = None,
    small: int = 20,
    wait: float = 0.0,
) -> int:
    """Write the current weights with noise to ``out`` and enter the release in the ledger; 0 when it is done.

    Args:
        limit: refuse where the eps of all releases together, at ``delta``, would exceed this.
        small: warn where fewer rows than this were forgotten since the last release.
    """
    places, target = Places.of(ckpt_path), Path(out)
    if target.exists():
        raise ArgumentError("out", out, "a file that does not exist yet", "A release is never replaced in silence.")
    insist_on_snapshot(places)
    with exclusive(places, wait=wait, say=lambda line: print(f"recovery: {line}")), open_ledger(places) as ledger:
        check_agreement(places, ledger)
        request = _certified_request(places, ledger)
        checkpoint = load_checkpoint(places.checkpoint)
        within, names = float(request["metrics"]["within"]), list(request["metrics"]["parameters"])
        sigma = gaussian_sigma(within, eps, delta)
        earlier = releases(ledger)
        spent = [(float(r["metrics"]["within"]), float(r["metrics"]["sigma"])) for r in earlier]
        together = composed_epsilon([*spent, (within, sigma)], delta)
        if limit is not None and together > limit:
            raise RequestError(
                f"limit: {len(earlier) + 1} releases together are worth eps={together:.3g} at delta={delta:g}, above {limit:g}. "
                "Release less often, ask for a smaller --within, or allow more."
            )
        warnings = _leaks(ledger, earlier, small)
        noisy = with_noise(checkpoint["state_dict"], names, sigma)
        content = {"state_dict": noisy, "pytorch-lightning_version": checkpoint.get("pytorch-lightning_version", "")}
        metrics = {
            "eps": eps, "delta": delta, "sigma": sigma, "within": within, "parameters": names, "releases": len(earlier) + 1,
            "eps_together": together, "delta_together": delta, "request": request["id"], "name": target.name,
            "fingerprint": weight_fingerprint(noisy),
        }  # fmt: skip
        _write(places, ledger, target, content, metrics, warnings, checkpoint_fingerprint(checkpoint))
    print(f"published: {target}, sigma {sigma:.3g} on {', '.join(names)}")
    print(
        f"this release: eps {eps:g}, delta {delta:g}; all {len(earlier) + 1} together: eps {together:.3g}, delta {delta:g}"
    )
    for warning in warnings:
        print(f"note: {warning}")
    return 0


def releases(ledger: Ledger) -> list[dict[str, Any]]:
    """The receipts of all releases, oldest first."""
    return [receipt for receipt in ledger.receipts() if receipt["kind"] == "publish"]


def _certified_request(places: Places, ledger: Ledger) -> dict[str, Any]:
    """The request that left the current weights, if its distance to retraining was fixed beforehand and reached."""
    changes = [r for r in ledger.receipts() if r["kind"] in ("unlearn", "refresh", "snapshot")]
    last = changes[-1] if changes else None
    if last is not None and last["kind"] == "refresh" and len(changes) > 1 and _same_weights(last):
        last = changes[-2]
    metrics = {} if last is None else last["metrics"]
    if last is None or last["kind"] != "unlearn" or metrics.get("within") is None or not metrics.get("parameters"):
        raise RequestError(
            f"{places.checkpoint}: the last request was not made with a distance fixed beforehand, so there is no sigma to publish "
            "with. Ask with `muter unlearn … --within 1e-3`."
        )
    return last


def _same_weights(receipt: Mapping[str, Any]) -> bool:
    return receipt["checkpoint"]["fingerprint_before"] == receipt["checkpoint"]["fingerprint_after"]


def _leaks(ledger: Ledger, earlier: list[dict[str, Any]], small: int) -> list[str]:
    """A warning where the difference to the release before shows what few rows were removed in between."""
    if not earlier:
        return []
    since = sum(len(r["forgotten"]) for r in ledger.receipts() if r["number"] > earlier[-1]["number"])
    if not 0 < since < small:
        return []
    rows = "1 row was" if since == 1 else f"{since} rows were"
    return [
        f"only {rows} forgotten since release {earlier[-1]['id']!r}: the difference of the two shows what they were, "
        "as far as noise does not hide it (the eps here is against retraining, not against the release before). Gather "
        "requests, withdraw the earlier release, or measure it with lightning_muter.publication.leak."
    ]


def _write(
    places: Places,
    ledger: Ledger,
    target: Path,
    content: Mapping[str, Any],
    metrics: dict[str, Any],
    warnings: list[str],
    fingerprint: str,
) -> None:
    last, half = ledger.last(), beside(target, STAGE)
    assert last is not None  # a certified request
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in half_written(target.parent, [target.name]):  # of an attempt that died
        left.unlink(missing_ok=True)
    try:
        metrics["sha256"] = write_new(half, functools.partial(torch.save, dict(content))).sha256
        receipt = content_of_files(
            "publish", new_request_id("publish"), last, metrics, method="gaussian", fingerprints=(fingerprint, fingerprint),
            warnings=warnings,
        )  # fmt: skip
        asked = asked_digest("publish", {"fingerprint": metrics["fingerprint"]})
        commit_request(places, ledger, receipt, {}, asked=asked, key=known_key(places, ledger))
        os.replace(half, target)
        fsync_folder(target.parent)
    finally:
        half.unlink(missing_ok=True)
