"""What a module's own training step says of its objective: where the input is, which rows enter how, what the loss on the head is.

    training step --(head's output replaced by z, traced)--> L(z, leaves) --(cut into rows)--> phi_i, d_i
                  --(stopped at the head)-----------------> phi(x)

Nothing is looked up by name. Everything that is read off is compared with the step itself, on batches of two sizes, at the weights at
hand and at moved ones, before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_muter.errors import ArgumentError, UnsuitableError
from lightning_muter.model.head import CutLayer, Head, features
from lightning_muter.model.known_losses import Known
from lightning_muter.model.leaves import flatten, rows
from lightning_muter.model.losses import Loss
from lightning_muter.model.normalization import Normalization
from lightning_muter.model.replay import prepared, replaying
from lightning_muter.model.row_loss import packed
from lightning_muter.model.rowwise import BatchLoss, Denominator, Probe, Shares, masses


class Rows(NamedTuple):
    """Some samples as the objective sees them: inputs, labels, c_i and d_i (n,) in F = sum c_i l_i + (sum d_i / 2) lambda |w|^2."""

    x: Tensor
    y: Tensor
    weight: Tensor
    mass: Tensor


class Settled(NamedTuple):
    """c_i and d_i of every row where they are known already (of a snapshot); None: all are 1."""

    weight: Tensor | None
    mass: Tensor | None


@dataclass(frozen=True)
class Layout:
    """Where the step finds its input among the leaves of a batch, and which leaves its loss depends on."""

    names: list[str]
    input: int
    labels: list[int]

    def fits(self, batch: Any) -> bool:
        return flatten(batch)[0] == self.names

    def probe(self, batch: Any) -> tuple[Probe, Callable[[Tensor], Any]]:
        """The leaves as rows, and what puts other inputs in their place."""
        names, leaves, rebuild = flatten(batch)
        if names != self.names:
            raise ArgumentError("batch", names, f"the structure of the first batch, {self.names}")
        n = len(leaves[self.input])
        at = self.input
        return Probe(leaves, n), lambda new: rebuild([new if i == at else v for i, v in enumerate(leaves)])


@dataclass
class Reading:
    """What was read off.

    Attributes:
        run: the step as a function of a batch.
        loss: per row, ``loss(z, y, reduction="none")`` of the head's output z.
        identity: the same for the same loss, whoever reads it.
        batch_loss: L(z, leaves) of the step.
        known: the closed form that the rows are multiples of, if any.
        reference: a row that others' denominators are told against.
        direct: ``module(x)`` reaches the head as the step does.
        plain: cross-entropy of ``module(x)`` is this loss (what attack libraries climb).
        convex: in the head's output.
        normalization: of the batch's inputs; x everywhere here is in the scale of the data.
        uniform: c_i of the first rows, where it is the same for all of them and each counts once.
        penalty: lambda by parameter name, of an L2 penalty that the step adds by itself.
    """

    module: nn.Module
    run: Callable[[Any], Tensor]
    head: CutLayer
    layout: Layout
    loss: Loss
    identity: str
    batch_loss: BatchLoss
    denominator: Denominator
    reference: Probe
    example: Any
    known: Known | None = None
    direct: bool = True
    plain: bool = False
    convex: bool = True
    uniform: float | None = None
    settled: Settled | None = None
    normalization: Normalization | None = None
    rows_per_step: int | None = None
    notes: list[str] = field(default_factory=list)
    penalty: dict[str, float] = field(default_factory=dict)

    @property
    def linear_head(self) -> Head:
        """The head, where one was asked for.

        Raises:
            UnsuitableError: it was read for a whole network, whose head is no linear layer.
        """
        if not isinstance(self.head, Head):
            raise UnsuitableError(
                f"What was read is cut at the output of {self.head.name!r}, which is no linear head: it is of a whole network. Pass "
                "scope='all', or read the objective without whole=True."
            )
        return self.head

    def of_rows(self, positions: Sequence[int]) -> Reading:
        """The same of some rows alone, counted from 0 then."""
        if self.settled is None:
            return self
        at = torch.as_tensor(positions, dtype=torch.int64)
        return replace(self, settled=Settled(*(None if v is None else v[at] for v in self.settled)))

    # -- samples -----------------------------------------------------------------------------------------------------

    def prepared(self, batch: Any) -> Any:
        """The batch as the step receives it, on the module's device."""
        return prepared(self.module, batch)

    def split(self, batch: Any) -> tuple[Tensor, Tensor, Callable[[Tensor], Any]]:
        """Inputs, labels and what puts other inputs in their place, of a batch as the step receives it."""
        probe, rebuild = self.layout.probe(batch)
        x, of = probe.leaves[self.layout.input], self.normalization
        if of is None:
            return x, self.labels(probe), rebuild
        return of.to_data(x), self.labels(probe), lambda new: rebuild(of.to_model(new))

    def labels(self, probe: Probe) -> Tensor:
        return self.known.label(probe.leaves) if self.known is not None else packed(probe, self.layout.labels)

    def rows(self, batch: Any) -> Rows:
        """Samples of a batch as collated: labels in the form that :attr:`loss` takes, c_i and d_i.

        Raises:
            UnsuitableError: the loss of some row is not what the first rows' was.
        """
        batch = self.prepared(batch)
        y, weight, mass = self.weighed(self.layout.probe(batch)[0])
        return Rows(self.split(batch)[0], y, weight, mass)

    def weighed(self, probe: Probe) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, c_i and d_i of some rows."""
        y = self.labels(probe)
        dtype = algebra(y.device)
        if self.uniform is not None and getattr(self.batch_loss, "by_row", False):  # replayed: its rows are not asked
            every = torch.ones(probe.n, dtype=dtype, device=y.device)
            return y, self.uniform * every, self._each * every
        mass, active = self._masses(probe, y.device, dtype)
        weight = torch.ones_like(mass) if self.denominator == "sum" else mass.clone()
        if self.known is not None:
            found = self.known.factors(self.batch_loss, probe, active, dtype)
            if found is None:
                raise UnsuitableError(
                    f"The loss is {self.identity} in the first rows but not in all: training_step treats some rows in another "
                    "way. Use one loss for all rows."
                )
            weight = weight * rounded(found)
        return y, weight, mass

    @property
    def _each(self) -> float:
        """d_i where it is the same for all rows."""
        return 1.0 / (self.rows_per_step or 1) if self.denominator == "sum" else 1.0

    def _masses(self, probe: Probe, device: torch.device, dtype: torch.dtype) -> Shares:
        if self.denominator == "sum":
            every = torch.full((probe.n,), self._each, dtype=dtype, device=device)
            return Shares(every, torch.ones_like(every, dtype=torch.bool))
        found = masses(self.batch_loss, probe, self.reference, self.head.outputs, dtype, device)
        return Shares(rounded(found.values), found.active)

    # -- the model as the step runs it ---------------------------------------------------------------------------------

    def features(self, x: Tensor, values: dict[str, Tensor] | None = None) -> Tensor:
        """phi(x) (n, f), the head's input, with its graph; ``values``: of parameters and buffers, in place of the module's own."""
        return self._features(x if self.normalization is None else self.normalization.to_model(x), values)

    def _features(self, x: Tensor, values: dict[str, Tensor] | None) -> Tensor:
        if self.direct:
            return features(self.module, self.head, x.clone(), values)  # a layer may work in place
        if values is not None:
            found: Tensor = functional_call(_ToTheHead(self), {f"module.{n}": v for n, v in values.items()}, (x,))
            return found
        taken: list[Tensor] = []

        def stop(phi: Tensor) -> None:
            taken.append(phi)
            raise _AtTheHeadError

        handle = self.head.when_reached(stop)
        token = replaying.set(True)
        try:
            self.run(self._batch_of(x))
        except _AtTheHeadError:
            pass
        finally:
            replaying.reset(token)
            handle.remove()
        if not taken:
            raise UnsuitableError(f"training_step did not reach the head {self.head.name!r} with these inputs.")
        return taken[0]

    def logits(self, x: Tensor) -> Tensor:
        """z (n, K), the head's output where the step runs on x, with its graph."""
        return self.head.logits(self.features(x))

    def _batch_of(self, x: Tensor) -> Any:
        """A batch with these inputs; the other leaves, which phi does not depend on, are the example's, repeated."""
        _, leaves, rebuild = flatten(self.example)
        n = len(leaves[self.layout.input])
        at = torch.arange(len(x)) % n
        filled = [leaf[at.to(leaf.device)] if rows(leaf, n) else leaf for leaf in leaves]
        filled[self.layout.input] = x.clone()  # the step may work in place
        return rebuild(filled)


class _ToTheHead(nn.Module):
    """phi as a module's forward."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.module = reading.module
        self._to_the_head = reading._features

    def forward(self, x: Tensor) -> Tensor:
        return self._to_the_head(x, None)


class _AtTheHeadError(BaseException):
    """Ends a step at its head; no ``except Exception`` of a user stops it."""


def rounded(values: Tensor) -> Tensor:
    """Numbers told by a quotient of gradients, the rounding of simple ones taken back."""
    near = 1e-9 if values.dtype == torch.float64 else 1e-4
    whole = values.round()
    return torch.where((values - whole).abs() < near, whole, values).to(torch.float64)


def algebra(device: torch.device) -> torch.dtype:
    """The precision of linear algebra on a device: float64 where it has it."""
    return torch.float32 if device.type == "mps" else torch.float64
