"""Who may import whom, read off the sources."""

from __future__ import annotations

import ast
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
}


def _name(path: Path) -> str:
    parts = ["lightning_muter", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in ROOT.rglob("*.py")}


def _imports(path: Path, *, inside_functions: bool = True) -> set[str]:
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
                assert child.level == 0, f"{path}: relative import"
                found.add(child.module or "")
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


GRAPH = {name: _imports(path) & set(MODULES) - {name} for name, path in MODULES.items()}
EAGER = {name: _imports(path, inside_functions=False) & set(MODULES) - {name} for name, path in MODULES.items()}


def _reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph[name]
    return seen


@pytest.mark.parametrize(
    "name", sorted(m for m in MODULES if m.startswith(("lightning_muter.curvature", "lightning_muter.solvers")))
)
def test_curvature_and_solvers_know_neither_lightning_nor_hydra(name):
    """At import, directly or through other modules of the package; nor inside their own functions."""
    own = {i.split(".")[0] for i in _imports(MODULES[name])}
    assert not own & FRAMEWORKS
    for module in _reached(name, EAGER) - {"lightning_muter"}:
        met = {i.split(".")[0] for i in _imports(MODULES[module], inside_functions=False)} & FRAMEWORKS
        assert not met, f"{name} reaches {module}, which imports {met}"


def test_nothing_imports_the_doors():
    doors = {"lightning_muter.cli", "lightning_muter.study.experiment"}
    for name, imported in GRAPH.items():
        if name not in doors and name != "lightning_muter.__main__":
            assert not imported & doors, name


def test_there_are_no_import_cycles():
    for name in MODULES:
        for imported in EAGER[name] - {"lightning_muter"}:
            assert name not in _reached(imported, EAGER), f"{name} and {imported} import each other"


def test_the_front_door_is_in_the_order_of_the_flow():
    """Threat model -> attack and training -> callback and snapshot -> unlearning -> extension points."""
    order = ["adversarial.threat_model", "adversarial.training", "callback", "snapshot.take", "unlearning.unlearn"]
    homes = list(lightning_muter._HOME.values())
    first = [homes.index(home) for home in order]
    assert first == sorted(first)
    assert first[0] == 0
    assert len(set(lightning_muter.__all__)) == len(lightning_muter.__all__)
