"""The page for a person who decides: of a study with an audit, and of a checkpoint; self-contained, every figure explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_muter.cli import main as muter
from lightning_muter.deletion.gate import Gate
from lightning_muter.study.audit.tables import AuditRow, LawRow, Results
from lightning_muter.study.report.page import to_html
from lightning_muter.study.report.report import main
from lightning_muter.study.report.rows import Row, write_rows
from tests.world import DataWithTest, command, plain_checkpoint


def self_contained(page: str) -> bool:
    return not re.search(r'(?:src|href)="(?:https?:)?//', page) and "<script" not in page and "@import" not in page


def audited(folder: Path) -> None:
    def row(method: str, distance: float, **more: float) -> Row:
        figures = {"clean_acc": 0.9, "robust_acc": 0.8, "clean_gap": 0.1, "robust_gap": -0.2} | more
        return Row(
            "digits",
            "softmax",
            "pgd_l2",
            "5 % mislabelled",
            method,
            n_total=100,
            n_forgotten=5,
            distance=distance,
            **figures,
        )

    write_rows(
        folder / "results.csv",
        [row("retraining", 0.0), row("constraint-aware + 2 refine", 0.09, bound=0.004), row("doing nothing", 1.0)],
    )
    attacks = [
        AuditRow(
            method,
            attack,
            inputs,
            auc,
            auc - 0.02,
            auc + 0.02,
            0.01,
            0.9,
            0.8,
            0.1,
            auc - 0.5,
            auc - 0.52,
            auc - 0.48,
            worlds=12,
        )
        for method, auc in (("doing nothing", 0.95), ("constraint-aware + 2 refine", 0.5), ("retraining", 0.5))
        for attack in ("loss threshold", "U-LiRA")
        for inputs in ("clean", "adversarial")
    ]
    attacks.append(AuditRow("refuses", "U-LiRA", "clean", *[float("nan")] * 6, note="refused in 2 of 12 worlds: no"))
    laws = [LawRow("doing nothing", "KLoM", "clean", 1.5, 4.0, 2.0, 0.1, 0.6)]
    curves = [
        {"method": r.method, "attack": r.attack, "inputs": r.inputs, "fpr": x, "tpr": x**0.5}
        for r in attacks[:-1]
        for x in (0.0, 0.5, 1.0)
    ]
    Results(attacks, laws, curves).write(folder)


def test_a_study_begins_with_what_a_decision_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audited(tmp_path)
    assert main([str(tmp_path)]) == 0
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    sections = ("In short", "How close", "Could an attacker tell", "Accuracy", "What this does not", "All")
    order = [text.index(f"## {name}") for name in sections]
    assert order == sorted(order)
    assert "**constraint-aware + 2 refine**: 9 % of the way" in " ".join(text.split())
    assert "to be forgotten (5 % mislabelled)." in text
    assert "no more than after retraining" in text
    assert "refused in 2 of 12 worlds" in text
    assert "[audit.csv](audit.csv)" in text
    assert "12 worlds give wide intervals" in text
    assert self_contained(page)
    assert page.count("data:image/png;base64") == 3
    assert 'name="viewport"' in page
    assert "@media print" in page


def test_numbers_stay_whole_and_links_are_left_alone(tmp_path: Path) -> None:
    page = to_html("# A study\n\n| a | b & c |\n| --- | ---: |\n| 1 | 2 |\n", tmp_path)
    assert '<td data-label="a">1</td>' in page  # named, for on a phone each row is a list
    assert '<td data-label="b &amp; c" style="text-align:right">2</td>' in page
    page = to_html("# A study\n\n1.2e-07 of [3e-4](3e-4.csv)\n", tmp_path)
    assert "<span>1.2e-07</span>" in page
    assert 'href="3e-4.csv"' in page
    assert "nowrap" in page


def test_a_checkpoint_is_explained_from_its_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tests.world as world

    path = tmp_path / "last.ckpt"
    plain_checkpoint(path)
    assert main([str(path)]) == 2
    assert "no ledger here" in capsys.readouterr().err
    command("snapshot", path)
    monkeypatch.setattr(world, "Data", DataWithTest)
    command("unlearn", path, forget=[1, 5], within=1e-3, gate=Gate(clean_least=101), accept_held=True)
    assert muter(["publish", "--ckpt_path", str(path), "--out", str(tmp_path / "shown.ckpt")]) == 0
    assert main([str(tmp_path / "last.muter.ckpt"), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "last.muter.report.md").read_text()
    for said in (
        "2 rows were removed in 1 request",
        "It is proved",
        "distance asked for",
        "robust accuracy",
        "shown.ckpt",
        "eps = 1 at delta = 1e-05",
    ):
        assert said in text
    assert "Files, receipts and signatures agree." in text
    assert "[receipt 2](last.muter.receipts/000002-" in text
    figures = [line for line in text.splitlines() if line.startswith("| **")]
    assert figures
    assert all(len(line.split(" | ")) == 4 and "](" in line for line in figures)
    assert self_contained((tmp_path / "report" / "last.muter.report.html").read_text())
