"""The documentation: its code runs, its pages are all in the navigation, every public name is there with a docstring."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightning_muter
from lightning_muter import ThreatModel, UnlearnResult, cli, take_snapshot
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


def test_pictures_are_there_and_those_of_the_results() -> None:
    for page in PAGES:
        for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", (DOCS / page).read_text()):
            assert (DOCS / page).parent.joinpath(picture).exists(), (page, picture)
    drawn = ROOT / "examples" / "results" / "softmax_l2_main" / "distance.png"
    assert (DOCS / "pictures" / "distance.png").read_bytes() == drawn.read_bytes(), "run `python docs/pictures.py`"


def test_docstrings_are_shown_in_the_words_of_the_site() -> None:
    spec = importlib.util.spec_from_file_location("shown_docstrings", DOCS / "shown_docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.shown("Twice :class:`a.B`.\n\n>>> 1 + 1\n2\n\nMore.") == (
        "Twice `a.B`.\n\nMore.\n\nExamples:\n    >>> 1 + 1\n    2"
    )
    assert "\nExamples:\n    >>> t = ThreatModel" in module.shown(inspect.getdoc(ThreatModel.project))


def test_every_page_is_in_the_navigation() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    assert set(PAGES) == set(re.findall(r": ([\w/]+\.md)", settings))
    keys = re.findall(r"^ +\w+:", settings, re.MULTILINE)
    assert len(keys) == len(set(keys))  # of two alike YAML takes the last


def test_every_public_name_is_documented() -> None:
    text = (DOCS / "reference" / "api.md").read_text()
    for name in lightning_muter.__all__:
        value = getattr(lightning_muter, name)
        assert f"::: {value.__module__}.{name}\n" in text
        assert value.__doc__, name
        if inspect.isclass(value):
            own = [n for n, m in vars(value).items() if not n.startswith(("_", "on_")) and inspect.isfunction(m)]
            assert [n for n in own if not inspect.getdoc(getattr(value, n))] == [], name


@pytest.mark.parametrize(("kind", "of"), [("linear", "stationarity"), ("network", "gap to the least objective")])
def test_the_curve_of_a_polish(kind: str, of: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(40, 4)
    rows = TensorDataset(x, (x[:, 0] > 0.5).long())
    model = nn.Linear(4, 2) if kind == "linear" else nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[:-1].requires_grad_(False) if kind == "network" else None
    threat = ThreatModel("l2", 0.05, None)
    snapshot = take_snapshot(model, rows, threat_model=threat, weight_decay=1e-2, progress=False)
    axis, polish = snapshot.plot(), snapshot.figures["polish"]
    begin = [polish["stationarity_before"]] if kind == "linear" else []
    assert axis.get_ylabel() == of
    assert list(axis.lines[0].get_ydata()) == [*begin, *polish["curve"]]
    assert polish["curve"][-1] < 0.1 * polish["curve"][0]


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
    assert "(3 more)" in str(UnlearnResult(**options, solver={}, **measured | {"refine": [0.1] * 9}))  # type: ignore[arg-type]
    axis = UnlearnResult(**options, solver={}, **measured).plot()  # type: ignore[arg-type]
    assert list(axis.lines[0].get_ydata()) == [0.1, 1e-2, 1e-3]
    assert "0.5" in axis.get_title("left")
    with pytest.raises(ArgumentError, match="retain=train_dataset"):
        UnlearnResult(**options, solver={}).plot()  # type: ignore[arg-type]
