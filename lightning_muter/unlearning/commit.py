"""Weights and snapshot switch together, or neither does."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from lightning_muter.snapshot.stored import Stored
from lightning_muter.storage.fingerprint import weight_fingerprint
from lightning_muter.unlearning.result import UnlearnResult


def commit(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    write: Callable[[], None],
    adopt: Callable[[str], None],
    result: UnlearnResult,
) -> None:
    """``write`` new values into ``parameters``, take the fingerprint, ``adopt`` the state that goes with it.

    On any failure, and for a dry run, the parameters go back to what they were.
    """
    before = [(p, p.detach().clone()) for p in parameters]
    done = False
    try:
        write()
        result.fingerprint_after = weight_fingerprint(model.state_dict())
        if not result.dry_run:
            adopt(result.fingerprint_after)
            done = True
    finally:
        if not done:
            with torch.no_grad():
                for p, value in before:
                    p.copy_(value)


def adopter(snapshot: Stored, after: Stored) -> Callable[[str], None]:
    """What makes ``snapshot`` the one after a request, once the fingerprint of the new weights is known."""

    def adopt(fingerprint: str) -> None:
        after.fingerprint = fingerprint
        snapshot.adopt(after)

    return adopt
