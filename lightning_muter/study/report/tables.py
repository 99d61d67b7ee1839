"""Result rows as tables: for the terminal (rich) and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_muter.study.report.rows import FLOORS, Row, Summary, attack_name, group, summarise

HEADERS = (
    "removed",
    "method",
    "distance to retraining",
    "clean acc. %",
    "clean gap",
    "robust acc. %",
    "robust gap",
    "solver",
    "seconds",
    "speed-up",
)
# the same in little room: what follows the line break goes below
SHORT = (
    *("re-\nmoved", "\nmethod", "dis-\ntance", "clean\n%", "\ngap", "robust\n%", "\ngap"),
    *("\nsolver", "\nsec.", "speed\n-up"),
)


def number(value: float, digits: int = 3) -> str:
    """A figure with a few significant digits; "-" where it was not measured.

    >>> number(0.04567), number(12345.6), number(323.4, 2), number(math.nan)
    ('0.0457', '12346', '320', '-')
    """
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    short = f"{value:.{digits}g}"
    return f"{float(short):.0f}" if "e" in short else short


def spread(summary: Summary, digits: int = 3) -> str:
    """``median (max m)`` over repetitions, the figure alone for a single one."""
    if summary.n <= 1 or summary.max == summary.median:
        return number(summary.median, digits)
    return f"{number(summary.median, digits)} (max {number(summary.max, digits)})"


def _gap(summary: Summary) -> str:
    return f"{summary.mean:+.1f}".replace("-0.0", "+0.0") if summary.n else "-"


def _points(summary: Summary) -> str:
    return _gap(summary) if summary.n <= 1 else f"{_gap(summary)} ± {summary.std:.1f}"


def _percent(summary: Summary) -> str:
    return f"{100 * summary.mean:.1f}" if summary.n else "-"


def _status(rows: Sequence[Row]) -> str:
    counts = {status: len(found) for status, found in group(rows, lambda r: r.status).items() if status}
    if len(counts) <= 1:
        return next(iter(counts), "-")
    return ", ".join(f"{status} x{n}" for status, n in counts.items())


def cells(rows: Sequence[Row]) -> tuple[str, ...]:
    """One line of the table for the repetitions of one method in one setting."""
    first = rows[0]
    return (
        first.setting,
        first.method,
        spread(summarise(rows, "distance")),
        _percent(summarise(rows, "clean_acc")),
        _points(summarise(rows, "clean_gap")),
        _percent(summarise(rows, "robust_acc")),
        _points(summarise(rows, "robust_gap")),
        _status(rows),
        number(summarise(rows, "seconds_request").median or math.nan, 2),
        number(summarise(rows, "speedup").median, 2),
    )


def title(rows: Sequence[Row]) -> str:
    """Names of what is the same in all rows.

    >>> title([Row("digits", "cnn", "pgd_l2", "5 %", "newton", eps=0.25)])
    'digits, cnn, pgd_l2 eps=0.25 (1 repetition)'
    """
    first = rows[0]
    n = len({(r.seed, r.forget_seed) for r in rows})
    return f"{first.dataset}, {first.model}, {attack_name(first)} ({n} repetition{'s' * (n != 1)})"


def noise_floor(rows: Sequence[Row]) -> str:
    """What to say of how far two retrainings end apart, setting by setting; "" where a second one was not run."""
    found = {
        setting: summarise([r for r in same if r.method in FLOORS], "distance")
        for setting, same in group(rows, lambda r: r.setting).items()
    }
    parts = [f"{number(summary.max, 2)} ({setting})" for setting, summary in found.items() if summary.n]
    if not parts:
        return ""
    apart = ", ".join(parts)
    return f"Noise floor: two retrainings end {apart} apart; smaller distances say nothing."


def problems(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by dataset, model and attack."""
    return list(group(rows, lambda r: r.problem).values())


def lines(rows: Sequence[Row]) -> list[list[Row]]:
    """Repetitions by setting, then method, both in the order in which they were run."""
    by_setting = group(rows, lambda r: r.setting).values()
    return [same for found in by_setting for same in group(found, lambda r: r.method).values()]


def terminal_table(rows: Sequence[Row]) -> Table:
    """A rich table of one problem, readable from 80 columns on: words wrap, figures do not; medians and means only,
    the largest distance in a column of its own where there are repetitions.
    """
    repeated = len({(r.seed, r.forget_seed) for r in rows}) > 1
    caption = noise_floor(rows) or None
    table = Table(
        title=title(rows),
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column, header in enumerate(SHORT):
        words = {0: 5, 1: 16, 7: 3}
        table.add_column(
            header,
            justify="left" if column in words else "right",
            no_wrap=column not in words,
            min_width=words.get(column),
            overflow="fold" if column == 7 else "ellipsis",
        )
        if repeated and column == 2:
            table.add_column("\nmax", justify="right", no_wrap=True)
    previous: str | None = None
    for same in lines(rows):
        if previous is not None and same[0].setting != previous:
            table.add_section()
        distance = summarise(same, "distance")
        shown = list(cells(same))
        shown[0] = "" if same[0].setting == previous else shown[0]
        shown[2] = number(distance.median, 2)
        shown[4], shown[6] = (_gap(summarise(same, name)) for name in ("clean_gap", "robust_gap"))
        if repeated:
            shown.insert(3, number(distance.max, 2))
        table.add_row(*shown)
        previous = same[0].setting
    return table


def markdown_table(headers: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    r"""A Markdown table; bars inside cells are escaped.

    >>> print(markdown_table(["a"], [["x|y"]]))
    | a |
    | --- |
    | x\|y |
    """
    rendered = ["| " + " | ".join(headers) + " |", "| " + " | ".join("---" for _ in headers) + " |"]
    rendered += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in body]
    return "\n".join(rendered)


def problem_markdown(rows: Sequence[Row]) -> str:
    """The table of one problem under its title, as Markdown."""
    floor = noise_floor(rows)
    table = markdown_table(HEADERS, (cells(same) for same in lines(rows)))
    return f"### {title(rows)}\n\n{table}\n" + (f"\n{floor}\n" if floor else "")
