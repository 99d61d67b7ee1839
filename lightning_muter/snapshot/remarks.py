"""What is said of a snapshot as it is taken: what it leaves out, and how far it can be trusted."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_muter.adversarial.from_torchattacks import attack_note
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian.sums import Sums
from lightning_muter.curvature.objective.base import Evaluation
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.minimise.best import Best

#: What to do about parameters that a scope leaves as they are.
ALL = "they keep what they learnt from forgotten samples. scope='all' covers them."
FROZEN = (
    "if they were trained on the same data they keep what they learnt from forgotten samples. Freeze the backbone "
    "(requires_grad=False) and train it on data that is never forgotten."
)
#: Whose frames lie between a caller and a warning: the package's, and its decorators'.
_OWN = ("lightning_muter", "torch", "contextlib")


def head_notes(
    problem: HeadProblem, reached: Evaluation, sums: Sums, aim: float, polished: bool, attack: Any
) -> list[str]:
    """What else is trained, how stationary the head is for the ``aim``, how many inner maxima were found, what the attack was."""
    notes = outside_head(problem)
    if reached.stationarity > 100 * aim:
        how = "polish stopped early" if polished else "polish=0 left the weights as they were"
        notes.append(
            f"The head is not stationary: |grad F| / sum |grad phi_i| = {reached.stationarity:.1e} ({how}; the aim is "
            f"{aim:g}). The step towards the retrained optimum also corrects this, and distances to retraining measure it. "
            "Train longer, use polish='auto', or refine with retained data."
        )
    n = sums.counts["samples"]
    converged = sums.counts["maximisers converged"]
    if n and converged < 0.9 * n:
        notes.append(
            f"The inner maximiser converged for {converged} of {n} samples only (kinks of the backbone, or a ball too "
            "large for a unique maximum): statistics are less exact there."
        )
    note = attack_note(attack) if attack is not None else None
    if note is not None:
        notes.append(note)
    return notes


def constant_note(best: Best, threat: ThreatModel) -> str:
    """What to say where nothing beats a constant predictor."""
    return (
        f"The robust optimum is a constant predictor: the best head that was found has the objective {best.value:.6g}, one that "
        f"answers the same whatever it is shown {best.constant:.6g}. Balls of eps={threat.eps:g} swamp the classes: at this "
        "radius there is nothing to learn, nor to unlearn but the share of the classes. Use a smaller eps, or better features."
    )


def left_outside(model: nn.Module, inside: Iterable[nn.Parameter], who: str = "The scope", why: str = ALL) -> list[str]:
    """What a scope leaves behind, said loudly; empty when every trained parameter is inside."""
    covered = {id(p) for p in inside}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    if not left:
        return []
    shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
    return [f"{who} leaves {len(left)} trainable parameters as they are ({shown}): {why}"]


def outside_head(problem: HeadProblem) -> list[str]:
    """What head scope leaves behind."""
    return left_outside(problem.module, problem.head.linear.parameters(), "Head scope", FROZEN)


def warn(notes: Iterable[str]) -> None:
    """Warn of each where this package was called: before anything is changed, for a warning may be an error."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals["__name__"].split(".")[0] in _OWN:
        frame, level = frame.f_back, level + 1
    for note in notes:
        warnings.warn(note, stacklevel=level)
