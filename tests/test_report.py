"""Rows survive the way to disk and back, summaries are the textbook ones, and the report holds what was measured."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
from pathlib import Path

import matplotlib.image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_muter.errors import CorruptFileError
from lightning_muter.study.report import plots, report, tables
from lightning_muter.study.report import rows as results
from lightning_muter.study.report.rows import Row, append_rows, from_csv, read_rows, summarise, to_csv, write_rows


def make(method: str = "newton", setting: str = "5 %", seed: int = 0, **values: float | str) -> Row:
    row = Row("digits", "cnn", "pgd_l2", setting, method, eps=0.25, seed=seed, percent=5.0, n_forgotten=30)
    for name, value in values.items():
        setattr(row, name, value)
    return row


def study(seeds: int = 3) -> list[Row]:
    methods = {"constraint-aware": 0.05, "doing nothing": 1.0}
    rows = []
    for setting, percent in (("1 %", 1.0), ("5 %", 5.0), ("20 %", 20.0)):
        for seed in range(seeds):
            for method, distance in methods.items():
                row = make(method, setting, seed, distance=distance * (1 + seed / 10), clean_acc=0.95, robust_acc=0.8)
                row.clean_gap, row.robust_gap = 0.1 * seed, -0.5
                row.percent, row.n_forgotten = percent, int(percent)
                row.seconds_request, row.seconds_retrain, row.status = 0.5, 10.0, "converged"
                row.agreement_test_clean, row.kl_test_clean = 0.99, 1e-4
                rows.append(row)
    return rows


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(method=text, note=text, value=st.floats(1e-300, 1e300), seed=st.integers(0, 2**31))
def test_rows_survive_csv(method: str, note: str, value: float, seed: int) -> None:
    (row,) = from_csv(to_csv([make(method, seed=seed, distance=value, note=note)]))
    assert (row.method, row.note, row.seed) == (method, note, seed)
    assert row.distance == pytest.approx(value, rel=1e-5)
    assert math.isnan(row.bound)


def _append(path: Path, seed: int) -> None:
    for i in range(20):
        append_rows(path, [make(f"m{i}", seed=seed)])


def test_appending_from_several_processes_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    workers = [multiprocessing.get_context("spawn").Process(target=_append, args=(path, s)) for s in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert {(r.method, r.seed) for r in read_rows(path)} == {(f"m{i}", s) for i in range(20) for s in range(2)}
    assert path.read_text().count("dataset,model") == 1


@pytest.mark.parametrize("links", [True, False])
def test_the_table_of_whoever_was_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Another process makes the table between our look and our write, on file systems with hard links or without."""
    path, link = tmp_path / "results.csv", os.link

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        append_rows(path, [make("theirs")])
        if not links:
            raise PermissionError("no hard links here")
        link(source, target)

    monkeypatch.setattr(os, "link", overtaken)
    append_rows(path, [make("ours")])
    assert path.read_text() == to_csv([make("theirs"), make("ours")])
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]


def test_tables_need_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    append_rows(tmp_path / "results.csv", [make()])
    assert (tmp_path / "results.csv").read_text() == to_csv([make()])


def test_reading_a_folder_keeps_each_measurement_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "a/results.csv", [make(distance=1.0), make("other", distance=3.0)])
    write_rows(tmp_path / "b/results.csv", [make(distance=2.0)])
    rows = {r.method: r.distance for r in read_rows(tmp_path)}
    assert rows == {"newton": 2.0, "other": 3.0}
    with pytest.raises(FileNotFoundError, match="Run muter-experiment"):
        read_rows(tmp_path / "nothing")


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="no column"):
        from_csv("a,b\n1,2\n", origin="x.csv")
    broken = to_csv([make()]).replace(",0.25,", ",quarter,")
    with pytest.raises(CorruptFileError, match=r"x\.csv, line 2"):
        from_csv(broken, origin="x.csv")


def test_summaries_match_the_statistics_module() -> None:
    values = [0.3, 0.1, 0.7, 0.2]
    s = summarise([make(seed=i, distance=v) for i, v in enumerate([*values, math.nan])], "distance")
    assert (s.n, s.median, s.max, s.min) == (4, statistics.median(values), 0.7, 0.1)
    assert s.mean == pytest.approx(statistics.mean(values))
    assert s.std == pytest.approx(statistics.stdev(values))
    assert math.isnan(summarise([], "distance").median)
    assert make(seconds_request=0.5, seconds_retrain=10.0).speedup == 20
    assert math.isnan(make(seconds_request=0.0, seconds_retrain=10.0).speedup)


def test_terminal_table_shows_every_line_in_80_columns() -> None:
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(tables.terminal_table(study()))
    shown = capture.get()
    assert "constraint-aware" in shown
    assert "digits, cnn, pgd_l2 eps=0.25 (3 repetitions)" in shown
    assert shown.count("0.055") == 3  # the median of 0.05, 0.055, 0.06 in three settings
    assert "…" not in shown


def test_markdown_escapes_what_would_break_the_table() -> None:
    line = tables.markdown_table(["a", "b"], [["x|y", "z"]]).splitlines()[2]
    assert line == "| x\\|y | z |"


def test_report_of_a_folder_holds_figures_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "run/results.csv", study())
    assert report.main([str(tmp_path), "--heading", "A <study>"]) == 0
    markdown = (tmp_path / "report.md").read_text()
    assert "| 5 % | constraint-aware | 0.055 (max 0.06) | 95.0 | +0.1 ± 0.1 | 80.0 | -0.5 ± 0.0 |" in markdown
    assert "99.0 (1.0e-04)" in markdown
    page = (tmp_path / "report.html").read_text()
    assert "A &lt;study&gt;" in page
    assert 'src="distance' not in page
    assert page.count("data:image/png;base64,") == 4
    for name in report.PICTURES:
        picture = matplotlib.image.imread(tmp_path / name)
        assert picture.shape[0] > 200
        assert picture[..., :3].std() > 0.05  # something is drawn
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "muter-report" in capsys.readouterr().err


def test_notes_are_one_line_per_method_and_problem() -> None:
    rows = [make("MUter", f"{i} %", note=f"refused after {i}") for i in range(1, 6)] + [make("other", note="capped")]
    text = report.notes_markdown(rows)
    assert text.splitlines() == [
        "- MUter (cnn, pgd_l2; 1 %, 2 %, 3 % and 2 more): refused after 1",
        "- other (cnn, pgd_l2; 5 %): capped",
    ]


def test_pictures_without_their_figures_are_left_out(tmp_path: Path) -> None:
    assert plots.plot_all([make()], tmp_path) == []
    assert [p.name for p in plots.plot_all([make(distance=0.1)], tmp_path)] == ["distance.png"]


def test_a_row_has_a_column_for_every_field() -> None:
    header = to_csv([]).strip().split(",")
    assert header == results.COLUMNS
    assert len(set(header)) == len(header)


def test_the_report_holds_bounds_against_distances() -> None:
    rows = []
    for seed, (bound, own) in enumerate(((0.3, 0.0), (0.1, 0.15), (0.05, 0.1))):
        rows += [
            make("retraining", seed=seed, bound=own, distance_absolute=0.0),
            make("constraint-aware + 2 refine", seed=seed, bound=bound, distance_absolute=0.2),
            make("doing nothing", seed=seed, distance_absolute=1.0),
        ]
    text = report.compose(rows, [])
    assert "| constraint-aware + 2 refine | 0.5 | 1.5 | 2 of 3 |" in text
    assert "## Certificate" not in report.compose([make(distance_absolute=0.2)], [])
