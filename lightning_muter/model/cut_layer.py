"""Where a step is cut into features and loss: at its head; or, if a whole network is asked for, at the output of any module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.head import Head, HeadCall, Output, unsuitable_head
from lightning_muter.model.own_attack import takes_the_last
from lightning_muter.model.own_step import WAY_OUT, OwnStep, Seen
from lightning_muter.model.penalty import read_penalty

#: The next step where there is no linear head.
BEYOND = "take_snapshot(..., scope='all'), MUterCallback(scope='all'), --trainer.callbacks.scope all"


class CutLayerSearch:
    """Finds the place, and says what a step penalises beside the loss there.

    Args:
        own: the step; its ``penalty`` is set.
        rows_per_step: of training, where known.
        fixed: the head itself is not asked for, only what follows it (to be climbed): it may be frozen, tied or adapted.
        whole: nothing of the head is asked for but its output: where it is no linear layer of its own, or trained parameters lie
            behind it, the step is cut at the output of another module.
    """

    def __init__(self, own: OwnStep, rows_per_step: int | None, *, fixed: bool, whole: bool) -> None:
        self.own, self.rows_per_step, self.fixed = own, rows_per_step, fixed
        self.anywhere = whole or fixed

    def place(self) -> tuple[Seen, HeadCall]:
        """A run of the step, and the call in it whose output it is cut at.

        Raises:
            UnsuitableError: there is none.
        """
        seen = self.own.see()
        try:
            call = self._last_linear(seen)
        except UnsuitableError:
            if not self.anywhere:
                raise
            return self._other_output()
        except RuntimeError as error:  # an in-place operation that autograd cannot undo, ...
            raise UnsuitableError(
                f"The loss of {self.own.what} has no gradient ({str(error).splitlines()[0]}), so that it cannot be trained either."
            ) from error
        return self._other_output() if self.anywhere and not self._will_do(call, seen) else (seen, call)

    def insist(self, call: HeadCall) -> None:
        """Raises UnsuitableError: a linear layer was found that is no plain, free W phi + b."""
        reasons = unsuitable_head(self.own.module, call) if isinstance(call.head, Head) else []
        if reasons and not (self.fixed and call.inputs.dim() == 2):
            raise UnsuitableError(
                f"The layer {call.name!r} gives what the loss takes but cannot serve as the head:\n"
                + "\n".join(f"- {r}" for r in reasons)
                + f"\nOr unlearn beyond a head: {BEYOND}."
            )

    def refuse_layers_behind(self, call: HeadCall, convex: bool) -> None:
        """Raises UnsuitableError: a head was asked for, and the layer that was found is not the last (a scale or a bias behind it
        may be trained).
        """
        if self.anywhere:
            return
        names, named = self._behind(call), dict(self.own.module.named_parameters())
        if names and (not convex or any(named[n].numel() > call.head.outputs for n in names)):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise UnsuitableError(
                f"The last nn.Linear called, {call.name!r}, is not the head: {shown} behind it are trained as well. End the model "
                f"with an nn.Linear, or unlearn beyond a head ({BEYOND})."
            )

    def read_penalty(self, call: HeadCall) -> list[str]:
        """Find what the step penalises by itself; what is to be said of it."""
        own, head, n, rows_per_step = self.own, call.head, len(call.output), self.rows_per_step
        own.penalty = {}
        step = own.with_output(head.layer)
        few = read_penalty(own.module, step, own.probes(n)[:1], head.outputs)
        if not few:
            return []
        if rows_per_step is None and self.fixed:  # what is climbed is the loss alone
            rows_per_step = n
        found = own.penalty = read_penalty(own.module, step, own.of_a_step(n, rows_per_step), head.outputs)
        if not found or all(abs(found.get(name, c) - c) <= 1e-3 * c for name, c in few.items()):
            return []
        return [
            f"{own.what} adds an L2 penalty by itself and divides it by the rows of the batch: the objective is taken for batches "
            f"of {rows_per_step} rows. Add it undivided, or use the optimiser's weight_decay."
        ]

    def _last_linear(self, seen: Seen) -> HeadCall:
        """The last linear layer called whose output the loss depends on."""
        if not seen.calls:
            raise UnsuitableError(
                f"{self.own.what} calls no nn.Linear: end the model with one, whose output the loss takes, or unlearn beyond a head "
                f"({BEYOND})."
            )
        for call in reversed([c for c in seen.calls if c.output.requires_grad]):
            (slope,) = torch.autograd.grad(seen.loss, call.output, retain_graph=True, allow_unused=True)
            if slope is not None:
                return call
        raise UnsuitableError(
            f"The loss of {self.own.what} depends on no nn.Linear that the step calls: nothing to unlearn."
        )

    def _will_do(self, call: HeadCall, seen: Seen) -> bool:
        """Whether a step can be cut at a linear layer where only its output is asked for."""
        if calls_of(call, seen) > 1:
            return takes_the_last(seen.loss, seen.calls, call.linear)
        if unsuitable_head(self.own.module, call) and not (self.fixed and call.inputs.dim() == 2):
            return False
        self.read_penalty(call)
        return not self._behind(call)

    def _other_output(self) -> tuple[Seen, HeadCall]:
        """The first output on the way to the loss through which all that is trained reaches it."""
        found: HeadCall | None = None
        seen, calls = _outputs(self.own)
        for call in calls:
            self.read_penalty(call)
            if self._behind(call):
                break
            found = call
        if found is None:
            raise UnsuitableError(
                f"{self.own.what} calls no module with an output of one row per sample through which all trained parameters reach "
                "the loss: part of the model is written into the step itself, or called twice. Let forward, or a module of its "
                f"own, give the logits. {WAY_OUT}"
            )
        return seen, found

    def _behind(self, call: HeadCall) -> list[str]:
        """Trained parameters that reach the loss on another way than through this output, by name."""
        trained = {n: p for n, p in self.own.module.named_parameters() if p.requires_grad}
        with self.own.answering(call.head.layer, call.output.detach().clone().requires_grad_(True)):
            loss = self.own.ran(self.own.leaves)
            if not trained or not loss.requires_grad:
                return []
            slopes = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return [n for n, slope in zip(trained, slopes, strict=True) if slope is not None and bool(slope.any())]


def calls_of(call: HeadCall, seen: Seen) -> int:
    """How often the step calls this linear layer; any other module that it is cut at is called once."""
    return sum(c.head == call.head for c in seen.calls) if isinstance(call.head, Head) else 1


def _outputs(own: OwnStep) -> tuple[Seen, list[HeadCall]]:
    """A run of the step, and the calls of modules in it, the last first: each the only one of its module, with an output of one row
    per sample that the loss may depend on.
    """
    n = max((len(v) for v in own.leaves if isinstance(v, Tensor) and v.dim() > 0), default=0)
    with _recorded(own.module) as calls:
        seen = own.see()
    every = [layer for layer, _ in calls]
    names = {m: name for name, m in own.module.named_modules()}
    found = []
    for layer, out in reversed(calls):
        fits = isinstance(out, Tensor) and out.dim() == 2 and len(out) == n and out.is_floating_point()
        if fits and out.requires_grad and every.count(layer) == 1:
            found.append(HeadCall(Output(names[layer], layer, out.shape[1]), out, out, out._version))
    return seen, found


@contextmanager
def _recorded(module: nn.Module) -> Iterator[list[tuple[nn.Module, Any]]]:
    """The calls of modules made inside and what they gave, in the order in which they ended."""
    calls: list[tuple[nn.Module, Any]] = []

    def record(layer: nn.Module, args: Any, out: Any) -> None:
        calls.append((layer, out))

    handles = [m.register_forward_hook(record) for m in module.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
