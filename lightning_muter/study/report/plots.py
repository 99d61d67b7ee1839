"""Pictures of a study: one message each, colours that stay apart for colour-blind readers, shapes that repeat them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightning_muter.pictures import log_scale
from lightning_muter.study.report.rows import NOTHING, REFERENCE, Row, attack_name, group, summarise

# Okabe and Ito's palette, black last; the markers repeat the information
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MANY = 5  # more settings than this are drawn as a map
SMALLEST = 1e-6  # distances below this are drawn here: they are retraining to all purposes
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]}


def _panels(rows: Sequence[Row], height: float, width: float = 7.2) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """One panel per problem, at most two in a line, on shared scales."""
    found = list(group(rows, lambda r: r.problem).values())
    columns = 1 if len(found) == 1 else 2
    lines = math.ceil(len(found) / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(width if columns == 1 else 1.55 * width, height * lines),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    flat = list(axes.flat)
    for unused in flat[len(found) :]:
        unused.set_visible(False)
    if len(found) > 1:
        for axis, same in zip(flat, found, strict=False):
            axis.set_title(f"{same[0].model}, {attack_name(same[0])}", fontsize=10, loc="left")
            axis.tick_params(labelbottom=True)
    return figure, list(zip(flat, found, strict=False))


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(group(rows, lambda r: r.method))


def _settings(rows: Sequence[Row]) -> list[str]:
    return list(group(rows, lambda r: r.setting))


def _save(figure: Figure, title: str, path: Path) -> Path:
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def _mark(axis: Axes, y: float, look: Mapping[str, Any], low: float, middle: float, high: float) -> None:
    """A dot with a bar from the least to the largest value."""
    axis.errorbar(middle, y, xerr=[[middle - low], [high - middle]], linestyle="", capsize=2, markersize=6, **look)


def _line_at(axis: Axes, x: float, name: str = "") -> None:
    """What methods are compared with."""
    axis.axvline(x, color="#444444", linewidth=1, linestyle="--", zorder=1)
    if name:
        axis.annotate(
            name, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(-3, 2), fontsize=8,
            textcoords="offset points", ha="right", va="bottom", color="#444444", annotation_clip=False,
        )  # fmt: skip


def _where(rows: Sequence[Row]) -> str:
    found = group(rows, lambda r: r.problem)
    if len(found) == 1:
        return ", ".join(next(iter(found)))
    return ", ".join(dict.fromkeys(r.dataset for r in rows))


def _dots(
    rows: Sequence[Row],
    path: Path,
    draw: Callable[[Axes, list[Row], float, dict[str, Any], str], None],
    *,
    series: Sequence[str],
    of: Callable[[Row], str] | None,
    decorate: Callable[[Axes, list[Row]], None],
    title: str,
) -> Path:
    """Methods downwards, one mark per series (a setting or a quantity) beside each other."""
    with plt.rc_context(STYLE):
        methods = _methods(rows)
        step = 0.66 / max(len(series), 1)
        figure, panels = _panels(rows, height=1.3 + 0.36 * len(methods) * max(1.0, len(series) / 3))
        for axis, same in panels:
            by_method = group(same, lambda r: r.method)
            for j, name in enumerate(series):
                offset = (j - (len(series) - 1) / 2) * step
                label = name
                for i, method in enumerate(methods):
                    found = [r for r in by_method.get(method, []) if of is None or of(r) == name]
                    if found:
                        draw(axis, found, i + offset, _look(j) | {"label": label}, name)
                        label = "_nolegend_"
            axis.set_yticks(range(len(methods)), methods)
            axis.set_ylim(len(methods) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
            for edge in range(1, len(methods)):
                axis.axhline(edge - 0.5, color="#eeeeee", linewidth=0.6, zorder=0)
            decorate(axis, same)
        handles, labels = panels[0][0].get_legend_handles_labels()
        if len(series) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(series), 6), frameon=False)
        return _save(figure, title, path)


def plot_distance(rows: Sequence[Row], path: Path) -> Path | None:
    """How far from retraining each method ends: median dot, bar from the least to the largest repetition, log scale."""
    rows = [r for r in rows if not math.isnan(r.distance)]
    if not rows:
        return None

    def draw(axis: Axes, found: list[Row], y: float, look: dict[str, Any], name: str) -> None:
        s = summarise(found, "distance")
        _mark(axis, y, look, *(max(v, SMALLEST) for v in (s.min, s.median, s.max)))

    def decorate(axis: Axes, same: list[Row]) -> None:
        log_scale(axis, "x")
        _line_at(axis, 1.0, "doing nothing")
        axis.set_xlabel("distance to retraining, relative to doing nothing (left is better)")

    series = _settings(rows)
    title = f"Distance to retraining: {_where(rows)}"
    return _dots(rows, path, draw, series=series, of=lambda r: r.setting, decorate=decorate, title=title)


def plot_gaps(rows: Sequence[Row], path: Path, setting: str | None = None) -> Path | None:
    """Clean and robust accuracy minus retraining's, in points, for one setting (None: a class, else the largest)."""
    rows = [r for r in rows if not math.isnan(r.clean_gap)]
    if not rows:
        return None
    if setting is None:
        classes = [r.setting for r in rows if r.setting.startswith("class")]
        setting = classes[0] if classes else max(rows, key=lambda r: r.percent).setting
    rows = [r for r in rows if r.setting == setting]
    columns = {"clean accuracy": "clean_gap", "robust accuracy": "robust_gap"}

    def draw(axis: Axes, found: list[Row], y: float, look: dict[str, Any], name: str) -> None:
        s = summarise(found, columns[name])
        if s.n:
            _mark(axis, y, look, s.min, s.mean, s.max)

    def decorate(axis: Axes, same: list[Row]) -> None:
        _line_at(axis, 0)
        low, high = axis.get_xlim()
        axis.set_xlim(min(low, -1), max(high, 1))
        axis.set_xlabel("points above (right) or below (left) retraining")

    title = f"Accuracy gap to retraining, {setting} removed: {_where(rows)}"
    return _dots(rows, path, draw, series=list(columns), of=None, decorate=decorate, title=title)


