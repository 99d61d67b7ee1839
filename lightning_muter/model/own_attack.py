"""Steps that perturb their inputs themselves (an attack in ``training_step``): many forwards, of which the loss takes the last.

What is read is the loss of the last output, as a plain mean of a known one over the rows, by replays with that output replaced. How
the inputs were perturbed cannot be read off; the threat model that is given says it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.head import Head, HeadCall, features, unsuitable_head
from lightning_muter.model.leaves import rows
from lightning_muter.model.loss_identity import loss_identity
from lightning_muter.model.plain_mean import plain_mean_of
from lightning_muter.model.reading import Layout, Reading
from lightning_muter.model.rowwise import Probe

Run = Callable[[list[Any]], Tensor]


def takes_the_last(loss: Tensor, calls: list[HeadCall], linear: nn.Linear) -> bool:
    """Whether a loss depends on the last output of a layer alone (an attack's own passes end in its perturbation, detached)."""
    own = [c.output for c in calls if c.linear is linear]
    slopes = [
        torch.autograd.grad(loss, out, retain_graph=True, allow_unused=True)[0] if out.requires_grad else None
        for out in own
    ]
    return slopes[-1] is not None and all(s is None for s in slopes[:-1])


def read_own_attack(
    module: nn.Module, run: Run, call: HeadCall, times: int, names: list[str], leaves: list[Any], probes: list[Probe]
) -> Reading:
    """The reading of such a step.

    Args:
        run: the step as a function of the leaves.     times: how often it calls the head.

    Raises:
        UnsuitableError: the head, the input or the loss cannot be told.
    """
    reasons = unsuitable_head(module, call)
    if reasons:
        raise UnsuitableError("The head cannot be unlearned:\n" + "\n".join(f"- {r}" for r in reasons))
    head, n = Head(call.name, call.linear), len(call.output)
    at = _input(module, head, names, leaves, n)

    def step(z: Tensor, *leaves: Any) -> Tensor:
        with _last_answer(call.linear, z, times):
            return run(list(leaves))

    dtype = next(module.parameters()).dtype
    labels = [i for i, v in enumerate(leaves) if i != at and rows(v, n)]
    told = plain_mean_of(step, probes, labels, call.linear.out_features, dtype)
    if told is None:
        raise UnsuitableError(
            f"The head {call.name!r} is called {times} times in one training_step (an attack written into it), and its loss is no "
            "plain mean of a known one over the last output. Take the attack out and let AdversarialTraining attack, or pass loss=."
        )
    known, scale = told
    return Reading(
        module, run, head, Layout(names, at, labels), known.loss, loss_identity(known.loss), _Unasked(step), "rows",
        probes[0].rows(torch.tensor([0])), leaves, known, uniform=scale,
    )  # fmt: skip


def _input(module: nn.Module, head: Head, names: list[str], leaves: list[Any], n: int) -> int:
    """The one floating leaf that ``module(x)`` takes to the head."""
    found = []
    for i, leaf in enumerate(leaves):
        if rows(leaf, n) and leaf.is_floating_point():
            try:
                with torch.no_grad():
                    features(module, head, leaf)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # a label, a weight: not what forward takes
                continue
            found.append(i)
    if len(found) != 1:
        raise UnsuitableError(
            f"training_step perturbs its inputs itself, and {len(found)} tensors of the batch ({[names[i] for i in found]}) can be "
            "given to forward: which one is the input cannot be told. Let AdversarialTraining attack, with inputs=."
        )
    return found[0]


class _Unasked:
    """A batch loss whose rows are not asked one by one (`Reading.weighed`)."""

    by_row = True

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self.step = step

    def __call__(self, z: Tensor, leaves: list[Any]) -> Tensor:
        return self.step(z, *leaves)


@contextmanager
def _last_answer(linear: nn.Linear, z: Tensor, times: int) -> Iterator[None]:
    """Inside, the layer's call number ``times`` gives z."""
    done = [0]

    def answer(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        done[0] += 1
        return z if done[0] == times else output

    handle = linear.register_forward_hook(answer)
    try:
        yield
    finally:
        handle.remove()
