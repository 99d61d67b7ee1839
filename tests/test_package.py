"""The front door: every public name is there, typed, and imported only when it is used."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_muter


def test_public_names_have_homes_and_types():
    assert list(lightning_muter._HOME) == lightning_muter.__all__
    for name in lightning_muter.__all__:
        value = getattr(lightning_muter, name)
        assert value.__module__ == f"lightning_muter.{lightning_muter._HOME[name]}", name
    assert set(lightning_muter.__all__) <= set(dir(lightning_muter))
    with pytest.raises(AttributeError, match="nothing"):
        lightning_muter.nothing  # noqa: B018
    tree = ast.parse(Path(lightning_muter.__file__).read_text())
    typed = {
        (alias.name, node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_muter.")
        for alias in node.names
    }
    assert typed == {(name, f"lightning_muter.{home}") for name, home in lightning_muter._HOME.items()}


def test_every_dependency_has_a_lowest_version():
    """Which `.ci/versions lowest` installs and tests."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    declared = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    names = [line for line in declared.splitlines() if line]
    assert len(names) > 20
    assert [line for line in names if not re.match(r"[\w-]+(\[\w+\])?>=[\d.]+", line)] == []


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, lightning_muter; sys.exit(bool({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
