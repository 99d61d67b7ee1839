"""The loss of a step as a pure function of the head's output z and the leaves of the batch, read off traces.

The step is traced twice, on batches of two sizes, with the head's output replaced by z; dead code is dropped, and with it the
backbone, the logging and whatever else the loss does not depend on. Where the two traces agree but for numbers that grow with the
batch, what is left works for any number of rows, in any precision, and is differentiable twice.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.unified import NotOneError, unified
from lightning_muter.model.untraced import Untraced, storage

aten = torch.ops.aten

_LOOKS = (
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__format__,
    Tensor.__repr__,
    Tensor.__contains__,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    torch.equal,
    torch.allclose,
    Tensor.equal,
    Tensor.allclose,
)
_CHECKS = ("_assert_async", "_assert_scalar", "_assert_tensor_metadata")
_RANDOM = ("rand", "bernoulli", "normal", "multinomial", "dropout", "poisson", "exponential", "philox")


class LossGraph:
    """L(z, leaves): a scalar, for z (n, K) and every leaf of the batch.

    Attributes:
        uses: which leaves the loss depends on.
        identity: digest of the operations and of the numbers inside: the same for the same loss.
        first: what the head's output goes through first, by name.
    """

    def __init__(self, graph: GraphModule, dtype: torch.dtype, parameters: dict[int, str], tensors: list[int]) -> None:
        self._graph = _raised(graph, dtype)
        self.dtype, self._tensors = dtype, tensors
        places = [n for n in self._graph.graph.nodes if n.op == "placeholder"]
        self.uses = [i for i, place in zip(tensors, places[1:], strict=True) if place.users]
        self.first = sorted(_goes_through(places[0]))
        self.constants = constants(self._graph)
        self.parameters = sorted({parameters[p] for p in map(storage, self.constants.values()) if p in parameters})
        self.random = sorted({str(n.target) for n in self._graph.graph.nodes if _is_random(n)})
        self.identity = self._identity()
        for name, value in self.constants.items():
            if value.is_floating_point():
                setattr(self._graph, name, nn.Parameter(value.detach().to(dtype), requires_grad=False))

    def __call__(self, z: Tensor, leaves: list[Any]) -> Tensor:
        given = [leaves[i] if i in self.uses else None for i in self._tensors]
        raised = [v.to(self.dtype) if v is not None and v.is_floating_point() else v for v in given]
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
    step: Callable[..., Tensor],
    batches: tuple[tuple[Tensor, list[Any]], tuple[Tensor, list[Any]]],
    dtype: torch.dtype,
    named: dict[int, str],
    before: Untraced,
) -> LossGraph:
    """The graph of ``step(z, *leaves)``.

    Args:
        step: runs the module's step with its head answering z.
        batches: z and leaves of two batches of different sizes.
        dtype: of the algebra; numbers inside the graph are raised to it.
        named: storage of a parameter -> its name, to tell which are inside.
        before: what is called before the head; it is run without a trace where the loss reads nothing else of it.

    Raises:
        UnsuitableError: it is another loss at every call;
        Exception: whatever tracing raised: the step looks at values (branches, ``.numpy()``), or uses what has no trace.
    """
    graphs = [_traced(step, z, leaves, before) for z, leaves in batches]
    a, b = (len(z) for z, _ in batches)
    tensors = _tensors(batches[0][1])
    try:
        return LossGraph(unified(graphs[0], graphs[1], a, b), dtype, named, tensors)
    except NotOneError:
        again = _traced(step, *batches[0], before)
        try:
            unified(_traced(step, *batches[0], before), again, a, a)
        except NotOneError as error:
            raise UnsuitableError(
                f"The loss is another one at every call on the same rows (it draws random numbers: mixup, label noise, ...; {error})."
                " Mix or draw in the data set, once for all, or train the head without it."
            ) from error
        raise


def _traced(step: Callable[..., Tensor], z: Tensor, leaves: list[Any], before: Untraced) -> GraphModule:
    with before():
        graph = _graph(step, z, leaves)
    if before.leaked or any(storage(value) in before.made for value in constants(graph).values()):
        return _graph(step, z, leaves)
    return graph


def _graph(step: Callable[..., Tensor], z: Tensor, leaves: list[Any]) -> GraphModule:
    at = _tensors(leaves)

    def of_tensors(z: Tensor, *tensors: Tensor) -> Tensor:
        every = list(leaves)
        for i, tensor in zip(at, tensors, strict=True):
            every[i] = tensor
        with _Rewritten():
            return step(z, *every)

    graph = make_fx(of_tensors, decomposition_table=_simple(), tracing_mode="real")(z, *(leaves[i] for i in at))
    _drop_dead_code(graph)
    return graph


def _tensors(leaves: list[Any]) -> list[int]:
    return [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]


@functools.cache
def _simple() -> dict[Any, Callable[..., Any]]:
    """Losses without a second derivative or a batching rule of their own, as simple operations."""
    table = get_decompositions(
        [
            aten.multi_margin_loss,
            aten.multilabel_margin_loss_forward,
            aten.soft_margin_loss,
            aten.nll_loss_forward,
            aten.nll_loss2d_forward,
            aten.huber_loss,
            aten.smooth_l1_loss,
            aten.mse_loss,
            aten.binary_cross_entropy,
        ]
    )
    return {**table, aten.squeeze.default: _squeezed}


def _squeezed(x: Tensor) -> Tensor:
    """``x.squeeze()`` of a batch of more than one row, so that one row keeps its dimension."""
    out: Tensor = aten.squeeze.dims(x, [i for i, size in enumerate(x.shape) if size == 1])
    return out


class _Rewritten(TorchFunctionMode):
    """Looks at values: a number taken out stays a tensor; what is printed, logged or branched on is looked at beside the trace (two
    traces of other values must agree, and the loss is compared with the step afterwards).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is Tensor.item:
            return args[0].detach().reshape(())
        if func in _LOOKS:
            with disable_proxy_modes_tracing():
                return func(*args, **given)
        if func is F.one_hot:
            classes = given.get("num_classes", args[1] if len(args) > 1 else -1)
            y = args[0] if args else given["input"]
            if classes > 0:
                return (y[..., None] == torch.arange(classes, device=y.device)).long()
        return func(*args, **given)


