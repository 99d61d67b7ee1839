"""What an audit writes: ``audit.csv`` (attacks), ``audit_laws.csv`` (distances between laws), ``audit_roc.csv`` (curves)."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_muter.errors import CorruptFileError
from lightning_muter.evidence.attacks import Attack
from lightning_muter.evidence.estimate import Estimate, difference, estimate
from lightning_muter.evidence.laws import forget_quality_epsilon, kl_of_margins, residual_knowledge
from lightning_muter.evidence.observed import REMOVED, Floats, Observed
from lightning_muter.storage.atomic import atomic_write
from lightning_muter.study.audit.worlds import BEFORE, Plan
from lightning_muter.study.report.rows import REFERENCE, csv_text
from lightning_muter.study.setup.cache import Cache

ATTACKS_FILE, LAWS_FILE, ROC_FILE = "audit.csv", "audit_laws.csv", "audit_roc.csv"
INPUTS = ("clean", "adversarial")
NAN = math.nan


@dataclass(frozen=True)
class AuditRow:
    """One attack on one method's models. Rates and accuracies are shares; ``minus_retraining`` is paired, with its 95 % interval."""

    method: str
    attack: str
    inputs: str
    auc: float
    auc_low: float
    auc_high: float
    tpr_at_fpr_1: float
    clean: float
    robust: float
    tpr_at_fpr_10: float = NAN
    minus_retraining: float = NAN
    minus_low: float = NAN
    minus_high: float = NAN
    clean_gap: float = NAN  # points, against retraining in the same worlds
    robust_gap: float = NAN
    worlds: int = 0
    candidates: int = 0
    problem: str = ""
    note: str = ""


@dataclass(frozen=True)
class LawRow:
    """A distance between the laws of a method's and of retraining's models: median and 95 % over the removed samples, and the
    floor, which retraining scores against itself, one half of the worlds against the other.
    """

    method: str
    measure: str
    inputs: str
    median: float
    p95: float
    mean: float
    floor_median: float
    floor_p95: float
    problem: str = ""


Entry = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Results:
    """Everything an audit measured: attacks, distances of laws, ROC curves."""

    attacks: list[AuditRow]
    laws: list[LawRow]
    curves: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        for name, rows in (
            (ATTACKS_FILE, [asdict(r) for r in self.attacks]),
            (LAWS_FILE, [asdict(r) for r in self.laws]),
            (ROC_FILE, self.curves),
        ):
            text = csv_text(list(rows[0]) if rows else [], rows)
            atomic_write(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]


def gather(plan: Plan, cache: Cache, attacks: Sequence[Attack], *, splits: int, draws: int, problem: str) -> Results:
    """Tables from the worlds in the cache.

    Raises:
        MismatchError: a world was trained otherwise than the first one.
    """
    labels = {BEFORE: BEFORE, **{key: method.label for key, method in plan.methods.items()}, REFERENCE: REFERENCE}
    entries: dict[str, list[Entry]] = {
        key: [e for e in (cache.get("audit", plan.key(i, key)) for i in range(plan.worlds)) if e is not None]
        for key in labels
    }
    retrained = entries[REFERENCE]
    rows, laws, curves = [], [], []
    for inputs in INPUTS:
        reference = {a.name: _attacked(plan, retrained, a, inputs, splits, draws) for a in attacks}
        for key, label in labels.items():
            refused = [meta["refused"] for meta, _ in entries[key] if "refused" in meta]
            if refused:
                rows += [_refused(label, a, inputs, plan, problem, refused) for a in attacks]
                continue
            for attack in attacks:
                found = (
                    reference[attack.name]
                    if key == REFERENCE
                    else _attacked(plan, entries[key], attack, inputs, splits, draws)
                )
                rows.append(
                    _row(label, attack, inputs, found, reference[attack.name], entries[key], retrained, plan, problem)
                )
                curves += [
                    {"method": label, "attack": attack.name, "inputs": inputs, "fpr": x, "tpr": round(float(y), 5)}
                    for x, y in zip(found.fpr[::5].round(4).tolist(), found.tpr[::5], strict=True)
                ]
            laws += list(_laws(plan, label, entries[key], retrained, inputs, problem))
    return Results(rows, laws, curves)


def observed(plan: Plan, entries: Sequence[Entry], inputs: str) -> Observed:
    """The margins of all worlds, as an attack sees them."""
    margins, population = (
        np.stack([tensors[f"{name}_{inputs}"].numpy() for _, tensors in entries], axis=1)
        for name in ("margins", "population")
    )
    return Observed(margins, plan.roles(), population, [str(meta["trained"]) for meta, _ in entries])


def _attacked(plan: Plan, entries: Sequence[Entry], attack: Attack, inputs: str, splits: int, draws: int) -> Estimate:
    return estimate(attack, observed(plan, entries, inputs), splits=splits, draws=draws, seed=plan.seed)


