"""One page for a person who decides: ``muter-report FOLDER`` reads every ``results.csv`` and ``audit.csv`` below it and writes
``report.md``, ``report.html`` (one file, pictures inside) and the pictures; ``muter-report CHECKPOINT`` reads its ledger.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_muter.deletion.files import Places
from lightning_muter.errors import MuterError
from lightning_muter.study.audit.tables import read_audit
from lightning_muter.study.report import plots, tables
from lightning_muter.study.report.checkpoint import checkpoint_markdown
from lightning_muter.study.report.closest import closest_markdown
from lightning_muter.study.report.decision import decision_markdown
from lightning_muter.study.report.page import to_html
from lightning_muter.study.report.rows import PARTS, REFERENCE, Row, group, read_rows, summarise

PICTURES = {
    "distance.png": "Each method's distance to the model retrained without the removed samples. Dot: median over the "
    "repetitions; bar: smallest to largest.",
    "distance_by_size.png": "The same distance against the share removed at random. Dashed: doing nothing.",
    "accuracy_gaps.png": "Accuracy on the test set minus the retrained model's. Dot: mean; bar: smallest to largest.",
    "time.png": "Time of one request. Dot: median; bar: smallest to largest; dashed: retraining.",
}
LEGEND = (
    "*Distance to retraining* is ‖w_u − w_r‖ / ‖w − w_r‖: 0 is retraining, 1 is as good as doing nothing. *Gaps* are "
    "percentage points on the test set, the method minus retraining. *Seconds* are the median time of one request and "
    "*speed-up* is retraining's time over it. *Solver* is the status that the method reported. All of it is read from "
    "`results.csv`."
)


def closeness_markdown(rows: Sequence[Row]) -> str:
    """Agreement (%) and KL (nats) with the retrained model's predictions on forget, retain and test sets."""
    headers = ["removed", "method", *(f"{part} {kind}" for part in PARTS for kind in ("clean", "robust"))]
    body = []
    for same in tables.lines(rows):
        shown = []
        for part in PARTS:
            for kind in ("clean", "robust"):
                agreed = summarise(same, f"agreement_{part}_{kind}")
                kl = summarise(same, f"kl_{part}_{kind}")
                shown.append(f"{100 * agreed.mean:.1f} ({tables.number(kl.median, 2)})" if agreed.n else "-")
        if any(cell != "-" for cell in shown):
            body.append([same[0].setting, same[0].method, *shown])
    if not body:
        return ""
    return f"### {tables.title(rows)}\n\n{tables.markdown_table(headers, body)}\n"


def cost_markdown(rows: Sequence[Row]) -> str:
    """Snapshot, request and retraining seconds, and the bytes of the stored state, per method."""
    headers = ["method", "snapshot s", "request s", "retraining s", "stored state"]
    body = []
    for method, same in group(rows, lambda r: r.method).items():
        times = [
            tables.number(summarise(same, f"seconds_{part}").median, 2) for part in ("snapshot", "request", "retrain")
        ]
        body.append([method, *times, size(summarise(same, "state_bytes").median)])
    return f"### {tables.title(rows)}\n\n{tables.markdown_table(headers, body)}\n"


def certificate_markdown(rows: Sequence[Row]) -> str:
    """Certified bounds over measured distances, per method; and how many distances are within the method's bound and the
    reference's own, as every one must be. Empty without bounds.
    """
    own = {_removal(r): r.bound for r in rows if r.method == REFERENCE}
    body = []
    for method, same in group(rows, lambda r: r.method).items():
        known = [r for r in same if method != REFERENCE and r.distance_absolute > 0 and not math.isnan(r.bound)]
        if not known:
            continue
        ratios = [r.bound / r.distance_absolute for r in known]
        sums = [(r.distance_absolute, r.bound + own.get(_removal(r), math.nan)) for r in known]
        sums = [(distance, total) for distance, total in sums if not math.isnan(total)]
        within = f"{sum(distance <= total for distance, total in sums)} of {len(sums)}" if sums else "-"
        body.append([method, *(tables.number(v, 2) for v in (statistics.median(ratios), max(ratios))), within])
    if not body:
        return ""
    headers = ["method", "bound / distance, median", "max", "within both bounds"]
    return f"### {tables.title(rows)}\n\n{tables.markdown_table(headers, body)}\n"


def _removal(row: Row) -> tuple[str, int, int, int]:
    return row.setting, row.n_forgotten, row.seed, row.forget_seed


