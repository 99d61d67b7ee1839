"""Who may import whom and how large things may grow, read off the sources. Imports inside functions count."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import lightning_muter

ROOT = Path(lightning_muter.__file__).parent
FRAMEWORKS = {
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "hydra",
    "omegaconf",
    "jsonargparse",
    "torchattacks",
    "matplotlib",
}
#: From the ground up: a folder (or a file) imports from lower lines and from its own.
FLOORS = [
    "errors",
    "called_with extension lightning_names pictures stopping watching",
    "storage solvers evidence",
    "adversarial forgotten model",
    "curvature",
    "certificate minimise",
    "scope snapshot unlearning",
    "preflight publication",
    "callback deletion",
    "study cli",
    "__main__",
]
INSIDE_CURVATURE = ["problem", "inner response", "hessian", "objective"]
#: Folders that know neither Lightning nor Hydra.
CORE = [
    "certificate",
    "curvature",
    "evidence",
    "forgotten",
    "minimise",
    "model",
    "publication",
    "scope",
    "snapshot",
    "solvers",
    "storage",
    "unlearning",
]
#: What takes more than twelve arguments: the three doors whose arguments are what users say.
DOORS = {
    "take_snapshot",
    "unlearn",
    "MUterCallback.__init__",
}


def _name(path: Path) -> str:
    parts = ["lightning_muter", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in ROOT.rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def _imports(tree: ast.AST, *, inside_functions: bool = True) -> set[str]:
    """Modules imported when this one is (and, where asked, when its functions run); TYPE_CHECKING blocks left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not inside_functions:
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "relative import"
                found.add(child.module or "")
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(tree)
    return found


Graph = Mapping[str, set[str]]
# the package itself imports names when they are first used
GRAPH: Graph = {name: _imports(tree) & set(MODULES) - {name, "lightning_muter"} for name, tree in TREES.items()}
EAGER: Graph = {
    name: _imports(tree, inside_functions=False) & set(MODULES) - {name, "lightning_muter"}
    for name, tree in TREES.items()
}


def _reached(start: str, graph: Graph) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph[name]
    return seen


def circles(graph: Graph) -> list[str]:
    """Imports by which two modules reach each other."""
    below = {name: _reached(name, graph) for name in graph}
    return [f"{name} -> {other}" for name in graph for other in graph[name] if name in below[other]]


def upwards(graph: Graph, floors: list[str], depth: int) -> list[str]:
    """Imports of a higher floor, and modules in rooms that have none."""
    floor = {room: i for i, rooms in enumerate(floors) for room in rooms.split()}
    rooms = {name.split(".")[depth] for name in graph if name.count(".") >= depth}
    found = [f"{room} has no floor" for room in sorted(rooms - floor.keys())]
    for name, imported in graph.items():
        for other in imported:
            here, there = (n.split(".")[depth : depth + 1] for n in (name, other))
            if here and there and here != there and floor.get(here[0], -1) < floor.get(there[0], -1):
                found.append(f"{name} -> {other}")
    return found


def test_no_import_goes_round_in_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a -> b", "b -> c", "c -> a"]
    assert circles(GRAPH) == []


def test_imports_go_downwards_only() -> None:
    assert upwards({"lightning_muter.attic.a": set()}, FLOORS, 1) == ["attic has no floor"]
    wrong = {"lightning_muter.curvature.inner.maximiser": {"lightning_muter.snapshot.codec"}}
    assert upwards(wrong, FLOORS, 1) == ["lightning_muter.curvature.inner.maximiser -> lightning_muter.snapshot.codec"]
    assert upwards(GRAPH, FLOORS, 1) == []
    inside = {n: {o for o in i if ".curvature." in o} for n, i in GRAPH.items() if ".curvature." in n}
    assert upwards(inside, INSIDE_CURVATURE, 2) == []


def test_an_import_inside_a_function_counts() -> None:
    tree = ast.parse("def f():\n    from lightning_muter.snapshot.take import take_snapshot\n")
    assert "lightning_muter.snapshot.take" in _imports(tree)
    assert _imports(tree, inside_functions=False) == set()


