"""Random requests on small linear models, and how far above the distance to retraining the certificate is.

    python -m tests.bound_cases FOLDER            500 cases, on all cores: cases.csv, and counts and quantiles in cases.md

One case: loss, ball, radius, decay, backbone, rows, how many of them are removed and how many refine steps follow are all drawn. The
reference is retrained to the last digits that it can, and is itself off by no more than a bound of its own.
"""

from __future__ import annotations

import copy
import csv
import math
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.certificate.certificate import certify
from lightning_muter.errors import MuterError
from tests.cases import make
from tests.heads import forget_from, snapshot_of

MEASURABLE = 1e-5  # below, a ratio is one of roundings


@dataclass(frozen=True)
class Bounded:
    """One request: the distance to the reference, what the reference may be off, and the bound that was given; ``told``: whether
    labels follow a rule (one in ten does not) or are drawn at random, which leaves weights near the kink at 0.
    """

    what: str
    norm: str
    told: bool
    distance: float
    slack: float
    bound: float

    @property
    def holds(self) -> bool:
        """The minimiser is within ``slack`` of the reference, so that no true bound is below distance - slack."""
        return self.distance <= self.bound + self.slack + 1e-12

    @property
    def ratio(self) -> float:
        return self.bound / self.distance


def bounded(seed: int) -> Bounded | None:
    """Case ``seed``; None where the request was refused (the step would make the model worse)."""
    draw = np.random.default_rng(seed)
    kind, loss = draw.choice(["linear", "affine"]), draw.choice(["softmax", "smoothing", "binary", "square"])
    norm, bias = draw.choice(["l2", "linf"]), bool(draw.integers(2))
    eps, decay = float(10 ** draw.uniform(-2, -0.5)), float(10 ** draw.uniform(-3, -1))
    rows, refine = int(draw.integers(20, 80)), int(draw.integers(0, 4))
    told = bool(draw.integers(4))
    threat = ThreatModel(str(norm), eps, None if draw.integers(2) else (0.0, 1.0))
    one = make(str(kind), str(loss), bias=bias, n=rows, weighted=bool(draw.integers(2)), seed=seed)
    one.decay = decay
    forget = draw.choice(rows, int(draw.integers(1, max(2, rows // 8))), replace=False).tolist()
    if told:
        one.y = _told(one.x, one.y, draw)
    snapshot = snapshot_of(one, threat)
    other = copy.deepcopy(one)
    kept = [i for i in range(rows) if i not in forget]
    other.x, other.y = one.x[kept], one.y[kept]
    other.weight = None if one.weight is None else one.weight[kept]
    try:
        result = forget_from(one, snapshot, forget, retain=one.dataset, refine=refine)
    except MuterError:
        return None
    assert result.bound is not None, result.warnings
    again = snapshot_of(other, threat, tolerance=1e-12, polish=400)
    objective = other.objective(threat, smoothing=again.smoothing)
    theta = other.problem().read_theta()
    slack = certify(objective, theta, objective.evaluate(theta))
    distance = float((one.problem().read_theta() - theta).norm())
    what = (
        f"case {seed}: {one.name}, {norm} {eps:.3f}, decay {decay:.1e}, {len(forget)} of {rows} rows, refine={refine}"
    )
    return Bounded(what, str(norm), told, distance, slack, float(result.bound))


def _told(x: Tensor, y: Tensor, draw: np.random.Generator) -> Tensor:
    """Labels by a random linear rule, one in ten left as it was."""
    k = 3 if y.dtype == torch.int64 else 1
    z = (x - x.mean(0)) @ torch.tensor(draw.normal(size=(x.shape[1], k)))
    new = z.argmax(1) if k > 1 else (z[:, 0] > 0).double()
    kept = torch.tensor(draw.random(len(y)) < 0.1)
    return torch.where(kept, y, new)


def table(found: Sequence[Bounded]) -> str:
    """Counts and quantiles of bound / distance, where the distance is known to a tenth."""
    lines = ["| ball | labels | cases | too low | measurable | median | 90 % | largest |", "| --- " * 8 + "|"]
    groups: list[tuple[str, str, Sequence[Bounded]]] = [("all", "all", found)]
    for norm in ("l2", "linf"):
        for told in (True, False):
            labels = "can be told" if told else "at random"
            groups.append((norm, labels, [b for b in found if b.norm == norm and b.told == told]))
    for norm, labels, same in groups:
        known = [b.ratio for b in same if b.distance > MEASURABLE and b.slack < 0.1 * b.distance]
        broken = sum(not b.holds for b in same)
        q = np.quantile(known, [0.5, 0.9, 1.0]) if known else [math.nan] * 3
        figures = " | ".join(f"{value:.2f}" for value in q)
        lines.append(f"| {norm} | {labels} | {len(same)} | {broken} | {len(known)} | {figures} |")
    return "\n".join(lines)


def write(found: Sequence[Bounded], path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([field.name for field in fields(Bounded)])
        for one in found:
            rows.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in astuple(one)])


def _quiet() -> None:
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(1)


def main(count: int, out: Path) -> None:
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_quiet) as pool:
        found = [one for one in pool.map(bounded, range(count)) if one is not None]
    out.mkdir(parents=True, exist_ok=True)
    write(found, out / "cases.csv")
    text = f"{count} requests, {count - len(found)} of them refused (the step would have made the model worse).\n\n{table(found)}\n"
    (out / "cases.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(int(sys.argv[2]) if len(sys.argv) > 2 else 500, Path(sys.argv[1]))
