"""README does what it says: its code and its command lines run, its figures are those of the results."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_muter import cli
from lightning_muter.study.report import report

from .readme import NO_LOGGER, ROOT, at_work, blocks, words

README = ROOT / "README.md"
MARKED = {"install-and-test", "build-docs", "notebooks", "examples"}
BLOCKS = blocks(README)
PYTHON = [b.text for b in BLOCKS if b.language == "python"]
COMMANDS = [words(line) for b in BLOCKS if b.language == "bash" and "--config" in b.text for line in b.lines()]
#: A half of what it was: what a stranger reads before he tries.
MOST_WORDS = 667


def _run_python(folder: Path) -> None:
    names: dict[str, object] = {"__name__": "readme"}
    for text in PYTHON:
        exec(compile(text, "README.md", "exec"), names)
    assert any((folder / "run").glob("*.muter.ledger"))


def test_every_block_is_run_somewhere() -> None:
    assert {b.language for b in BLOCKS} == {"python", "bash"}
    others = [b for b in BLOCKS if b.language == "bash" and not b.name and "--config" not in b.text]
    assert [b.text for b in others] == ["pip install -e . && muter-experiment\n"]  # the main job, below
    assert {b.name for b in BLOCKS} == {"", *MARKED}
    script = (ROOT / ".ci" / "run").read_text()
    assert {name for name in MARKED if f"readme {name}" not in script} == set()


@NO_LOGGER
def test_the_code(tmp_path: Path) -> None:
    with at_work(tmp_path, size=60):
        _run_python(tmp_path)


@NO_LOGGER
@pytest.mark.slow
def test_the_code_in_full(tmp_path: Path) -> None:
    with at_work(tmp_path, size=None):
        _run_python(tmp_path)


def _run_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for program, *arguments in COMMANDS:
        main = {"muter": cli.main, "muter-report": report.main}[program]
        assert not main(arguments), (arguments, capsys.readouterr().err)


@pytest.mark.slow
def test_the_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with at_work(tmp_path, size=None):
        _run_commands(capsys)
    assert "forgotten: 2 rows" in capsys.readouterr().out


@pytest.mark.slow
def test_the_main_job(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_muter.study.experiment"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert list(tmp_path.glob("outputs/*/*/report.md"))


def _figures() -> Any:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_those_of_the_results() -> None:
    figures = _figures()
    texts = [page.read_text() for page in figures.PAGES]
    assert README in figures.PAGES
    assert sorted(re.findall(r"<!-- figures: (\w+) -->", "".join(texts))) == sorted(figures.TABLES)
    assert [figures.filled(text) for text in texts] == texts, "run `python docs/figures.py`"


def test_it_is_short() -> None:
    assert len(README.read_text().split()) <= MOST_WORDS


def test_there_are_no_other_figures() -> None:
    """Outside of these tables and of code no number is quoted: it could not be held."""
    text = re.sub(
        r"<!-- figures.*?<!-- end of figures -->|```.*?```|`[^`]*`|\]\([^)]*\)", "", README.read_text(), flags=re.DOTALL
    )
    text = re.sub(r"Python 3\.10 to 3\.13|Apache-2\.0", "", text)
    assert re.findall(r"\d+\.\d+|\d+ ?%", text) == []


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
