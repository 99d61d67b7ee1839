"""The loss of a step as a pure function of the head's output z and the leaves of the batch, read off a trace.

The step is traced with the head's output replaced by z; dead code is dropped, and with it the backbone, the logging and whatever
else the loss does not depend on. What is left works for any number of rows, in any precision, and is differentiable twice.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_muter.errors import UnsuitableError

_CHECKS = ("_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range")
_RANDOM = ("rand", "bernoulli", "normal", "multinomial", "dropout", "poisson", "exponential", "philox")


class LossGraph:
    """L(z, leaves): a scalar, for z (n, K) and every leaf of the batch.

    Attributes:
        uses: which leaves the loss depends on.
        identity: digest of the operations and of the numbers inside: the same for the same loss.
    """

    def __init__(self, graph: GraphModule, dtype: torch.dtype, parameters: dict[int, str], leaves: int) -> None:
        self._graph = _simplified(graph, dtype)
        self.dtype = dtype
        places = [n for n in self._graph.graph.nodes if n.op == "placeholder"]
        self.uses = [i for i in range(leaves) if places[1 + i].users]
        constants = {str(n.target): _constant(graph, n) for n in self._graph.graph.nodes if n.op == "get_attr"}
        self.constants = {k: v for k, v in constants.items() if isinstance(v, Tensor)}
        self.parameters = sorted({parameters[p] for p in map(_storage, self.constants.values()) if p in parameters})
        self.random = sorted({str(n.target) for n in self._graph.graph.nodes if _is_random(n)})
        self.identity = self._identity()
        if dtype is not None:
            for name, value in self.constants.items():
                if value.is_floating_point():
                    setattr(self._graph, name, nn.Parameter(value.detach().to(dtype), requires_grad=False))

    def __call__(self, z: Tensor, leaves: list[Any]) -> Tensor:
        raised = [v.to(self.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in leaves]
        out: Tensor = self._graph(z, *raised)
        return out.reshape(())

    def _identity(self) -> str:
        seen: dict[str, str] = {}
        code = re.sub(r"device\(type='\w+'(, index=\d+)?\)", "device", self._graph.code)
        code = re.sub(r"\b[a-z_]\w*?_?\d*\b(?= = |[,)\]]|;)", lambda m: seen.setdefault(m[0], f"v{len(seen)}"), code)
        digest = hashlib.sha256(code.encode())
        for name in sorted(self.constants):
            value = self.constants[name].detach().cpu()
            digest.update(repr((tuple(value.shape), value.double().flatten().tolist())).encode())
        return digest.hexdigest()


def trace(
    step: Callable[..., Tensor], z: Tensor, leaves: list[Any], dtype: torch.dtype, named: dict[int, str]
) -> LossGraph:
    """The graph of ``step(z, *leaves)``.

    Args:
        step: runs the module's step with its head answering z.
        dtype: of the algebra; numbers inside the graph are raised to it.
        named: storage of a parameter -> its name, to tell which are inside.

    Raises:
        Exception: whatever tracing raised: the step looks at values (branches, ``.numpy()``), or uses what has no trace.
    """
    graph = make_fx(step, decomposition_table=_table(), tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        z, *leaves
    )
    return LossGraph(graph, dtype, named, len(leaves))


@functools.cache
def _table() -> dict[Any, Any]:
    return dict(core_aten_decompositions())


def storages(module: nn.Module) -> dict[int, str]:
    """Where each parameter lies -> its name."""
    return {_storage(p): name for name, p in module.named_parameters()}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _constant(graph: GraphModule, node: Node) -> Any:
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _size(tensor: Tensor, dim: int) -> int:
    return tensor.shape[dim]


def _is_random(node: Node) -> bool:
    name = str(node.target).removeprefix("aten.")
    return node.op == "call_function" and any(name.startswith(r) or f"_{r}" in name for r in _RANDOM)


def _simplified(graph: GraphModule, dtype: torch.dtype) -> GraphModule:
    """Without checks and dead code, every floating number inside of the algebra's precision."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and any(c in str(node.target) for c in _CHECKS):
            node.replace_all_uses_with(None)
            graph.graph.erase_node(node)
            continue
        if "sym_size" in str(node.target):  # has no batching rule; the shape itself does
            node.target = _size
        kind = node.kwargs.get("dtype")
        if isinstance(kind, torch.dtype) and kind.is_floating_point and kind != dtype:
            node.update_kwarg("dtype", dtype)
        if node.args and any(isinstance(a, torch.dtype) and a.is_floating_point for a in node.args):
            node.args = tuple(dtype if isinstance(a, torch.dtype) and a.is_floating_point else a for a in node.args)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def refuse(graph: LossGraph, head: str, inputs: int) -> None:
    """
    Raises:
        UnsuitableError: the traced loss is not a function of the head's output and of labels alone.
    """
    if graph.random:
        raise UnsuitableError(
            f"The loss draws random numbers ({', '.join(graph.random)}; mixup, label noise, ...): it is another one at every "
            "call. Mix or draw in the dataset, once for all, or train the head without it."
        )
    if inputs in graph.uses:
        raise UnsuitableError(
            "The loss reads more than the head's output: the input or features of the backbone enter it on another way "
            "(a loss on features, an auxiliary head, a reconstruction, a second forward). Take that part out of "
            "training_step, or pass loss= for what the head is to be trained on."
        )
    own = [n for n in graph.parameters if n.rpartition(".")[0] == head]
    if own:
        raise UnsuitableError(
            f"The loss reads the head's own parameters ({', '.join(own)}): a penalty written into training_step. Give it to the "
            "optimiser as weight_decay (lambda / 2 |w|^2 there), which is part of the objective here."
        )