@pytest.mark.parametrize("name", sorted(m for m in MODULES if m.split(".")[1:2] and m.split(".")[1] in CORE))
def test_the_core_knows_neither_lightning_nor_hydra(name: str) -> None:
    """At import, directly or through other modules of the package; nor inside its own functions."""
    own = {i.split(".")[0] for i in _imports(TREES[name])}
    assert not own & FRAMEWORKS
    for module in _reached(name, EAGER):
        met = {i.split(".")[0] for i in _imports(TREES[module], inside_functions=False)} & FRAMEWORKS
        assert not met, f"{name} reaches {module}, which imports {met}"


def _functions(node: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            name = f"{inside}{child.name}"
            if isinstance(child, ast.FunctionDef):
                yield name, child
            yield from _functions(child, f"{name}.")
        else:
            yield from _functions(child, inside)


def long_functions(tree: ast.AST) -> list[str]:
    """Functions with a body of more than 60 lines, or more than twelve arguments where that is no door."""
    found = []
    for name, function in _functions(tree):
        args = function.args
        count = len([a for a in (*args.posonlyargs, *args.args, *args.kwonlyargs) if a.arg not in ("self", "cls")])
        body = function.body[1:] if ast.get_docstring(function) else function.body
        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
        if lines > 60 or (count > 12 and name not in DOORS):
            found.append(f"{name}: {lines} lines, {count} arguments")
    return found


def test_functions_fit_on_a_page() -> None:
    many = ", ".join(f"a{i}" for i in range(13))
    assert long_functions(ast.parse(f"def f({many}):\n    pass")) == ["f: 1 lines, 13 arguments"]
    assert long_functions(ast.parse("def f():\n" + "    pass\n" * 61)) == ["f: 61 lines, 0 arguments"]
    assert [f"{name}.{found}" for name, tree in TREES.items() for found in long_functions(tree)] == []


def test_a_file_has_one_reason_and_no_more_than_330_lines() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lengths.items() if n > 330} == {}


def test_only_balls_and_responses_know_the_name_of_a_norm() -> None:
    """And what reads the attacks of other packages, which have names of their own; a study names those it is about."""
    allowed = ("adversarial.threat_model", "adversarial.from_torchattacks", "curvature.response", ".study.")
    for name, tree in TREES.items():
        if not any(part in name for part in allowed):
            named = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in ("l2", "linf")]
            assert not named, f"{name}, lines {named}"


def strangers(tree: ast.AST) -> list[str]:
    """Imports of other tests, and of names that the package keeps to itself."""
    return [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if ".test_" in f".{node.module}"
        or ((node.module or "").startswith("lightning_muter") and alias.name.startswith("_") and alias.name[1] != "_")
    ]


def test_tests_stand_on_their_own() -> None:
    """What two tests share lies beside them in a module of its own; a private name may go at any time."""
    assert strangers(ast.parse("from tests.test_a import b")) == ["tests.test_a.b"]
    assert strangers(ast.parse("from lightning_muter.solvers.cg import _descend")) == [
        "lightning_muter.solvers.cg._descend"
    ]
    for path in Path(__file__).parent.rglob("*.py"):
        assert strangers(ast.parse(path.read_text())) == [], path


def test_the_front_door_is_in_the_order_of_the_flow() -> None:
    """Threat model -> attack and training -> callback and snapshot -> unlearning -> extension points."""
    order = ["adversarial.threat_model", "adversarial.training", "callback", "snapshot.take", "unlearning.unlearn"]
    homes = list(lightning_muter._HOME.values())
    first = [homes.index(home) for home in order]
    assert first == sorted(first)
    assert first[0] == 0
    assert len(set(lightning_muter.__all__)) == len(lightning_muter.__all__)


def test_what_a_typical_change_touches_is_there() -> None:
    """The table in CONTRIBUTING.md: twelve changes, each in three files at most, which exist."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| to add")]
    assert len(rows) == 12
    for row in rows:
        paths = [p for p in re.findall(r"`([\w/.]+)`", row) if "/" in p]
        assert 1 <= len(paths) <= 3, row
        for path in paths:
            assert (Path(__file__).parents[1] if path.startswith("conf/") else ROOT).joinpath(path).exists(), path