def plot_times(rows: Sequence[Row], path: Path) -> Path | None:
    """Seconds per request of each method beside retraining, log scale; one mark per setting."""
    rows = [r for r in rows if r.seconds_request > 0]
    if not rows:
        return None

    def draw(axis: Axes, found: list[Row], y: float, look: dict[str, Any], name: str) -> None:
        s = summarise(found, "seconds_request")
        _mark(axis, y, look, s.min, s.median, s.max)

    def decorate(axis: Axes, same: list[Row]) -> None:
        log_scale(axis, "x")
        retrain = summarise(same, "seconds_retrain")
        if retrain.n:
            axis.axvspan(retrain.min, retrain.max, color="#bbbbbb", alpha=0.5, linewidth=0, zorder=0)
            _line_at(axis, retrain.median, "retraining")
        axis.set_xlabel("seconds per request (left is faster)")

    title = f"Time of one request: {_where(rows)}"
    series = _settings(rows)
    if len(series) > MANY:  # the time of a request hardly depends on what is forgotten
        return _dots(rows, path, draw, series=["all settings"], of=None, decorate=decorate, title=title)
    return _dots(rows, path, draw, series=series, of=lambda r: r.setting, decorate=decorate, title=title)


def plot_distance_map(rows: Sequence[Row], path: Path) -> Path | None:
    """Median distance of every method (downwards) in every setting (across): dark is close to retraining."""
    rows = [r for r in rows if not math.isnan(r.distance) and r.distance > 0]
    if not rows:
        return None
    with plt.rc_context({**STYLE, "axes.grid": False}):
        methods, settings = _methods(rows), _settings(rows)
        height = 1.5 + 0.27 * len(methods)
        figure, panels = _panels(rows, height=height, width=2.6 + 0.62 * len(settings))
        for axis, same in panels:
            cells = group(same, lambda r: (r.method, r.setting))
            for i, method in enumerate(methods):
                for j, setting in enumerate(settings):
                    found = cells.get((method, setting))
                    if not found:
                        axis.text(j, i, "-", ha="center", va="center", fontsize=7, color="#666666")
                        continue
                    middle = summarise(found, "distance").median
                    shade = min(max((math.log10(max(middle, 1e-9)) + 3) / 3.5, 0.0), 1.0)  # 0.001 .. 3
                    colour = matplotlib.colormaps["cividis"](shade)
                    axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
                    text = f"{middle:.2g}" if middle >= 1e-3 else f"{middle:.0e}"
                    axis.text(
                        j, i, text, ha="center", va="center", fontsize=7, color="white" if shade < 0.55 else "black"
                    )
            axis.set_xlim(-0.5, len(settings) - 0.5)
            axis.set_ylim(len(methods) - 0.5, -0.5)
            axis.set_yticks(range(len(methods)), methods)
            axis.set_xticks(range(len(settings)), settings, rotation=40, ha="right", rotation_mode="anchor")
            axis.tick_params(length=0, labelsize=8)
            for spine in axis.spines.values():
                spine.set_visible(False)
        title = f"Distance to retraining (dark: close; 1: as doing nothing): {_where(rows)}"
        return _save(figure, title, path)


