"""The two kinds of snapshots: what is stored of a trained model so that samples can be removed later.

`Snapshot`      of the head: sums at its weights; a request reads the samples to forget alone

    M = sum D2 phi_i  (without lambda) at w_ref,      g = sum d phi_i  at w_base,      lambda, n, what was forgotten

`WideSnapshot`  of any subset of the parameters: nothing of the size p x p is stored; a request reads the retained samples

w_base is w_ref until a refinement moves it. What both share, and the file, is :mod:`lightning_muter.snapshot.stored`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.hessian.sums import BlockSymmetric
from lightning_muter.curvature.objective.network import WideCurvature
from lightning_muter.curvature.problem.network import parameters_in
from lightning_muter.errors import MismatchError
from lightning_muter.snapshot.stored import Stored, check_numbers

#: Samples at a time where derivatives of a whole network are taken.
WIDE_BATCH = 256


@dataclass(kw_only=True, repr=False)
class Snapshot(Stored):
    """Statistics of one trained head, tied to its weights, data and threat model.

    Attributes:
        theta_ref: weights [W | b], (K, q), at which ``hessian`` was summed.
        theta_base: where ``gradient`` was.
        gradient: of the samples that are left, (K, q), without weight decay.
        hessian: M of the samples that are left, (K q, K q) by blocks, without weight decay.
        decay: lambda per entry, (K, q).
        head_name: of the last linear layer in the model.
        curvature: direct part, "hessian", "ggn" or "fisher".
        starts: where the maximisers at theta_ref start, (n, 1 + m, D + 1) in float16: positions in units of eps and weights of
            the local maxima (nonlinear backbones).
        base_starts: the same at theta_base.

    Example::

        snapshot = Snapshot.load("run/model.muter.snapshot")
        print(snapshot)  # of what, which objective, how stationary, who was forgotten
        train_further = snapshot.retained(train_set)
    """

    theta_ref: Tensor
    theta_base: Tensor
    gradient: Tensor
    hessian: BlockSymmetric
    decay: Tensor
    head_name: str
    curvature: Curvature
    starts: Tensor | None = None
    base_starts: Tensor | None = None

    reads_retained = False

    @property
    def scope(self) -> str:
        """What may change: "head"."""
        return "head"

    def check(self) -> None:
        """Raise `ValueError` unless the fields, right in themselves, fit together."""
        super().check()
        k, q = self.theta_ref.shape
        tensors = {name: getattr(self, name) for name in ("theta_ref", "theta_base", "gradient", "decay")}
        for name, tensor in tensors.items():
            check_numbers(name, tensor, (k, q))
        blocks = self.hessian.blocks
        if (self.hessian.n_logits, self.hessian.width) != (k, q):
            raise ValueError("hessian is of another head")
        check_numbers("hessian", blocks, (k * (k + 1) // 2, q, q))
        if bool((self.decay < 0).any()):
            raise ValueError("decay is negative")
        for name in ("starts", "base_starts"):
            rows = getattr(self, name)
            if rows is not None:
                check_numbers(name, rows, (self.n_total, *rows.shape[1:]), (torch.float16,))


@dataclass(kw_only=True, repr=False)
class WideSnapshot(Stored):
    """The objective of a training, tied to weights and data; parameters by name instead of sums.

    Attributes:
        patterns: the scope as it was given, ``["all"]`` or patterns over parameter names.
        parameters: the names that it covers.
        decay: lambda by parameter name.
        trades_beta: of TRADES, None for plain adversarial training.
        curvature: direct part, "ggn" or "hessian".

    Example::

        snapshot = take_wide_snapshot(model, train_set, scope=["layer4.*", "fc.*"], threat_model=ThreatModel("linf", 8 / 255))
        unlearn(model, snapshot, [3, 17], train_set, refine=2)
    """

    patterns: list[str]
    parameters: list[str]
    decay: dict[str, float]
    curvature: WideCurvature
    trades_beta: float | None = None

    reads_retained = True
    beyond_head = True

    @property
    def scope(self) -> str:
        """What may change: the patterns, as they were given."""
        return ", ".join(self.patterns)

    def check_parameters(self, model: nn.Module) -> None:
        """Raise `MismatchError` unless the scope means the parameters of ``model`` that it meant when the snapshot was taken."""
        found = parameters_in(model, self.patterns)
        if found != self.parameters:
            other = sorted(set(found) ^ set(self.parameters))[:3]
            raise MismatchError(
                f"model: its scope {self.scope!r} covers {len(found)} trainable parameters, the snapshot's "
                f"{len(self.parameters)} (e.g. {other}). Freeze and unfreeze as in training, or take a new snapshot."
            )

    def check(self) -> None:
        """Raise `ValueError` unless the fields, right in themselves, fit together."""
        super().check()
        if not self.patterns or set(self.decay) != set(self.parameters):
            raise ValueError("scope, parameters and decay do not fit together")
        if not all(0 <= v < float("inf") for v in self.decay.values()):
            raise ValueError("decay is negative or not finite")
