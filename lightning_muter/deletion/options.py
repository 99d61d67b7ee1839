"""The options of `muter snapshot` and `muter unlearn` besides model, data and checkpoint; their texts are what `--help` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.response.choose import Response
from lightning_muter.deletion.gate import Gate
from lightning_muter.deletion.requests import asked_digest
from lightning_muter.scope.head_methods import Method
from lightning_muter.solvers.base import Solver
from lightning_muter.unlearning.unlearn import CERTIFY_SECONDS

#: Options that are of the command alone.
_OF_COMMAND = ("gate", "accept_held", "out", "request_id", "wait")


@dataclass(frozen=True)
class SnapshotOptions:
    """What a snapshot is of, and where it goes.

    Args:
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

    threat_model: ThreatModel | None = None
    scope: str | list[str] = "head"
    response: str | Response = "auto"
    curvature: Literal["hessian", "ggn", "fisher"] | None = None
    loss: Callable[..., torch.Tensor] | None = None
    weight_decay: float | Literal["auto"] = "auto"
    polish: int | Literal["auto"] = "auto"
    budget: float | Literal["auto"] | None = "auto"
    batch_size: int = 1024
    out: str | None = None
    request_id: str | None = None
    wait: float = 0.0

    def training(self) -> dict[str, Any]:
        """What goes to :func:`lightning_muter.take_snapshot` as it is."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OF_COMMAND}

    def asked(self) -> str:
        """The digest of what is asked for, by which the same request is known again."""
        told = {"scope": self.scope, "response": str(self.response), "curvature": self.curvature or "hessian"}
        return asked_digest("snapshot", told)


@dataclass(frozen=True)
class UnlearnOptions:
    """How a request is carried out, and where its result goes.

    Args:
        method: how; the constraint-aware MUter by default.
        solver: how the linear system is solved: auto, cholesky, cg, neumann, schur or a Solver.
        refine: further steps with the retained data, each closer to retraining (beyond the head: of Newton-CG).
        within: refine until the certified distance to retraining is below this, else refuse. `muter publish` needs it;
            choose it before you see any request, and keep to it.
        accept: worse takes a step that raises the robust objective; without it such a step is refused.
        certify: measure the result on the retained data: stationarity, and a certificate for linear models, looked
            for in about so many seconds of a processor; true: as long as a tight one may take (a minute); false: the
            retained data are not read (unless refined, or the scope is wider than the head, where every request
            reads them).
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

    method: Method | None = None
    solver: str | Solver = "auto"
    refine: int = 0
    within: float | None = None
    accept: Literal["worse"] | None = None
    certify: bool | float = CERTIFY_SECONDS
    gate: Gate | None = None
    accept_held: bool = False
    loss: Callable[..., torch.Tensor] | None = None
    batch_size: int = 1024
    dry_run: bool = False
    out: str | None = None
    request_id: str | None = None
    wait: float = 0.0

    def request(self) -> dict[str, Any]:
        """What goes to :func:`lightning_muter.unlearn` as it is."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OF_COMMAND}

    @property
    def reads_retained(self) -> bool:
        """Whether anything is asked for that only the retained rows tell."""
        return bool(self.refine or self.certify or self.within is not None)
