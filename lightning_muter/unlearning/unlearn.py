"""Unlearning: a request is checked, its scope proposes, weights and snapshot switch together. All of it or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from lightning_muter.called_with import called_with
from lightning_muter.errors import ArgumentError
from lightning_muter.forgotten.digests import check_digests
from lightning_muter.forgotten.modules import check_remembered, remember
from lightning_muter.forgotten.rows import Forgotten, barred_after
from lightning_muter.model.distributed import Shards
from lightning_muter.model.modes import full_precision
from lightning_muter.scope.base import Removal
from lightning_muter.scope.choose import scope_of
from lightning_muter.scope.head_methods import Method
from lightning_muter.snapshot.ranks import ranks_agree
from lightning_muter.snapshot.remarks import warn
from lightning_muter.snapshot.reread import Access, check_given
from lightning_muter.snapshot.stored import Stored
from lightning_muter.solvers.base import Solver
from lightning_muter.unlearning.commit import adopter, commit
from lightning_muter.unlearning.positions import checked_positions
from lightning_muter.unlearning.result import UnlearnResult

#: For how long a certificate is looked for unless somebody asks for more.
CERTIFY_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class Unlearn(Access):
    """What :func:`unlearn` is asked for."""

    model: nn.Module
    snapshot: Stored
    forget: Iterable[int]
    data: Dataset[Any] | None = None
    _: KW_ONLY
    method: Method | None = None
    solver: str | Solver = "auto"
    retain: Dataset[Any] | None = None
    refine: int = 0
    within: float | None = None
    certify: bool | float = CERTIFY_SECONDS
    accept: str | None = None
    dry_run: bool = False
    shards: Shards | None = None
    progress: bool = True

    @property
    def seconds(self) -> float | None:
        """How long a certificate may be looked for; None: not at all.

        Raises:
            ArgumentError: ``certify`` is neither True, False nor a number of seconds.
        """
        if isinstance(self.certify, bool):
            return 60.0 if self.certify else None
        if not (isinstance(self.certify, (int, float)) and 0 < self.certify < math.inf):
            raise ArgumentError("certify", self.certify, "True, False or a number of seconds above 0")
        return float(self.certify)


@ranks_agree
@torch.inference_mode(False)
@full_precision()
@called_with(Unlearn)
def unlearn(asked: Unlearn) -> UnlearnResult:
    """Remove samples from a trained model: on success model and snapshot hold the new state, else the old one.

    A `Snapshot` is of the head and needs the rows to forget alone. A `WideSnapshot` (any subset of the parameters) reads the
    retained rows too, from ``retain`` or else ``data``, and takes 1 + ``refine`` Newton-CG steps.

    Args:
        model: with the weights the snapshot belongs to.
        snapshot: of this model; it too holds the state after the request.
        forget: positions in the training dataset.
        data: the training dataset (the rows to forget are read, and a few others to recognise the model's form); None takes
            ``retain``.
        method: default :class:`lightning_muter.scope.head_methods.MUter`.
        solver: "auto", "cholesky", "cg", "neumann", "schur" or a Solver.
        retain: the full training dataset again: allows ``refine``, stationarity and the certificate. Rows forgotten now
            or before are not read.
        refine: accepted steps of L-BFGS on the retained objective in the metric of the total Hessian, which is taken anew
            where the request went too far for the stored one (a whole class).
        within: refine until the certified distance to retraining is below this, else refuse. For
            :func:`lightning_muter.publish`: fix it before you see any request.
        certify: with ``retain``, look for a certificate (linear models): for about so many seconds of a processor beyond a first
            look at every sample, half of them for passes of retraining on from the new weights where that is quick or the bound is
            loose (their end only measures how far these are: :mod:`lightning_muter.unlearning.certified`); True: a minute; False: not
            at all.
        accept: "worse" takes the step even where it raises the robust objective of the retained rows (known with ``retain``), or
            where most of it is owed to a snapshot that could not be made stationary. None refuses it.
        dry_run: compute everything, change nothing.
        loss: of the training, where it is not read off the module; as in :func:`lightning_muter.take_snapshot`.
        collate: the training loader's ``collate_fn``, where it had one of its own.
        batch_size: samples at a time.
        inputs: key or position in a batch, where it cannot be told which tensor is the input.
        label: the same for the label.
        shards: this process's share of the samples; None asks torch.distributed. Every process of the group makes the same
            call and gets the same weights; ``Shards()``: this one works alone.
        progress: show a bar on a terminal.

    Returns:
        What was done, and how near it is: ``print`` it.

    Raises:
        ArgumentError: an option out of range, or positions that are none of the dataset.
        RequestError: positions that were forgotten before, or nothing would be left.
        MismatchError: model, data or loss are not the snapshot's.
        SolveError: the system was not solved, ``within`` was not reached, or the step makes the model worse.
            After any error model and snapshot are as they were.

    >>> from torch.utils.data import TensorDataset
    >>> from lightning_muter import ThreatModel, take_snapshot
    >>> x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = TensorDataset(x, (x[:, 0] > 0.5).long())
    >>> model = nn.Linear(4, 2)
    >>> snapshot = take_snapshot(model, rows, threat_model=ThreatModel("l2", 0.05), weight_decay=1e-2, progress=False)
    >>> result = unlearn(model, snapshot, [3, 17], rows, retain=rows, refine=2, progress=False)
    >>> snapshot.forgotten, result.n_retained, result.bound < 1e-3
    ([3, 17], 28, True)
    """
    began = time.perf_counter()
    model, snapshot, retain, collate = asked.model, asked.snapshot, asked.retain, asked.collate
    data = _training_data(asked.data, retain)
    check_given(model, snapshot, data=data, retain=retain)
    positions = checked_positions(asked.forget, snapshot)
    if not (isinstance(asked.refine, int) and not isinstance(asked.refine, bool) and asked.refine >= 0):
        raise ArgumentError("refine", asked.refine, "a whole number, 0 or larger")
    scope = scope_of(snapshot)
    scope.check(asked)
    snapshot.check_length(data, "data")
    snapshot.check_model(model)
    check_remembered(model, snapshot)
    gone = set(positions)
    kept = [i for i in snapshot.retained_positions if i not in gone]
    reading = asked.reread(model, snapshot, data, sorted([*positions, *kept]))
    check_digests(snapshot, data, positions, "data", collate)
    if retain is not None:
        snapshot.check_length(retain, "retain")
        check_digests(snapshot, retain, kept, "retain", collate)
    elif snapshot.reads_retained:
        check_digests(snapshot, data, kept, "data", collate)
    proposal = scope.propose(Removal(model, snapshot, data, kept, reading, asked, positions))
    result, after = proposal.result, proposal.after
    after.barred = barred_after(snapshot, data, positions, collate)
    warn(proposal.said)
    commit(model, proposal.parameters, proposal.write, adopter(snapshot, after), result)
    if not asked.dry_run:
        remember(model, Forgotten.of(snapshot))
    result.seconds = time.perf_counter() - began
    return result


def _training_data(data: Dataset[Any] | None, retain: Dataset[Any] | None) -> Dataset[Any]:
    found = retain if data is None else data
    if found is None:
        advice = "The rows to forget are read from it: unlearn(model, snapshot, forget, train_dataset)."
        raise ArgumentError("data", None, "the training dataset", advice)
    return found