def storages(module: nn.Module) -> dict[int, str]:
    """Where each parameter lies -> its name."""
    return {storage(p): name for name, p in module.named_parameters()}


def constants(graph: GraphModule) -> dict[str, Tensor]:
    """The tensors inside a graph, by name."""
    found = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value: Any = graph
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if isinstance(value, Tensor):
                found[str(node.target)] = value
    return found


def _is_random(node: Node) -> bool:
    name = str(node.target).removeprefix("aten.")
    return node.op == "call_function" and any(name.startswith(r) or f"_{r}" in name for r in _RANDOM)


def _goes_through(node: Node) -> set[str]:
    """The operations that a value meets first, those that leave it as it is aside."""
    found: set[str] = set()
    for user in node.users:
        name = str(user.target).removeprefix("aten.").split(".")[0].strip("_")
        found |= _goes_through(user) if name in ("clone", "detach", "alias", "view", "to_copy") else {name}
    return found


def _raised(graph: GraphModule, dtype: torch.dtype) -> GraphModule:
    """Every floating number inside of the algebra's precision."""
    for node in graph.graph.nodes:
        kind = node.kwargs.get("dtype")
        if isinstance(kind, torch.dtype) and kind.is_floating_point and kind != dtype:
            node.update_kwarg("dtype", dtype)
        if node.args and any(isinstance(a, torch.dtype) and a.is_floating_point for a in node.args):
            node.args = tuple(dtype if isinstance(a, torch.dtype) and a.is_floating_point else a for a in node.args)
    graph.recompile()
    return graph


def _drop_dead_code(graph: GraphModule) -> None:
    """Keep what the output depends on, in-place operations on it included, and no other: not those of the backbone or of counters."""
    group: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while node in group:
            node = group[node]
        return node

    writes: dict[Node, list[Node]] = {}
    nodes = list(graph.graph.nodes)
    for node in nodes:
        for argument, written in _aliased(node):
            if root(node) is not root(argument):
                group[root(node)] = root(argument)
            if written:
                writes.setdefault(node, []).append(argument)
    alive = {n for n in nodes if n.op == "output"}
    size = 0
    while len(alive) != size:  # what writes to a live tensor is alive, and so is what it reads
        size = len(alive)
        kept = {root(n) for n in alive}
        for node in reversed(nodes):
            if any(u in alive for u in node.users) or any(root(w) in kept for w in writes.get(node, ())):
                alive.add(node)
    for node in reversed(nodes):
        if (node not in alive or any(c in str(node.target) for c in _CHECKS)) and node.op != "placeholder":
            graph.graph.erase_node(node)


def _aliased(node: Node) -> Iterator[tuple[Node, bool]]:
    """The arguments whose memory a node's result may share, and whether it writes to it."""
    schema = getattr(node.target, "_schema", None)
    for i, described in enumerate(schema.arguments if schema is not None else ()):
        if described.alias_info is None:
            continue
        given = node.args[i] if i < len(node.args) else node.kwargs.get(described.name)
        for one in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(one, Node):
                yield one, described.alias_info.is_write


def refuse(graph: LossGraph, head: str, inputs: int) -> None:
    """Refuse losses that are no function of one row's logits and label.

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
            f"The loss reads the head's own parameters ({', '.join(own)}): a penalty written into training_step that is no multiple "
            "of |w|^2, or another one for every size of batch. Write c * w.pow(2).sum() there, or give the optimiser weight_decay "
            "(lambda / 2 |w|^2): these are part of the objective here."
        )
