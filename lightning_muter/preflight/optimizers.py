"""What unlearning needs of the optimisers, as findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.weight_decay import no_decay_text, read_weight_decay, unwrapped
from lightning_muter.preflight.findings import Finding


def inspect_optimizers(
    optimizers: Iterable[Any],
    module: nn.Module,
    names: list[str],
    weight_decay: object = "auto",
    *,
    damped: bool = False,
    penalty: Mapping[str, float] | None = None,
) -> list[Finding]:
    """Findings about the optimisers, for unlearning the parameters ``names``; a given ``weight_decay`` settles it.

    Args:
        damped: the solve is damped (beyond the head), so that decay may be 0.
        penalty: lambda by parameter name that the step adds by itself.
    """
    plain = [unwrapped(o) for o in optimizers]
    named = dict(module.named_parameters())
    if not plain:
        return [Finding("error", "configure_optimizers returns no optimiser.", "Return one; nothing is trained.")]
    out = []
    if any(group.get("maximize") for o in plain for group in o.param_groups):
        out.append(Finding("error", "An optimiser maximises (maximize=True).", "Minimise a mean loss."))
    if len(plain) > 1:
        out.append(
            Finding(
                "warning",
                f"{len(plain)} optimisers: unlearning presumes that all of them minimise the one loss given here.",
                "Use one optimiser with parameter groups.",
            )
        )
    trained = {id(p) for o in plain for group in o.param_groups for p in group["params"]}
    missing = [n for n in names if id(named[n]) not in trained]
    if missing:
        out.append(
            Finding("error", f"No optimiser trains {', '.join(missing)}.", "Hand these parameters to the optimiser.")
        )
    penalty = penalty or {}
    if weight_decay != "auto":
        return out
    try:
        decays = read_weight_decay(plain, named.items())
    except UnsuitableError as e:
        return [*out, Finding("skip", str(e), cli="--trainer.callbacks.weight_decay 0.001")]
    undecayed = [n for n in names if decays[n] + penalty.get(n, 0.0) == 0.0]
    weights = [n for n in undecayed if named[n].dim() > 1 or len(names) == 1]
    if weights and damped:
        shown = ", ".join(weights[:3]) + (", ..." if len(weights) > 3 else "")
        text = f"Weight decay is 0 for {shown}: the minimiser is not unique, damping alone holds the steps."
        out.append(Finding("warning", text, "Give the optimiser weight_decay (1e-4 to 1e-2 is usual)."))
    elif weights:
        out.append(Finding("skip", no_decay_text(weights), cli="--trainer.callbacks.weight_decay 0.001"))
    elif undecayed:
        text = f"{', '.join(undecayed)} is not decayed: results will carry no certificate."
        out.append(Finding("note", text, "Decay every parameter of the head for one."))
    return out
