"""The first page of a study's report: for a person who decides whether a removal is good enough. Every figure is explained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lightning_muter.study.audit.tables import ATTACKS_FILE, LAWS_FILE, AuditRow, LawRow, read_audit
from lightning_muter.study.report.figures import Figure, figures_markdown, link, points
from lightning_muter.study.report.rows import FILE, FLOORS, NOTHING, REFERENCE, Row, group, summarise
from lightning_muter.study.report.tables import markdown_table, number

STRONGEST = "U-LiRA"
NEAR = 0.03  # AUC from retraining's that the interval of a good removal stays inside


def decision_markdown(rows: Sequence[Row], folder: Path, curves_picture: str | None = None) -> str:
    """Sections *In short*, *How close*, *Could an attacker tell*, *Accuracy*, *What this does not say*."""
    attacks, laws, _ = read_audit(folder) if folder.is_dir() else ([], [], [])
    parts = [
        "## In short\n",
        _short(rows, attacks),
        "## How close to retraining\n",
        figures_markdown(_distances(rows, folder)),
    ]
    if attacks:
        parts += ["## Could an attacker tell that it was removed?\n", _attack_text(attacks)]
        if curves_picture is not None:
            parts.append(
                f"![True against false positives of the attack, before, after and retrained]({curves_picture})\n"
            )
        parts += [figures_markdown(_attack_figures(attacks)), _attack_table(attacks)]
        parts += [_law_table(laws)] if laws else []
    parts += [
        "## Accuracy\n",
        figures_markdown(_accuracies(rows)),
        "## What this does not say\n",
        _limits(rows, attacks),
    ]
    return "\n".join(parts)


def _methods(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found = group(
        [r for r in rows if r.method not in (REFERENCE, NOTHING, *FLOORS) and not math.isnan(r.distance)],
        lambda r: r.method,
    )
    return dict(sorted(found.items(), key=lambda item: summarise(item[1], "distance").median))


def _short(rows: Sequence[Row], attacks: Sequence[AuditRow]) -> str:
    first, best = rows[0], next(iter(_methods(rows).items()), None)
    removed = max((r.n_forgotten for r in rows), default=0)
    settings = ", ".join(dict.fromkeys(r.setting for r in rows))
    text = f"{removed} of {first.n_total} training samples were to be forgotten ({settings}). "
    if best is not None:
        name, same = best
        share = 100 * summarise(same, "distance").median
        text += f"Closest to retraining without them came **{name}**: {number(share)} % of the way that doing nothing leaves. "
    strong = {r.method: r for r in attacks if r.attack == STRONGEST and r.inputs == "clean" and not math.isnan(r.auc)}
    if best is not None and best[0] in strong and REFERENCE in strong:
        mine, theirs = strong[best[0]], strong[REFERENCE]
        inside = mine.minus_low >= -NEAR and mine.minus_high <= NEAR
        text += (
            f"The strongest attack tells its removed samples from never seen ones with AUC {mine.auc:.2f} (retraining "
            f"{theirs.auc:.2f}, "
            f"0.5 is guessing): {'no more than after retraining' if inside else 'see the interval below before relying on it'}."
        )
    return text + "\n"


def _distances(rows: Sequence[Row], folder: Path) -> list[Figure]:
    source = link(FILE, FILE) if (folder / FILE).is_file() else FILE
    found = []
    for name, same in _methods(rows).items():
        relative = summarise(same, "distance")
        found.append(
            Figure(
                f"distance, {name}", number(relative.median), "of the weights to the retrained model; 1 is doing "
                "nothing, 0 retraining",
                source,
            )
        )  # fmt: skip
        bound = summarise(same, "bound")
        if bound.n:
            meaning = (
                "proved: the weights are no further than this from the exact minimiser without the removed samples"
            )
            found.append(Figure(f"certificate, {name}", number(bound.median), meaning, source))
    floor = summarise([r for r in rows if r.method in FLOORS], "distance")
    if floor.n:
        meaning = "noise floor: how far apart two retrainings are that differ in their start alone"
        found.append(Figure("distance of retraining to itself", number(floor.median), meaning, source))
    reference = summarise([r for r in rows if r.method == REFERENCE], "stationarity")
    if reference.n:
        meaning = "how far the retrained model itself is from its minimum (0 is there): distances below it mean nothing"
        found.append(Figure("stationarity of retraining", number(reference.median), meaning, source))
    return found


def _attack_text(attacks: Sequence[AuditRow]) -> str:
    first = attacks[0]
    return (
        f"{first.worlds} worlds were drawn; in each a third of the {first.candidates} samples was kept, a third "
        f"removed, a third never "
        "seen. An attacker who knows how the models of all the other worlds treat a sample guesses whether it was removed or "
        "never seen. What retraining scores is the floor: 0.5 but for noise. Attacks on adversarial inputs look at the sample "
        "where the model is weakest.\n"
    )


def _attack_figures(attacks: Sequence[AuditRow]) -> list[Figure]:
    source = link(ATTACKS_FILE, ATTACKS_FILE)
    return [
        Figure("AUC", "0.5 to 1", "chance that the attack ranks a removed sample above one never seen; 0.5 is guessing", source),
        Figure("interval", "95 %", "over other worlds and other samples, by bootstrap", source),
        Figure("minus retraining", "AUC", "on the same worlds and draws; 0 is as good as retraining", source),
        Figure("TPR at 1 % FPR", "share", "removed samples that the attack is nearly sure of", source),
        Figure("clean %, robust %", "0 to 100", "test samples that are right, as they are / attacked; mean over worlds", source),
        Figure("loss threshold", "attack", "one threshold for all samples; weak, and shown because it flatters", source),
        Figure("RMIA", "attack", "compares with samples of the population and with reference models", source),
        Figure("U-LiRA", "attack", "a test of its own for every sample; the strongest of the three", source),
    ]  # fmt: skip


def _attack_table(attacks: Sequence[AuditRow]) -> str:
    headers = (
        "method",
        "attack",
        "inputs",
        "AUC",
        "95 % interval",
        "minus retraining",
        "TPR at 1 % FPR",
        "clean %",
        "robust %",
    )
    body: list[tuple[str, ...]] = []
    for r in attacks:
        if math.isnan(r.auc):
            line = (r.method, "-", r.inputs, "-", r.note, "-", "-", "-", "-")
            body += [line] if line not in body else []
            continue
        minus = "0" if r.method == REFERENCE else f"{r.minus_retraining:+.3f} [{r.minus_low:+.3f}, {r.minus_high:+.3f}]"
        body.append(
            (
                r.method, r.attack, r.inputs, f"{r.auc:.3f}", f"[{r.auc_low:.3f}, {r.auc_high:.3f}]", minus,
                f"{r.tpr_at_fpr_1:.3f}", f"{100 * r.clean:.1f}", f"{100 * r.robust:.1f}",
            )
        )  # fmt: skip
    return markdown_table(headers, (_unbroken(line) for line in body)) + "\n"


def _unbroken(line: Sequence[str]) -> list[str]:
    """Intervals stay on one line."""
    return [
        cell.replace(", ", ",\N{NO-BREAK SPACE}").replace(" [", "\N{NO-BREAK SPACE}[") if "[" in cell else cell
        for cell in line
    ]


def _law_table(laws: Sequence[LawRow]) -> str:
    headers = ("method", "measure", "inputs", "median", "95 %", "mean", "floor: median", "floor: 95 %")
    body = [
        (r.method, r.measure, r.inputs, *(number(v, 2) for v in (r.median, r.p95, r.mean, r.floor_median, r.floor_p95)))
        for r in laws
    ]
    text = (
        f"Laws of the outputs over worlds, per removed sample ({link(LAWS_FILE, LAWS_FILE)}). *KLoM*: divergence of its margins from "
        "those after retraining. *Forget-quality epsilon*: the largest ratio of error rates a threshold shows. *Residual knowledge*: "
        "share of random points around it that still get its label, minus retraining's. The *floor* is retraining against itself, "
        "one half of the worlds against the other. *inf*: in these worlds the two laws do not overlap at all.\n\n"
    )
    return text + markdown_table(headers, body) + "\n"


def _accuracies(rows: Sequence[Row]) -> list[Figure]:
    found = []
    for name, same in group([r for r in rows if not math.isnan(r.clean_acc)], lambda r: r.method).items():
        clean, robust = summarise(same, "clean_acc").mean, summarise(same, "robust_acc").mean
        gaps = [summarise(same, kind).mean for kind in ("clean_gap", "robust_gap")]
        meaning = "test samples that are right, as they are / under attack" + (
            "" if name == REFERENCE else f" ({points(gaps[0], True)} / {points(gaps[1], True)} against retraining)"
        )
        found.append(Figure(name, f"{points(clean)} / {points(robust)}", meaning, link(FILE, FILE)))
    return found


def _limits(rows: Sequence[Row], attacks: Sequence[AuditRow]) -> str:
    lines = [
        "Attacks of a kind that was not tried may see more. A certificate does not have this gap, where there is one.",
        "An AUC near 0.5 says nothing of a model that was destroyed: look at the accuracies beside it.",
        "Distances and certificates are about what was unlearned (the head, or the parameters in scope). What a "
        "backbone learnt from the "
        "same samples stays.",
        "Files from before a removal (checkpoints, backups, releases) are not changed by it: `muter purge` finds some.",
    ]
    if not attacks:
        lines.insert(0, "No attack was run: `muter-experiment … request=mislabelled audit=full` does.")
    elif attacks[0].worlds < 32:
        lines.insert(0, f"{attacks[0].worlds} worlds give wide intervals: 32 or more are for figures to quote.")
    return "\n".join(f"- {line}" for line in lines) + "\n"
