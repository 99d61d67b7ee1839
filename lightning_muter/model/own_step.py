"""A step on one batch: run as it is, or with its head's output given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.head import HeadCall, record_calls
from lightning_muter.model.leaves import flatten
from lightning_muter.model.penalty import without
from lightning_muter.model.rowwise import Probe

_FEW = (6, 4)
WAY_OUT = (
    "Nothing was changed. Pass loss=callable(logits, y, reduction='none') to say what the head is to be trained on and "
    "unlearned in."
)

Run = Callable[[Any], Tensor]


@dataclass
class Seen:
    """One run of a step: its loss, its calls of linear layers in order, the leaves it was run with."""

    loss: Tensor
    calls: list[HeadCall]
    leaves: list[Any]


class OwnStep:
    """``run(batch) -> scalar`` of ``module`` on one batch; ``what``: its name in messages.

    Attributes:
        penalty: lambda by name of parameters that the step penalises by itself, once it is known: what is run with a given output
            is run without it.
    """

    def __init__(self, module: nn.Module, batch: Any, run: Run, what: str) -> None:
        self.module, self.run, self.what = module, run, what
        self.names, self.leaves, self.rebuild = flatten(batch)
        self.dtype = next(module.parameters()).dtype
        self.penalty: dict[str, float] = {}

    def see(self) -> Seen:
        """Run the step once, with gradients to every floating leaf."""
        leaves = [
            v.detach().clone().requires_grad_(True) if isinstance(v, Tensor) and v.is_floating_point() else v
            for v in self.leaves
        ]
        with record_calls(self.module) as calls, _copied_outputs(self.module):
            loss = self.ran(leaves)
        if not bool(torch.isfinite(loss.detach())):
            raise UnsuitableError("The loss is NaN or infinite on the first samples. Check data and weights.")
        return Seen(loss, calls, leaves)

    def ran(self, leaves: list[Any]) -> Tensor:
        try:
            return self.run(self.rebuild(copied(leaves)))
        except (UnsuitableError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsuitableError(
                f"{self.what} could not be replayed outside of training ({type(error).__name__}: {str(error)[:200]}). {WAY_OUT}"
            ) from error

    def with_output(self, linear: nn.Module) -> Callable[..., Tensor]:
        """The step as a function of the head's output and the leaves of a batch."""

        def step(z: Tensor, *leaves: Any) -> Tensor:
            with self.answering(linear, z):
                return self.run(self.rebuild(copied(leaves)))

        return step

    @contextmanager
    def answering(self, linear: nn.Module, z: Tensor) -> Iterator[None]:
        """Inside, this layer answers z, and nothing is penalised."""
        with _answering(linear, z), without(self.module, self.penalty):
            yield

    def of_a_step(self, n: int, rows_per_step: int | None) -> list[Probe]:
        """Two batches as large as those of training, where that is known: a penalty may be divided by their rows."""
        if rows_per_step is None:
            return self.probes(n)
        whole, at = Probe(self.leaves, n), torch.arange(rows_per_step)
        return [whole.rows(at % n), whole.rows((at + n // 2) % n)]

    def probes(self, n: int) -> list[Probe]:
        """A few rows, twice, of different numbers."""
        whole = Probe(self.leaves, n)
        few = max(2, min(_FEW[0], n))
        first = torch.arange(few) % n
        second = torch.arange(max(2, min(_FEW[1], few - 1)) if few > 2 else 3).flip(0) % n
        second = (n - 1 - second) % n
        return [whole.rows(first), whole.rows(second)]


@contextmanager
def _answering(linear: nn.Module, z: Tensor) -> Iterator[None]:
    """Inside, the head answers z."""
    handle = linear.register_forward_hook(lambda *_: z.clone())  # the step may work in place on it
    try:
        yield
    finally:
        handle.remove()


def copied(leaves: Iterable[Any]) -> list[Any]:
    """The step may work in place."""
    return [v.clone() if isinstance(v, Tensor) else v for v in leaves]


@contextmanager
def _copied_outputs(module: nn.Module) -> Iterator[None]:
    """Inside, what follows a linear layer works on a copy of its output: the step may work in place."""
    handles = [
        m.register_forward_hook(lambda *call: call[-1].clone()) for m in module.modules() if isinstance(m, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
