"""How a model is run where derivatives are wanted: precision, kernels that can be differentiated twice, autograd on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_muter.errors import UnsuitableError

#: What PyTorch says where a layer has no rule for forward mode or for batches of it.
_NO_RULE = ("forward AD", "forward-mode", "vmap", "atching rule", "functorch", "jvp")
#: What it says where an operation has no derivative of its derivative.
_NO_SECOND = re.compile(r"derivative for aten::_?(\w+?)(?:_for_cpu)?_backward\w* is not implemented")
_OWN = {
    "once_differentiable": "a once_differentiable function",
    "setup_context staticmethod": "an autograd.Function without setup_context",
}


def algebra_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without it (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a module of this dtype is run: its own, or float32 for 16-bit modules, whose three digits are too few for maximisers.

    >>> working_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def widened(module: nn.Module) -> dict[str, Tensor] | None:
    """Parameters and buffers of a 16-bit module in float32 (the same numbers), for ``functional_call``; None if there are none."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if not any(working_dtype(t.dtype) != t.dtype for t in named.values()):
        return None
    return {n: t.detach().to(working_dtype(t.dtype)) for n, t in named.items()}


@contextmanager
def full_precision() -> Iterator[None]:
    """Without the caller's autocast: 16 bits are too few for curvature. Also a decorator."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def derivatives() -> Iterator[None]:
    """Autograd on, whatever the caller switched off (``no_grad``, ``inference_mode``), and no autocast.

    Raises:
        UnsuitableError: an operation inside has no second derivative; the message names it.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), full_precision():
            yield
    except RuntimeError as error:
        name = no_second_derivative(error)
        if name is None:
            raise
        raise UnsuitableError(
            f"PyTorch has no second derivative of {name!r}, which the model or its loss calls: curvature cannot be computed. "
            "Write it with other operations, or replace it (hard functions by smooth ones, say)."
        ) from error


@contextmanager
def twice_differentiable(*, rewritten: bool = False) -> Iterator[None]:
    """Kernels that can be differentiated twice: attention by its formula, where the fused kernels have a first derivative alone.

    Args:
        rewritten: also write functions that have no second derivative with others that have it (costs a little per operation).
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            if not rewritten:
                yield
                return
            with _Rewritten():
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Rewritten(TorchFunctionMode):
    """Hard sigmoid as a clamp: PyTorch's own has no second derivative."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.hardsigmoid:
            return ((args[0] + 3) / 6).clamp(0, 1)
        return func(*args, **(kwargs or {}))


def no_second_derivative(error: BaseException) -> str | None:
    """The operation that this error says has no second derivative; None for any other error.

    >>> no_second_derivative(RuntimeError("derivative for aten::hardsigmoid_backward is not implemented"))
    'hardsigmoid'
    """
    found = _NO_SECOND.search(str(error))
    if found:
        return found.group(1)
    return next((name for text, name in _OWN.items() if text in str(error)), None)


def calls_own_functions(out: Tensor) -> bool:
    """Whether a ``torch.autograd.Function`` of the user's is behind this. One that is differentiable once does not always say so:
    its second derivative may look like 0.
    """
    seen: set[Any] = set()
    todo = [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions)
    return False


def second_derivative_vanishes(forward: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether a second derivative of ``forward`` at x, in random directions that are always the same, is 0."""
    generator = torch.Generator().manual_seed(1)
    point = x.clone().requires_grad_(True)
    out = forward(point)
    u = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    (first,) = torch.autograd.grad((out * u).sum(), point, create_graph=True)
    if not first.requires_grad:
        return True
    (second,) = torch.autograd.grad((first * v).sum(), point, allow_unused=True)
    return second is None or not bool(second.any())


def slope_moves(slope: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether the slope (n, D) at inputs x (n, D) changes from place to place, away from kinks, which some rows may have met."""
    generator = torch.Generator().manual_seed(2)
    rounding = torch.finfo(x.dtype).eps
    step = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) * rounding**0.5
    here, there = slope(x), slope(x + step)
    same = (here - there).norm(dim=1) <= 64 * rounding * here.norm(dim=1)
    return float(same.double().mean()) < 0.25


def lacks_forward_mode(error: RuntimeError) -> bool:
    """Whether an operation has no rule for forward mode, or for batches of it."""
    return isinstance(error, NotImplementedError) or any(text in str(error) for text in _NO_RULE)


def directional(function: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """f and its derivative along the tangents: one pass in forward mode, or two in reverse where there is no rule for that."""
    try:
        out, turned = jvp(function, primals, tangents)[:2]
    except RuntimeError as error:
        if not lacks_forward_mode(error):
            raise
        out, pull = vjp(function, *primals)[:2]  # u -> J^T u is linear: its own pullback of the tangents is J v
        (turned,) = vjp(pull, out)[1](tuple(tangents))
    return out, turned