def size(count: float) -> str:
    """Bytes in a unit that reads well.

    >>> size(2_500_000), size(float("nan"))
    ('2.5 MB', '-')
    """
    if count != count:
        return "-"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def notes_markdown(rows: Sequence[Row]) -> str:
    """One line per method and problem: where a note was made, and the first one."""
    lines = []
    for same in group(rows, lambda r: (r.method, r.model, r.attack)).values():
        first, settings = same[0], list(dict.fromkeys(r.setting for r in same))
        shown = ", ".join(settings[:3]) + (f" and {len(settings) - 3} more" if len(settings) > 3 else "")
        lines.append(f"- {first.method} ({first.model}, {first.attack}; {shown}): {first.note}")
    return "\n".join(lines) + "\n"


def compose(
    rows: Sequence[Row], pictures: Sequence[Path], *, heading: str = "Unlearning study", decision: str = ""
) -> str:
    """The report as Markdown, what a decision needs (``decision``) first; pictures are named relative to it."""
    problems = tables.problems(rows)
    failed = [r for r in rows if r.note]
    parts = [f"# {heading}\n", decision, "## All figures\n", LEGEND + "\n"]
    parts += [f"![{PICTURES[p.name]}]({p.name})\n\n{PICTURES[p.name]}\n" for p in pictures]
    closest = closest_markdown(rows)
    if closest:
        parts += ["## Closest to retraining\n", closest]
    parts += ["## Distance, accuracy, time\n", *(tables.problem_markdown(same) for same in problems)]
    closeness = [text for same in problems if (text := closeness_markdown(same))]
    if closeness:
        intro = "Agreement of the predicted classes in %, in brackets KL(retrained ‖ unlearned) in nats.\n"
        parts += ["## Predictions against the retrained model's\n", intro, *closeness]
    certificates = [text for same in problems if (text := certificate_markdown(same))]
    if certificates:
        intro = (
            "The bound is on the distance to the minimiser, the distance is measured to the reference, which is near it: "
            "below 1 the reference is the further one. It has a bound of its own; no distance may exceed the sum of both.\n"
        )
        parts += ["## Certificate\n", intro, *certificates]
    intro = (
        "Medians. *Snapshot*: taken once after training. *Request*: each removal. *Stored state*: what is kept for later requests, "
        "beside the model.\n"
    )
    parts += ["## Cost\n", intro, *(cost_markdown(same) for same in problems)]
    if failed:
        parts += ["## Notes\n", notes_markdown(failed)]
    return "\n".join(parts)


def wide_console() -> Console:
    """The terminal; a pipe or a log file gets 120 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def write_report(folder: Path, out: Path | None = None, *, heading: str = "Unlearning study") -> Path:
    """Read all runs below ``folder``, write pictures, ``report.md`` and ``report.html`` to ``out`` (default: there).

    Returns:
        the path of ``report.md``.

    Raises:
        FileNotFoundError: no run in the folder.
    """
    rows = read_rows(folder)
    out = out if out is not None else folder if folder.is_dir() else folder.parent
    out.mkdir(parents=True, exist_ok=True)
    pictures = plots.plot_all(rows, out)
    roc = plots.plot_roc(read_audit(folder)[2] if folder.is_dir() else [], out / "audit_roc.png")
    decision = decision_markdown(rows, folder, None if roc is None else roc.name)
    text = compose(rows, pictures, heading=heading, decision=decision)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(to_html(text, out), encoding="utf-8")
    return out / "report.md"


def write_checkpoint_report(path: Path, out: Path | None = None) -> Path:
    """``<stem>.muter.report.md`` and ``.html`` beside a checkpoint (or in ``out``); returns the path of the Markdown.

    Raises:
        RequestError: there is no ledger beside it.
    """
    places = Places.of(path)
    folder = places.folder if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    text, page = checkpoint_markdown(places), folder / f"{places.stem}.muter.report.md"
    page.write_text(text, encoding="utf-8")
    page.with_suffix(".html").write_text(to_html(text, folder), encoding="utf-8")
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `muter-report`; 0 where a page was written."""
    parser = argparse.ArgumentParser(
        prog="muter-report",
        description="One page for a person who decides: of a folder of muter-experiment runs, or of a checkpoint that requests have "
        "changed (what was removed, how close to retraining, accuracies, ledger, limits), as HTML and Markdown.",
    )
    parser.add_argument(
        "source",
        type=Path,
        help="output folder of a run or sweep, a folder of such folders, or a checkpoint <name>.muter.ckpt",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="where to write the report (default: beside what it is of)"
    )
    parser.add_argument("--heading", default="Unlearning study", help="the report's title, for runs")
    options = parser.parse_args(arguments)
    console = wide_console()
    try:
        if options.source.suffix == ".ckpt":
            written = write_checkpoint_report(options.source, options.out)
        else:
            written = write_report(options.source, options.out, heading=options.heading)
            for same in tables.problems(read_rows(options.source)):
                console.print(tables.terminal_table(same))
    except (MuterError, OSError) as error:
        print(f"muter-report: {error}", file=sys.stderr)
        return 2
    console.print(f"Report: {written} (and {written.with_suffix('.html').name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
