"""Snapshot files of version 0.1, as version 2 writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: What was named otherwise, of a head and of any other scope.
_NAMES = {"loss": "loss_name", "head": "head_name", "scope": "patterns"}


def from_format_1(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Version 1 listed settings by hand: head snapshots lack `tracking` and `finish` of the inner solver, others its `rivals`
    and the smoothing's temperature; these take their defaults, as they did when version 1 was read.
    """
    fields = {_NAMES.get(name, name): value for name, value in meta.items() if name != "version"}
    kept = {("smoothing.anchor" if name == "anchor" else name): tensor for name, tensor in tensors.items()}
    fields["forgotten"] = kept.pop("forgotten").tolist()
    options = dict(meta["response"])
    fields["response"] = {"name": options.pop("name"), "module": "lightning_muter", "settings": options}
    named: dict[str, Any] = {name: {"$tensor": name} for name in kept if "." not in name}
    if "smoothing.anchor" in kept:
        fields["smoothing"] = {**meta["smoothing"], "anchor": {"$tensor": "smoothing.anchor"}}
    if meta["scope"] == "head":
        del fields["patterns"]
        k, q = kept["theta_ref"].shape
        named["hessian"] = {"n_logits": k, "width": q, "blocks": named["hessian"]}
    return {"record": "Snapshot" if meta["scope"] == "head" else "WideSnapshot", "fields": fields | named}, kept
