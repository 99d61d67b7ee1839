"""Table and picture of the rows that run.py wrote:  python examples/whole_network/report.py FOLDER"""

from __future__ import annotations

import csv
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

FIGURES = {
    "agreement": "agreement with retraining, forgotten samples",
    "agreement_adversarial": "the same, attacked",
    "kl": "KL(retrained \N{PARALLEL TO} method), forgotten samples",
    "kl_adversarial": "the same, attacked",
    "clean_gap": "clean accuracy gap",
    "robust_gap": "robust accuracy gap",
    "membership_gap": "membership AUC gap",
    "seconds": "seconds",
}
PANELS = {
    "kl": "KL to retraining,\nforgotten samples",
    "kl_adversarial": "KL to retraining,\nforgotten, attacked",
    "robust_gap": "gap of robust\ntest accuracy",
    "membership_gap": "gap of the\nmembership AUC",
}
LOGARITHMIC = ("kl", "kl_adversarial")


def spread(rows: list[dict[str, str]], figure: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [float(r[figure]) for r in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(rows: list[dict[str, str]]) -> str:
    text = []
    for removed in dict.fromkeys(r["removed"] for r in rows):
        some = [r for r in rows if r["removed"] == removed]
        seeds = len({r["seed"] for r in some})
        text += [f"**{removed} removed** (mean ± standard deviation over {seeds} seeds)", ""]
        text.append("| method | " + " | ".join(FIGURES.values()) + " |")
        text.append("|---|" + "---|" * len(FIGURES))
        for method in dict.fromkeys(r["method"] for r in some):
            own = [r for r in some if r["method"] == method]
            cells = ["{:.3g} ± {:.2g}".format(*spread(own, figure)) for figure in FIGURES]
            text.append(f"| {method} | " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def picture(rows: list[dict[str, str]], path: Path) -> None:
    groups = list(dict.fromkeys(r["removed"] for r in rows))
    methods = [m for m in dict.fromkeys(r["method"] for r in rows) if m != "retraining"]
    fig, axes = plt.subplots(
        len(groups),
        len(PANELS),
        figsize=(11, 2.2 * len(groups) + 0.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colours = {m: "tab:blue" if m.startswith("ours") else "0.45" for m in methods}
    for line, removed in zip(axes, groups, strict=True):
        for ax, (figure, title) in zip(line, PANELS.items(), strict=True):
            for height, method in enumerate(reversed(methods)):
                own = [r for r in rows if r["removed"] == removed and r["method"] == method]
                mean, deviation = spread(own, figure)
                ax.errorbar(mean, height, xerr=deviation, fmt="o", ms=4, capsize=2, color=colours[method])
                ax.plot(
                    [float(r[figure]) for r in own], [height] * len(own), "|", ms=7, alpha=0.5, color=colours[method]
                )
            if figure in LOGARITHMIC:
                ax.set_xscale("log")
                ax.xaxis.set_minor_formatter(NullFormatter())
            else:
                ax.set_xlim(left=0)
            ax.set_yticks(range(len(methods)), list(reversed(methods)))
            ax.grid(axis="x", alpha=0.3)
            if removed == groups[0]:
                ax.set_title(title, fontsize=10)
        line[0].set_ylabel(f"{removed} removed")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def write_report(folder: Path) -> None:
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (folder / "report.md").write_text(markdown(rows))
    picture(rows, folder / "comparison.png")
    print(markdown(rows))


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
