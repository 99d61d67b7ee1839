"""Two traces of one function, on batches of a and b rows, as one graph for any number of rows.

Whole numbers that differ are read as k n + c of the number of rows n, other numbers as c / n or c n; everything else must agree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


class NotOneError(Exception):
    """The traces are of two functions; says where they part."""


def unified(one: GraphModule, other: GraphModule, a: int, b: int) -> GraphModule:
    """``one``, changed in place: its numbers that depend on the batch are computed from the rows of its first argument.

    Raises:
        NotOneError: operations, constants or numbers differ in another way.
    """
    return _Unifying(one, other, a, b).graph()


class _Unifying:
    def __init__(self, one: GraphModule, other: GraphModule, a: int, b: int) -> None:
        self.one, self.other, self.a, self.b = one, other, a, b
        self.twin: dict[Node, Node] = {}
        self.rows: Node | None = None

    def graph(self) -> GraphModule:
        nodes, others = list(self.one.graph.nodes), list(self.other.graph.nodes)
        if len(nodes) != len(others):
            raise NotOneError(f"{len(nodes)} and {len(others)} operations")
        last = [n for n in nodes if n.op == "placeholder"][-1]
        for node, other in zip(nodes, others, strict=True):
            if node.op != other.op or (node.op == "call_function" and node.target != other.target):
                raise NotOneError(f"{node.target} and {other.target}")
            self.twin[other] = node
            if node.op == "get_attr":
                self._same_constant(node, other)
            elif node.op != "placeholder":
                with self.one.graph.inserting_before(node):
                    args, kwargs = self._joined(node.args, other.args), self._joined(node.kwargs, other.kwargs)
                node.args, node.kwargs = args, kwargs
        if self.rows is not None:
            last.append(self.rows)  # before whatever is computed from it
        self.one.graph.lint()
        self.one.recompile()
        return self.one

    def _same_constant(self, node: Node, other: Node) -> None:
        here, there = getattr(self.one, str(node.target)), getattr(self.other, str(other.target))
        if not (isinstance(here, Tensor) and isinstance(there, Tensor)):
            return
        if here.shape != there.shape or here.dtype != there.dtype or not torch.equal(here, there):
            raise NotOneError("a tensor that is made anew from the batch or from chance")

    def _joined(self, here: Any, there: Any) -> Any:
        if isinstance(here, Node):
            if self.twin.get(there) is not here:
                raise NotOneError(f"the argument {here}")
            return here
        if isinstance(here, (list, tuple)):
            if type(here) is not type(there) or len(here) != len(there):
                raise NotOneError(f"{here} and {there}")
            return type(here)(self._joined(x, y) for x, y in zip(here, there, strict=True))
        if isinstance(here, dict):
            if here.keys() != there.keys():
                raise NotOneError(f"{here} and {there}")
            return {k: self._joined(v, there[k]) for k, v in here.items()}
        if here == there or (here != here and there != there):
            return here
        if type(here) is int and type(there) is int and self.a != self.b:
            slope, rest = divmod(here - there, self.a - self.b)
            if rest == 0:
                return self._node(_affine, slope, here - slope * self.a)
        if type(here) is float and type(there) is float:
            if math.isclose(here * self.a, there * self.b, rel_tol=1e-12):
                return self._node(_share, here * self.a)
            if math.isclose(here * self.b, there * self.a, rel_tol=1e-12):
                return self._node(_multiple, here / self.a)
        raise NotOneError(f"{here} and {there}")

    def _node(self, function: Any, *numbers: Any) -> Node:
        graph = self.one.graph
        if self.rows is None:
            z = next(iter(graph.nodes))
            self.rows = graph.call_function(_size, (z,))
        return graph.call_function(function, (self.rows, *numbers))


def _size(z: Tensor) -> int:
    return z.shape[0]


def _affine(n: int, slope: int, offset: int) -> int:
    return slope * n + offset


def _share(n: int, whole: float) -> float:
    return whole / n


def _multiple(n: int, one: float) -> float:
    return one * n