def _row(
    label: str,
    attack: Attack,
    inputs: str,
    found: Estimate,
    reference: Estimate,
    entries: Sequence[Entry],
    retrained: Sequence[Entry],
    plan: Plan,
    problem: str,
) -> AuditRow:
    clean, robust = (_mean(entries, name) for name in ("clean", "robust"))
    minus, low, high = difference(found, reference)
    return AuditRow(
        label,
        attack.name,
        inputs,
        found.auc,
        found.low,
        found.high,
        found.tpr_at_fpr_1,
        clean,
        robust,
        tpr_at_fpr_10=found.tpr_at_fpr_10,
        minus_retraining=minus,
        minus_low=low,
        minus_high=high,
        clean_gap=100 * (clean - _mean(retrained, "clean")),
        robust_gap=100 * (robust - _mean(retrained, "robust")),
        worlds=plan.worlds,
        candidates=len(plan.candidates),
        problem=problem,
    )


def _refused(label: str, attack: Attack, inputs: str, plan: Plan, problem: str, why: Sequence[str]) -> AuditRow:
    note = f"refused in {len(why)} of {plan.worlds} worlds: {why[0]}"
    row = AuditRow(label, attack.name, inputs, NAN, NAN, NAN, NAN, NAN, NAN, note=note, problem=problem)
    return row


def _mean(entries: Sequence[Entry], name: str) -> float:
    return float(np.mean([float(meta[name]) for meta, _ in entries]))


def _laws(
    plan: Plan, label: str, entries: Sequence[Entry], retrained: Sequence[Entry], inputs: str, problem: str
) -> Iterator[LawRow]:
    removed = plan.roles() == REMOVED
    mine, other = (_removed_only(observed(plan, e, inputs).margins, removed) for e in (entries, retrained))
    enough = removed.sum(1) >= 4
    first = np.cumsum(removed, axis=1) % 2 == 1  # every second world in which a point was removed
    halves = [np.where(removed & half, other, NAN)[enough] for half in (first, ~first)]
    if enough.any():
        for name, measure in (("KLoM", kl_of_margins), ("forget-quality epsilon", forget_quality_epsilon)):
            yield _law(label, name, inputs, measure(mine[enough], other[enough]), measure(*halves), problem)
    if inputs == "clean":
        hits, theirs = (np.stack([t["hits"].numpy() for _, t in e], axis=1) for e in (entries, retrained))
        pairs = removed.nonzero()
        kept = residual_knowledge(hits[pairs].astype(bool), theirs[pairs].astype(bool))
        yield _law(label, "residual knowledge", "ball", kept, np.zeros(1), problem)


def _removed_only(margins: Floats, removed: np.ndarray) -> Floats:
    return np.where(removed, margins, NAN)


def _law(label: str, name: str, inputs: str, values: Floats, floor: Floats, problem: str) -> LawRow:
    def at(v: Floats, q: float) -> float:  # an infinite value counts as the largest there is
        return float(np.quantile(v, q, method="higher"))

    finite = values[np.isfinite(values)]
    mean = float(finite.mean()) if len(finite) == len(values) else math.inf
    return LawRow(
        label, name, inputs, at(values, 0.5), at(values, 0.95), mean, at(floor, 0.5), at(floor, 0.95), problem
    )


# -- files -------------------------------------------------------------------------------------------------------------------


def read_audit(folder: Path) -> tuple[list[AuditRow], list[LawRow], list[dict[str, str]]]:
    """The tables of all audits in a folder or below; empty lists without any."""
    found: dict[str, list[Any]] = {}
    for name, kind in ((ATTACKS_FILE, AuditRow), (LAWS_FILE, LawRow), (ROC_FILE, None)):
        rows: list[Any] = []
        for path in sorted(folder.rglob(name)) if folder.is_dir() else []:
            with path.open(encoding="utf-8", newline="") as lines:
                rows += [line if kind is None else _typed(kind, line, path) for line in csv.DictReader(lines)]
        found[name] = rows
    return found[ATTACKS_FILE], found[LAWS_FILE], found[ROC_FILE]


def _typed(kind: Any, line: dict[str, str], path: Path) -> Any:
    types = {"str": str, "int": int, "float": lambda text: float(text) if text else NAN}
    try:
        return kind(**{f.name: types[str(f.type)](line[f.name]) for f in fields(kind)})  # type: ignore[operator]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path}: not a table of this release ({error}). Run the audit again.") from error


def summary(results: Results) -> list[str]:
    """Lines for the terminal."""
    lines = [f"{'method':<34} {'attack':<15} {'inputs':<12} {'AUC':<22} {'- retraining':<18} clean %  robust %"]
    for r in results.attacks:
        if math.isnan(r.auc):
            lines.append(f"{r.method:<34} {r.note}")
            continue
        auc, accuracies = (
            f"{r.auc:.3f} [{r.auc_low:.3f}, {r.auc_high:.3f}]",
            f"{100 * r.clean:7.1f}  {100 * r.robust:8.1f}",
        )
        lines.append(
            f"{r.method:<34} {r.attack:<15} {r.inputs:<12} {auc:<22} {r.minus_retraining:<+18.3f} {accuracies}"
        )
    return lines
