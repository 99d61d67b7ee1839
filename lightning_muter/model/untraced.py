"""The part of a step before its head, run beside the trace: nothing of it is left in the end, and most of the time goes there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Untraced:
    """Runs the modules that are called before ``linear`` without a trace, and watches what they leave behind.

    Args:
        module: whose step is traced.
        linear: the head.

    Attributes:
        made: storages that the untraced operations gave, parameters aside, or wrote to: a graph that reads one is not whole.
        leaked: they wrote to what the trace knows.
    """

    def __init__(self, module: nn.Module, linear: nn.Module) -> None:
        self._linear = linear
        self._before = {m for m in module.modules() if linear not in set(m.modules())}
        self._known = {storage(t) for t in (*module.parameters(), *module.buffers())}
        self.made: set[int] = set()
        self.leaked = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, calls of modules before the first of the head are not traced."""
        watch, outermost, stack = _Watch(self._known), None, ExitStack()
        answered = False

        def enter(module: nn.Module, *_: Any) -> None:
            nonlocal outermost
            if outermost is None and not answered and module in self._before:
                outermost = module
                stack.enter_context(disable_proxy_modes_tracing())
                stack.enter_context(watch)

        def leave(module: nn.Module, *_: Any) -> None:
            nonlocal outermost, answered
            answered = answered or module is self._linear
            if module is outermost:
                outermost = None
                stack.close()

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            stack.close()
            self.made, self.leaked = set(watch.made), watch.leaked


class _Watch(TorchDispatchMode):
    """Keeps what operations give and write to."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}  # the tensors too, so that their storage is not given to another
        self.known, self.leaked = known, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        for i, described in enumerate(func._schema.arguments):
            if described.alias_info is not None and described.alias_info.is_write:
                for written in pytree.tree_leaves(args[i] if i < len(args) else given.get(described.name)):
                    if isinstance(written, Tensor):
                        self.leaked |= storage(written) not in self.made and storage(written) not in self.known
                        self.made[storage(written)] = written
        found = func(*args, **given)
        for value in pytree.tree_leaves(found):
            if isinstance(value, Tensor) and storage(value) not in self.known:
                self.made[storage(value)] = value
        return found


def storage(tensor: Tensor) -> int:
    """Where a tensor lies."""
    return tensor.untyped_storage().data_ptr()
