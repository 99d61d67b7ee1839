"""Tables of figures in README and on the page of results, made from the committed results: `python docs/figures.py` writes them,
a test compares them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
RESULTS = ROOT / "examples" / "results"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)
STEP, REFINED, FLOOR = "constraint-aware", "constraint-aware + 2 refine", "retraining, warm start"


def rows(folder: str, name: str) -> list[dict[str, str]]:
    """The rows of one results file."""
    with (RESULTS / folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _seconds(text: str) -> str:
    value = float(text)
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def _measured() -> list[tuple[dict[str, str], ...]]:
    """One step, refined, retraining and the noise floor at 5 % removed: of a linear model, and of the head of a CNN."""
    columns = []
    for folder in ("softmax_l2_main", "main_job"):
        found = {r["method"]: r for r in rows(folder, "results.csv") if r["setting"] == "5 %"}
        columns.append((found[STEP], found[REFINED], found["retraining"], found[FLOOR]))
    return columns


def cost() -> str:
    """Seconds of the end of the fit, of one step, of a certified one, and of retraining."""
    of = {
        "end of the fit, once": (0, "seconds_snapshot"),
        "one step": (0, "seconds_request"),
        "two refine steps, certified if linear": (1, "seconds_request"),
        "retraining": (2, "seconds_retrain"),
    }
    columns = _measured()
    first = columns[0][0]
    lines = [
        f"| {first['n_forgotten']} of {first['n_total']} digits removed, two cores | softmax regression | head of a CNN |",
        "| --- | --- | --- |",
    ]
    for name, (at, field) in of.items():
        lines.append(f"| {name} | {' | '.join(_seconds(column[at][field]) for column in columns)} |")
    return "\n".join([*lines, ""])


def distances() -> str:
    """End of the fit, one step, refined and certified, retraining: seconds, and distances where there are some."""
    columns = _measured()
    (linear, linear_refined, linear_again, linear_floor), (net, net_refined, net_again, net_floor) = columns
    total, gone = linear["n_total"], linear["n_forgotten"]
    near = [f"{float(r['distance']):.2g}" for r in (linear, linear_refined, net, net_refined)]
    floors = [f"{float(r['distance']):.2g}" for r in (linear_floor, net_floor)]
    lines = [
        f"| {gone} of {total} digits removed | softmax | distance | CNN's head | distance |",
        "| --- | --- | --- | --- | --- |",
        f"| end of the fit, once | {_seconds(linear['seconds_snapshot'])} | | {_seconds(net['seconds_snapshot'])} | |",
        f"| one step | {_seconds(linear['seconds_request'])} | {near[0]} | {_seconds(net['seconds_request'])} | {near[2]} |",
        f"| two refine steps | {_seconds(linear_refined['seconds_request'])} | {near[1]} "
        f"| {_seconds(net_refined['seconds_request'])} | {near[3]} |",
        f"| retraining | {_seconds(linear_again['seconds_retrain'])} | 0 | {_seconds(net_again['seconds_retrain'])} | 0 |",
        f"| a second retraining | {_seconds(linear_floor['seconds_request'])} | {floors[0]} "
        f"| {_seconds(net_floor['seconds_request'])} | {floors[1]} |",
    ]
    return "\n".join([*lines, "", "Sources: `softmax_l2_main` and `main_job` in `examples/results`.", ""])


def audit() -> str:
    """U-LiRA on clean inputs: can a removed sample be told from one that was never seen?"""
    named = {
        "doing nothing": "doing nothing",
        "MUter (paper)": "published formula",
        "direct-only Newton": "direct part alone",
        STEP: "one step",
        REFINED: "two refine steps",
        "retraining": "retraining",
    }
    found = {
        r["method"]: r for r in rows("audit_softmax", "audit.csv") if (r["attack"], r["inputs"]) == ("U-LiRA", "clean")
    }
    first = found[STEP]
    lines = [
        f"| {first['candidates']} mislabelled, {first['worlds']} worlds | AUC [95 %] | clean / robust accuracy |",
        "| --- | --- | --- |",
    ]
    for method, name in named.items():
        r = {key: float(found[method][key]) for key in ("auc", "auc_low", "auc_high", "clean", "robust")}
        lines.append(
            f"| {name} | {r['auc']:.2f} [{r['auc_low']:.2f}, {r['auc_high']:.2f}] "
            f"| {100 * r['clean']:.1f} / {100 * r['robust']:.1f} % |"
        )
    return "\n".join([*lines, ""])


TABLES: dict[str, Callable[[], str]] = {"cost": cost, "distances": distances, "audit": audit}


def filled(text: str) -> str:
    """The text with every block of figures made anew."""
    return BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + m[4], text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
