"""Who came closest to retraining, from the rows alone: what is claimed of the constraint-aware method, and where it fails.

One *case* is one removal in one repetition: a problem, a setting, a seed. Methods that retrain and doing nothing do not
compete; the constraint-aware ones (one step, or refined on the retained data) are held against every other one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_muter.study.report import tables
from lightning_muter.study.report.rows import NOTHING, REFERENCE, Row, attack_name, group, summarise

OURS = "constraint-aware"
GAP = 0.5  # points: as good as retraining


@dataclass(frozen=True)
class Case:
    """The constraint-aware rows and the best other row of one removal in one repetition."""

    ours: tuple[Row, ...]
    other: Row
    stationarity: float  # of the retrained reference

    @property
    def one_step(self) -> Row | None:
        """The row without refinement."""
        return next((r for r in self.ours if r.method == OURS), None)

    @property
    def best(self) -> Row:
        return min(self.ours, key=lambda r: r.distance)


def is_ours(row: Row) -> bool:
    """Whether the row is of this package's method."""
    return row.method.startswith(OURS)


def competes(row: Row) -> bool:
    """Whether the row is an unlearning method with a distance to compare."""
    return not (math.isnan(row.distance) or row.method == NOTHING or row.method.startswith(REFERENCE))


def cases(rows: Iterable[Row]) -> list[Case]:
    """Every removal that was answered by a constraint-aware method and by another one."""
    found = []
    for same in group(rows, lambda r: (r.problem, r.setting, r.n_forgotten, r.seed, r.forget_seed)).values():
        rivals = [r for r in same if competes(r) and not is_ours(r)]
        ours = tuple(r for r in same if competes(r) and is_ours(r))
        if ours and rivals:
            stationarity = next((r.stationarity for r in same if r.method == REFERENCE), math.nan)
            found.append(Case(ours, min(rivals, key=lambda r: r.distance), stationarity))
    return found


def beaten(found: Sequence[Case], *, refined: bool) -> list[Case]:
    """Cases in which another method was closer than one constraint-aware step (``refined``: than the best of them)."""
    lost = []
    for case in found:
        mine = case.best if refined else case.one_step
        if mine is not None and case.other.distance < mine.distance:
            lost.append(case)
    return lost


def _where(row: Row) -> str:
    return f"{row.dataset}, {row.model}, {attack_name(row)}"


def _beaten_markdown(found: Sequence[Case], lost: Sequence[Case], name: str, *, refined: bool) -> str:
    if not lost:
        return f"{name}: the closest in {f'all {len(found)} cases' if len(found) > 1 else 'the one case there is'}.\n"
    body = []
    for same in group(lost, lambda c: (c.other.problem, c.other.setting)).values():
        mine = [case.best if refined else case.one_step for case in same]
        first = same[0].other
        body.append(
            [
                _where(first),
                first.setting,
                str(len(same)),
                tables.spread(summarise([r for r in mine if r is not None], "distance")),
                ", ".join(dict.fromkeys(case.other.method for case in same)),
                tables.spread(summarise([case.other for case in same], "distance")),
                tables.number(max(case.stationarity for case in same), 2),
            ]
        )
    headers = ("problem", "removed", "cases", "its distance", "closer", "at", "stationarity of retraining")
    intro = f"{name}: the closest in {len(found) - len(lost)} of {len(found)} cases; another method was closer in\n\n"
    return intro + tables.markdown_table(headers, body) + "\n"


def _gaps_markdown(rows: Sequence[Row]) -> str:
    """Settings in which doing nothing is off by more than GAP points, and the constraint-aware methods' gaps there."""
    body = []
    for same in group(rows, lambda r: (r.problem, r.setting)).values():
        by_method = group(same, lambda r: r.method)
        if NOTHING not in by_method or not any(is_ours(r) for r in same):
            continue
        idle = [abs(summarise(by_method[NOTHING], name).mean) for name in ("clean_gap", "robust_gap")]
        if not max(idle) > GAP:
            continue
        cells = []
        for method, found in by_method.items():
            if method.startswith(OURS) or method == NOTHING:
                gaps = [summarise(found, name) for name in ("clean_gap", "robust_gap")]
                furthest = max(abs(value) for gap in gaps for value in gap.values)
                within = "" if method == NOTHING or furthest <= GAP else " (!)"
                cells.append(f"{method}: {gaps[0].mean:+.2f} / {gaps[1].mean:+.2f}{within}")
        body.append([_where(same[0]), same[0].setting, "; ".join(cells)])
    if not body:
        return ""
    headers = ("problem", "removed", "clean / robust gap in points, mean over repetitions")
    intro = (
        f"Where doing nothing leaves the clean or the robust accuracy more than {GAP:g} points from retraining's "
        f"((!): in at least one repetition a constraint-aware method does so too):\n\n"
    )
    return intro + tables.markdown_table(headers, body) + "\n"


def closest_markdown(rows: Sequence[Row]) -> str:
    """The section of the report; empty where there is nothing to compare."""
    found = cases(rows)
    if not found:
        return ""
    parts = [f"One case is one removal in one repetition. Retraining itself and {NOTHING} do not compete.\n"]
    stepped = [case for case in found if case.one_step is not None]
    if stepped:
        parts.append(
            _beaten_markdown(stepped, beaten(stepped, refined=False), "One constraint-aware step", refined=False)
        )
    refined = [case for case in found if any(r.method != OURS for r in case.ours)]
    if refined:
        lost = beaten(refined, refined=True)
        parts.append(
            _beaten_markdown(refined, lost, "The best constraint-aware variant, refinement included", refined=True)
        )
    parts.append(_gaps_markdown(rows))
    return "\n".join(part for part in parts if part)
