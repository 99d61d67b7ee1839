"""The head of a classifier or regressor: the last trainable ``nn.Linear`` whose output *is* the logits.

    z = W phi(x) + b,     W (K, f),  b (K,),  phi(x) (n, f): input of the head

Plain torch: this file knows nothing of Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from lightning_muter.errors import UnsuitableError

#: What is told of a tensor on its way.
Take = Callable[[Tensor], None]


@dataclass(frozen=True)
class Head:
    """Where the head is: ``name`` as in ``module.named_modules()`` and the layer itself."""

    name: str
    linear: nn.Linear

    @property
    def layer(self) -> nn.Module:
        return self.linear

    @property
    def outputs(self) -> int:
        return self.linear.out_features

    @property
    def width(self) -> int:
        return self.linear.in_features

    def logits(self, phi: Tensor) -> Tensor:
        """z (n, K) of the head's input (n, f)."""
        return self.linear(phi)

    def when_reached(self, take: Take) -> RemovableHandle:
        """Tell phi before every call, until the handle is removed."""

        def told(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(args[0] if args else kwargs["input"])

        return self.linear.register_forward_pre_hook(told, with_kwargs=True)


@dataclass(frozen=True)
class Output:
    """Where a step is cut if a whole network is asked for: at the output z of any module. What is taken on the way is z itself."""

    name: str
    layer: nn.Module
    outputs: int

    @property
    def width(self) -> int:
        return self.outputs

    def logits(self, phi: Tensor) -> Tensor:
        return phi

    def when_reached(self, take: Take) -> RemovableHandle:
        """Tell z after every call, until the handle is removed."""
        return self.layer.register_forward_hook(lambda _, args, out: take(out))


#: The layer at which a step is cut into features and loss, as split learning calls it.
CutLayer = Head | Output


@dataclass
class HeadCall:
    """What one forward call of a layer took (copied, later layers may work in place) and gave, and the version counter of what it
    gave: it counts later in-place changes, also those that happen to change no value.
    """

    head: CutLayer
    inputs: Tensor
    output: Tensor
    version: int

    @property
    def name(self) -> str:
        return self.head.name

    @property
    def linear(self) -> nn.Linear:
        assert isinstance(self.head, Head)
        return self.head.linear


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode inside; every submodule's own ``.training`` back afterwards, come what may."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Compiled parts of ``module`` run as they were written (hooks and second derivatives need that)."""
    in_place = [m for m in module.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    # Lightning keeps the compiler of a module that was compiled as a whole, and puts compiled steps on the instance
    wrapped = getattr(module, "_compiler_ctx", None) is not None or any(
        type(m).__name__ == "OptimizedModule" for m in module.modules()
    )
    with ExitStack() as stack:
        set_stance = getattr(torch.compiler, "set_stance", None)
        if wrapped and set_stance is not None:
            stack.enter_context(set_stance("force_eager"))
        compiled = [(m, m._compiled_call_impl) for m in in_place]
        try:
            for m in in_place:
                m._compiled_call_impl = None
            yield
        finally:
            for m, impl in compiled:
                m._compiled_call_impl = impl


def find_head(module: nn.Module, example_input: Tensor) -> Head:
    """Find and verify the head by one forward pass of ``example_input`` in eval mode.

    Args:
        module: the model; ``module(example_input)`` returns logits, (n, K), or (n, 1) or (n,) for one logit.
        example_input: a few samples, on the module's device.

    Returns:
        The ``nn.Linear`` whose output is returned unchanged; a trailing ``squeeze(-1)`` of one logit is allowed.

    Raises:
        UnsuitableError: nothing qualifies; the message lists every reason with its way out.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> find_head(net, torch.rand(5, 4)).name
    '2'
    """
    with torch.inference_mode(False), eval_mode(module), eager(module), torch.no_grad(), record_calls(module) as calls:
        logits = module(example_input)
    if not isinstance(logits, Tensor):
        raise UnsuitableError(
            f"The model has no head that can be unlearned: forward returns {type(logits).__name__}, not one tensor of "
            "logits. Return the logits alone from forward (other outputs from a second method)."
        )
    last = next((c for c in reversed(calls) if _is_output(c, logits)), None)
    if last is None:
        raise UnsuitableError(_why_no_head(module, calls, logits))
    reasons = unsuitable_head(module, last, sum(c.linear is last.linear for c in calls))
    if reasons:
        raise UnsuitableError(
            f"The layer {last.name!r} gives the logits but cannot serve as the head:\n"
            + "\n".join(f"- {r}" for r in reasons)
        )
    return Head(last.name, last.linear)


@contextmanager
def record_calls(module: nn.Module) -> Iterator[list[HeadCall]]:
    """The calls of linear layers made inside, in order."""
    linears = {m: name for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    calls: list[HeadCall] = []

    def record(linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = args[0] if args else kwargs.get("input")
        if isinstance(inputs, Tensor) and isinstance(output, Tensor) and isinstance(linear, nn.Linear):
            calls.append(HeadCall(Head(linears[linear], linear), inputs.clone(), output, output._version))

    handles = [m.register_forward_hook(record, with_kwargs=True) for m in linears]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def features(module: nn.Module, head: CutLayer, x: Tensor, values: dict[str, Tensor] | None = None) -> Tensor:
    """The head's input phi(x), (n, f), with its autograd graph; the mode (train or eval) is the caller's.

    ``values``: of parameters and buffers by name, in place of the module's own.

    Raises:
        UnsuitableError: the head is not reached, reached twice, or takes another shape than (n, f).

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    >>> x = torch.rand(5, 4)
    >>> torch.equal(features(net, find_head(net, x), x), net[1](net[0](x)))
    True
    """
    taken: list[Tensor] = []
    handle = head.when_reached(taken.append)
    try:
        with eager(module):
            if values is None:
                module(x)
            else:
                functional_call(module, values, (x,))
    finally:
        handle.remove()
    if len(taken) != 1:
        raise UnsuitableError(
            f"The head {head.name!r} was called {len(taken)} times in one forward pass; it must be called exactly once."
        )
    if taken[0].shape != (x.shape[0], head.width):
        raise UnsuitableError(_shape_reason(head.name, taken[0], x.shape[0]))
    return taken[0]


def _is_output(call: HeadCall, logits: Tensor) -> bool:
    """Whether the logits are this call's output, unchanged: the same memory, or a mere change of dtype."""
    out = call.output
    if out._version != call.version:
        return False
    if logits.dim() == 1 and out.dim() == 2 and out.shape[1] == 1:
        out = out.squeeze(-1)
    if out.shape != logits.shape or not torch.equal(out.to(logits.dtype), logits):
        return False
    return out.dtype != logits.dtype or logits.data_ptr() == out.data_ptr()


def unsuitable_head(module: nn.Module, call: HeadCall, times: int = 1) -> list[str]:
    """Every reason why the layer that gives the logits is no free, plain, untied W phi + b."""
    name, linear, reasons = call.name, call.linear, []
    if call.inputs.dim() != 2:
        reasons.append(_shape_reason(name, call.inputs, call.output.shape[0]))
    if times > 1:
        reasons.append(f"it is called {times} times in one forward pass; use one layer per call.")
    if "weight" not in linear._parameters or parametrize.is_parametrized(linear):
        reasons.append(
            "its weight is computed from other parameters (weight norm, spectral norm, pruning, ...); "
            "fold it into a plain weight (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
            "prune.remove) before training the head."
        )
    else:
        if not linear.weight.requires_grad:
            reasons.append("its weight is frozen (requires_grad=False); set requires_grad=True and train it.")
        elif linear.bias is not None and not linear.bias.requires_grad:
            reasons.append("its bias is frozen while its weight is trained; train both, or build it with bias=False.")
        if not torch.allclose(F.linear(call.inputs, linear.weight, linear.bias), call.output, equal_nan=True):
            reasons.append(
                f"its output is not W x + b ({type(linear).__name__}: an adapter such as LoRA, or a hook, adds to it); "
                "merge the adapter into the weight, or remove the hook."
            )
        own = {id(p) for p in linear.parameters(recurse=False)}
        prefix = f"{name}." if name else ""
        mine = {prefix + n for n, _ in linear.named_parameters(recurse=False)}
        tied = [n for n, p in module.named_parameters(remove_duplicate=False) if id(p) in own and n not in mine]
        if tied:
            reasons.append(f"its parameters are tied to {', '.join(tied)}; give the head parameters of its own.")
    return reasons


def _why_no_head(module: nn.Module, calls: list[HeadCall], logits: Tensor) -> str:
    reasons = []
    adapters = sorted(
        {n for n, m in module.named_modules() if "lora" in type(m).__module__.lower() or hasattr(m, "lora_A")}
    )
    if adapters:
        reasons.append(
            f"LoRA adapters at {', '.join(adapters)}: merge them (merge_and_unload) before training the head."
        )
    if not calls:
        reasons.append("no nn.Linear is called in the forward pass: end the model with one.")
    elif calls[-1].output.numel() != logits.numel():
        reasons.append(
            f"the last nn.Linear called, {calls[-1].name!r}, gives {tuple(calls[-1].output.shape)} but "
            f"the model returns {tuple(logits.shape)}: return the layer's output itself (only squeeze(-1) of one logit "
            "is allowed)."
        )
    else:
        reasons.append(
            f"the last nn.Linear called, {calls[-1].name!r}, is followed by something that changes its output "
            "(softmax, sigmoid, scaling, normalisation, ...): return its output unchanged and move that into the loss."
        )
    return "No trainable nn.Linear gives the logits:\n" + "\n".join(f"- {r}" for r in reasons)


def _shape_reason(name: str, inputs: Tensor, n: int) -> str:
    return (
        f"the head {name!r} takes an input of shape {tuple(inputs.shape)} for {n} samples; it must be (n, features): "
        "pool or flatten before the head."
    )
