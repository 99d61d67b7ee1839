"""Who was closest: counted from rows, nobody left out who competes, nobody counted who does not."""

from __future__ import annotations

import math

import pytest

from lightning_muter.study.report.closest import beaten, cases, closest_markdown
from lightning_muter.study.report.rows import Row


def row(method: str, distance: float, setting: str = "5 %", seed: int = 0, **values: float) -> Row:
    made = Row("digits", "softmax", "pgd_l2", setting, method, eps=0.3, seed=seed, n_forgotten=9, distance=distance)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def removal(setting: str = "5 %", seed: int = 0, newton: float = 0.7) -> list[Row]:
    return [
        row("retraining", 0.0, setting, seed, stationarity=1e-7),
        row("constraint-aware", 0.1, setting, seed, clean_gap=0.2, robust_gap=-0.7),
        row("constraint-aware + 2 refine", 0.01, setting, seed, clean_gap=0.0, robust_gap=0.3),
        row("Newton", newton, setting, seed),
        row("SISA", math.nan, setting, seed),
        row("retraining, warm start", 1e-5, setting, seed),
        row("doing nothing", 0.005, setting, seed, clean_gap=0.1, robust_gap=6.0),
    ]


def test_only_unlearning_methods_compete() -> None:
    (case,) = cases(removal())
    assert case.other.method == "Newton"
    assert case.best.method == "constraint-aware + 2 refine"
    assert case.stationarity == 1e-7
    assert not beaten([case], refined=False)


@pytest.mark.parametrize(("newton", "one_step", "refined"), [(0.2, 0, 0), (0.05, 1, 0), (0.001, 1, 1)])
def test_a_closer_rival_is_named_for_the_variant_that_it_beats(newton: float, one_step: int, refined: int) -> None:
    rows = removal() + removal("class 3", newton=newton)
    found = cases(rows)
    assert len(found) == 2
    assert len(beaten(found, refined=False)) == one_step
    assert len(beaten(found, refined=True)) == refined
    text = closest_markdown(rows)
    told = f"closest in {2 - one_step} of 2 cases" if one_step else "closest in all 2 cases"
    assert told in text
    beaten_lines = [line for line in text.splitlines() if "class 3" in line and "Newton" in line]
    assert len(beaten_lines) == one_step + refined


def test_repetitions_are_cases_of_their_own() -> None:
    rows = removal(seed=0) + removal(seed=1, newton=0.05)
    assert len(cases(rows)) == 2
    assert "closest in 1 of 2 cases" in closest_markdown(rows)


def test_gaps_are_listed_where_doing_nothing_fails() -> None:
    text = closest_markdown(removal())
    assert "constraint-aware: +0.20 / -0.70 (!)" in text
    assert "constraint-aware + 2 refine: +0.00 / +0.30;" in text
    assert "doing nothing: +0.10 / +6.00 |" in text
    harmless = [r for r in removal() if r.method != "doing nothing"]
    assert "points" not in closest_markdown(harmless)


def test_without_rivals_there_is_nothing_to_say() -> None:
    assert closest_markdown([r for r in removal() if r.method != "Newton"]) == ""
