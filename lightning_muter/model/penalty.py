"""An L2 penalty that a step adds to its loss by itself: found, proved to be one, and counted as weight decay.

With the head's output held, what is left of a step's dependence on parameters is its penalty R(w). If R(w) = sum_p c_p |w_p|^2
wherever the parameters are, then lambda_p = 2 c_p is the weight decay that it amounts to (lambda / 2 |w|^2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.model.rowwise import Probe, points

Step = Callable[..., Tensor]

#: Relative, by precision: the slope of R against 2 c w, and c at one place against c at another.
_EQUAL = {torch.float64: 1e-9, torch.float32: 1e-4}


def read_penalty(module: nn.Module, step: Step, probes: Iterable[Probe], outputs: int) -> dict[str, float]:
    """lambda_p by parameter name, of every parameter that ``step(z, *leaves)`` penalises; empty where it penalises none.

    Also empty where it depends on parameters in another way (an absolute value, a norm, an auxiliary loss) or otherwise in one batch
    than in the next: the step is then read, or refused, as it stands.
    """
    named = list(module.named_parameters())
    found: list[dict[str, float]] = []
    for place, probe in enumerate(probes):
        slopes = _slopes(named, step, probe, outputs, place)
        if slopes is None:
            return {}
        found.append(slopes)
        if not slopes:  # nothing is penalised: the usual case costs one run
            return {}
    first, near = found[0], max(_EQUAL.get(p.dtype, 2e-2) for _, p in named)
    for other in found[1:]:
        if other.keys() != first.keys() or any(abs(other[n] - c) > near * abs(c) for n, c in first.items()):
            return {}
    return {n: _plain(2 * c) for n, c in first.items()} if all(c > 0 for c in first.values()) else {}


def _slopes(
    named: list[tuple[str, nn.Parameter]], step: Step, probe: Probe, outputs: int, place: int
) -> dict[str, float] | None:
    """c_p at one random place for the parameters; None: R is no multiple of |w_p|^2 there."""
    generator = torch.Generator().manual_seed(place)
    first = named[0][1]
    z = points(probe.n, outputs, first.dtype, first.device, 31)
    there = {
        n: ((1 + 2 * place) * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p) for n, p in named
    }
    asked = [p for _, p in named if not p.requires_grad]
    with _put(dict(named), there):
        try:
            for p in asked:
                p.requires_grad_(True)
            loss = step(z, *probe.leaves)
            if not loss.requires_grad:
                return {}
            slopes = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        except Exception:  # of the step, at such weights: nothing is known then
            return None
        finally:
            for p in asked:
                p.requires_grad_(False)
    found = {}
    for (n, p), slope in zip(named, slopes, strict=True):
        if slope is None or not bool(slope.any()):
            continue
        w, g = there[n].double().flatten(), slope.double().flatten()
        c = float(g @ w / (2 * w @ w))
        if float((g - 2 * c * w).norm()) > _EQUAL.get(p.dtype, 2e-2) * float(g.norm()):
            return None
        found[n] = c
    return found


@contextmanager
def without(module: nn.Module, penalised: Mapping[str, float]) -> Iterator[None]:
    """Inside, the penalised parameters are 0, and so is their penalty."""
    held = {n: p for n, p in module.named_parameters() if n in penalised}
    with _put(held, {n: torch.zeros_like(p) for n, p in held.items()}):
        yield


@contextmanager
def _put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other numbers in the parameters; theirs are set aside, not copied, so that graphs of before stay valid."""
    before: dict[str, Any] = {n: p.data for n, p in parameters.items()}
    try:
        for n, p in parameters.items():
            p.data = values[n].detach()
        yield
    finally:
        for n, p in parameters.items():
            p.data = before[n]


def _plain(value: float) -> float:
    """1e-3 of 0.0009999999: the number as somebody wrote it, where single precision tells no more."""
    near = float(f"{value:.6g}")
    return near if abs(near - value) <= 1e-6 * abs(value) else value
