"""A snapshot in words: what it is of, which objective, what polish changed. For people, at the end of a fit and as `repr`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_muter.model.loss_identity import in_words

if TYPE_CHECKING:
    from lightning_muter.snapshot.stored import Stored

_WIDTH = 100


def decay_text(snapshot: Any) -> str:
    """lambda of the parameters in scope, one number where it is one.

    A head whose bias is not decayed: "0.01 (bias 0)".
    """
    decay = snapshot.decay
    if isinstance(decay, Tensor):
        weight, last = float(decay[0, 0]), float(decay[0, -1])
        return f"{weight:g}" if weight == last else f"{weight:g} (bias {last:g})"
    assert isinstance(decay, Mapping)
    least, most = min(decay.values()), max(decay.values())
    return f"{most:g}" if least == most else f"{least:g} to {most:g}"


def polish_text(figures: Mapping[str, Any]) -> str | None:
    """What polish changed, in one line; None where there was none.

    >>> polish_text({"polish": {"status": "converged", "passes": 9, "step_norm": 0.1, "head_norm": 2.0,
    ...     "accuracy_before": 0.9, "accuracy_after": 0.91, "objective_before": 0.4, "objective_after": 0.39}})
    'converged in 9 passes, step 5.0 % of the head, accuracy 0.900 -> 0.910, objective 0.4 -> 0.39'
    """
    found = figures.get("polish")
    if not found:
        return None
    parts = [f"{found['status']} in {found['passes']} passes"]
    if found.get("head_norm"):
        parts.append(f"step {100 * found['step_norm'] / found['head_norm']:.1f} % of the head")
    for key, form in (("accuracy", ".3f"), ("robust_accuracy", ".3f"), ("objective", ".6g")):
        pair = [found.get(f"{key}_{when}") for when in ("before", "after")]
        if None not in pair:
            parts.append(f"{key.replace('_', ' ')} {pair[0]:{form}} -> {pair[1]:{form}}")
    return ", ".join(parts)


def stationarity_text(snapshot: Any) -> str:
    """How stationary the weights are, also with the switches of an L-infinity adversary smoothed."""
    told = snapshot.figures.get("stationarity_unsmoothed") is not None
    smooth = snapshot.figures.get("stationarity_smoothed")
    beside = (
        f"; {smooth:.1e} with the switches of the L-infinity adversary smoothed" if told and smooth is not None else ""
    )
    return f"{snapshot.stationarity:.1e}{beside}"


def objective_text(snapshot: Any) -> str:
    """Loss, threat model and weight decay in one line."""
    threat = snapshot.threat_model
    box = "no box" if threat.box is None else f"box [{threat.box[0]:g}, {threat.box[1]:g}]"
    read = snapshot.figures.get("weight_decay_read")
    decay = f"weight decay {decay_text(snapshot)}" + (f" ({read})" if read else "")
    return f"loss {in_words(snapshot.loss_name)}; {threat.norm}, eps={threat.eps:g}, {box}; {decay}"


def samples_text(snapshot: Stored) -> str:
    """How many samples, and which of them are gone or were never there."""
    others = [f"{len(snapshot.forgotten)} forgotten"] if snapshot.forgotten else []
    others += [f"{len(snapshot.absent)} never trained on"] if snapshot.absent else []
    return f"{snapshot.n_retained} of {snapshot.n_total}" + (f" ({', '.join(others)})" if others else "")


def text(snapshot: Stored) -> str:
    """What fits on a screen."""
    lines = {
        "samples": samples_text(snapshot),
        "objective": objective_text(snapshot),
        "response": snapshot.response.name,
        "stationarity": stationarity_text(snapshot),
        "polish": polish_text(snapshot.figures),
        "size": f"{snapshot.nbytes / 2**20:.1f} MiB, weights {snapshot.fingerprint[:12]}…, key {snapshot.key_id[:12]}…",
    }
    return shown(f"{type(snapshot).__name__} of {snapshot.scope}", lines, snapshot.warnings)


def shown(title: str, lines: Mapping[str, str | None], warnings: list[str]) -> str:
    """A title, aligned lines of at most two rows each, and the first warnings."""
    pairs = [*lines.items(), *(("note", w) for w in warnings[:4])]
    if len(warnings) > 4:
        pairs.append(("", f"and {len(warnings) - 4} more notes in .warnings"))
    wide = max(len(name) for name, _ in pairs)
    out = [textwrap.shorten(title, _WIDTH, placeholder=" …")]
    for name, what in pairs:
        if what:
            first, rest = f"  {name:<{wide}}  ", " " * (wide + 4)
            out += textwrap.wrap(
                what, _WIDTH, initial_indent=first, subsequent_indent=rest, max_lines=2, placeholder=" …"
            )
    return "\n".join(out)


def logged(snapshot: Stored) -> dict[str, float]:
    """The figures that go to a run's loggers."""
    figures: dict[str, float] = {
        "muter/stationarity": snapshot.stationarity,
        "muter/seconds": float(snapshot.figures["seconds"]),
        "muter/bytes": float(snapshot.nbytes),
        "muter/passes": float(snapshot.figures["passes"]),
    }
    for name, value in snapshot.figures.get("polish", {}).items():
        if isinstance(value, (int, float)):
            figures[f"muter/polish_{name}"] = float(value)
    return figures
