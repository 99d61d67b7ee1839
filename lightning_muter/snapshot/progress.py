"""The progress bar of what goes over the samples again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.objective.sharded import ShardedObjective
from lightning_muter.minimise.budget import Budget
from lightning_muter.watching import watched


@dataclass
class Told:
    """What a progress bar is told: accepted steps with their stationarity, or passes with their gap; kept as the descent's curve."""

    line: Any
    curve: list[float] = field(default_factory=list)

    def __call__(self, step: int, now: Evaluation) -> None:
        self.curve.append(now.stationarity)
        self.line.set_postfix_str(f"step {step}, stationarity {now.stationarity:.1e}")

    step = __call__

    def gap(self, step: int, gap: float) -> None:
        self.curve.append(gap)
        self.line.set_postfix_str(f"pass {step}, gap {gap:.1e}")


@contextmanager
def bar(objective: ShardedObjective, what: str, show: bool, budget: Budget | None = None) -> Iterator[Told]:
    """A progress bar over samples read, or where a budget limits them over gradients; yields what to tell it."""
    own = len(objective.own)
    limited = budget is not None and budget.limit is not None
    total = int((budget.limit - budget.spent) * own) if budget is not None and budget.limit is not None else own
    if what == "polish" and not limited:
        total = None  # type: ignore[assignment]
    shown = show and objective.shards.rank == 0
    line = tqdm(total=total, desc=what, unit="samples", unit_scale=True, disable=not watched(shown), leave=False)
    with closing(line), objective.ticking(line.update):
        yield Told(line)
