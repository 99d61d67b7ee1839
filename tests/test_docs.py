"""The documentation: its code runs, its pages are all in the navigation, every public name is there with a docstring."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import lightning_muter
from lightning_muter import UnlearnResult, cli
from lightning_muter.errors import ArgumentError
from lightning_muter.study.report import report

from .readme import NO_LOGGER, ROOT, at_work, blocks, words

DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if any(b.language == "python" for b in blocks(DOCS / page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page(page: str, tmp_path: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    with at_work(tmp_path, size=None):
        for block in blocks(DOCS / page):
            if block.language == "python":
                exec(compile(block.text, page, "exec"), names)


@NO_LOGGER
@pytest.mark.slow
@pytest.mark.parametrize("page", ["tutorials/deletion_request.md", "recipes/command_line.md"])
def test_the_commands_of_a_page(page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with at_work(tmp_path, size=None):
        for block in blocks(DOCS / page):
            for program, *arguments in map(words, block.lines()):
                assert not {"muter": cli.main, "muter-report": report.main}[program](arguments), arguments
    assert "no problems found" in capsys.readouterr().out  # of muter audit


def test_every_page_is_in_the_navigation() -> None:
    assert set(PAGES) == set(re.findall(r": ([\w/]+\.md)", (ROOT / "mkdocs.yml").read_text()))


def test_every_public_name_is_documented() -> None:
    text = (DOCS / "reference" / "api.md").read_text()
    for name in lightning_muter.__all__:
        value = getattr(lightning_muter, name)
        assert f"::: {value.__module__}.{name}\n" in text
        assert value.__doc__, name
        if inspect.isclass(value):
            own = [n for n, m in vars(value).items() if not n.startswith(("_", "on_")) and inspect.isfunction(m)]
            assert [n for n in own if not inspect.getdoc(getattr(value, n))] == [], name


def test_pictures_of_a_request() -> None:
    options = {
        "method": "muter",
        "response": "l2",
        "scope": "head",
        "forgotten": [3],
        "n_retained": 9,
        "step_norm": 0.1,
    }
    measured = {"stationarity_before": 0.1, "stationarity_after": 1e-3, "refine": [1e-2], "bound": 0.5}
    axis = UnlearnResult(**options, solver={}, **measured).plot()  # type: ignore[arg-type]
    assert list(axis.lines[0].get_ydata()) == [0.1, 1e-2, 1e-3]
    assert "0.5" in axis.get_title()
    with pytest.raises(ArgumentError, match="retain=train_dataset"):
        UnlearnResult(**options, solver={}).plot()  # type: ignore[arg-type]