def _best_median(rows: Sequence[Row]) -> float:
    """The median distance in the problem that suits the method best."""
    return min(summarise(same, "distance").median for same in group(rows, lambda r: r.problem).values())


def plot_distance_by_size(rows: Sequence[Row], path: Path) -> Path | None:
    """Distance against the share removed at random (a class or a person's records are no matter of size), one line per method,
    for studies with at least three sizes.
    """
    rows = [r for r in rows if not math.isnan(r.distance) and r.percent > 0 and r.setting[:1].isdigit()]
    if len({round(r.percent, 1) for r in rows}) < 3:
        return None
    with plt.rc_context(STYLE):
        figure, panels = _panels(rows, height=3.6)
        by_method = group(rows, lambda r: r.method)
        lines = [m for m in by_method if m != NOTHING]  # it is the dashed one
        closest = sorted(lines, key=lambda m: _best_median(by_method[m]))[: len(COLOURS)]
        methods = [m for m in by_method if m in closest]  # more lines than colours could not be told apart
        for axis, same in panels:
            for i, method in enumerate(methods):
                found = group((r for r in same if r.method == method), lambda r: round(r.percent, 1))
                sizes = sorted(found)
                if not sizes:
                    continue
                s = [summarise(found[size], "distance") for size in sizes]
                middle = [max(v.median, SMALLEST) for v in s]
                bars = [
                    [m - max(v.min, SMALLEST) for m, v in zip(middle, s, strict=True)],
                    [max(v.max, SMALLEST) - m for m, v in zip(middle, s, strict=True)],
                ]
                axis.errorbar(
                    sizes, middle, yerr=bars, capsize=2, markersize=5, linewidth=1.2, label=method, **_look(i)
                )
            log_scale(axis, "x")
            log_scale(axis, "y")
            axis.axhline(1.0, color="#444444", linewidth=1, linestyle="--", zorder=1)
            axis.set_xlabel("share of the training samples removed, %")
        for line in range(0, len(panels), 2):
            panels[line][0].set_ylabel("relative distance to retraining")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        return _save(figure, f"Distance against removal size: {_where(rows)}", path)


def plot_roc(curves: Sequence[Mapping[str, str]], path: Path, attack: str = "U-LiRA") -> Path | None:
    """True against false positives of one attack, a panel for clean and one for adversarial inputs: before, after, retrained."""
    shown = [c for c in curves if c["attack"] == attack] or [c for c in curves if c["attack"] == (curves[0]["attack"])]
    if not shown:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(7.2, 4.3), sharex=True, sharey=True, layout="constrained")
        methods = list(dict.fromkeys(c["method"] for c in shown))
        for axis, inputs in zip(axes, ("clean", "adversarial"), strict=True):
            for i, method in enumerate(methods):
                line = [c for c in shown if c["method"] == method and c["inputs"] == inputs]
                x, y = ([float(c[name]) for c in line] for name in ("fpr", "tpr"))
                dashed = method == REFERENCE
                axis.plot(
                    x, y, label=method, markevery=(2 + i, 8), markersize=5, linewidth=2.2 if dashed else 1.3,
                    linestyle="--" if dashed else "-", **_look(len(COLOURS) - 1 if dashed else i),
                )  # fmt: skip
            axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, zorder=1)
            axis.set_title(f"{inputs} inputs", fontsize=10, loc="left")
            axis.set_xlabel("never seen, called removed")
            axis.set_aspect("equal")
        axes[0].set_ylabel("removed, called removed")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
        return _save(figure, f"Can the attack {shown[0]['attack']} tell? (the diagonal is guessing)", path)


def plot_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every picture that the rows allow, in the order in which a reader wants them."""
    measured = [r for r in rows if r.method != REFERENCE]
    many = len(_settings(measured)) > MANY
    made = [
        (plot_distance_map if many else plot_distance)(measured, folder / "distance.png"),
        plot_distance_by_size(measured, folder / "distance_by_size.png"),
        plot_gaps(measured, folder / "accuracy_gaps.png"),
        plot_times(measured, folder / "time.png"),
    ]
    return [path for path in made if path is not None]
