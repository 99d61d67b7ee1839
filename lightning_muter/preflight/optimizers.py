"""Weight decay, read off the optimisers: the lambda of the objective F = sum phi_i + (n / 2) sum_j lambda_j w_j^2.

Optimisers of the coupled kind (SGD, Adam, ...) add lambda w to the gradient of the *mean* loss: their stationary points
are those of F. AdamW and its like decouple it: theirs are those of no objective with this lambda.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn, optim
from torch.optim import Optimizer

from lightning_muter.errors import UnsuitableError
from lightning_muter.preflight.findings import Finding

_COUPLED = (
    optim.SGD,
    optim.Adam,
    optim.Adagrad,
    optim.Adadelta,
    optim.Adamax,
    optim.ASGD,
    optim.RMSprop,
    optim.RAdam,
    optim.NAdam,
)


def read_weight_decay(
    optimizers: Iterable[Optimizer], named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, float]:
    """lambda per parameter name; 0 for what is not decayed or in no optimiser.

    Args:
        optimizers: ``trainer.optimizers``, or plain ones (wrappers with an ``optimizer`` attribute are looked through).
        named_parameters: ``module.named_parameters()``.

    Raises:
        UnsuitableError: decay is decoupled (AdamW), of an unknown kind, or differs between optimisers for a parameter.

    >>> net = nn.Linear(2, 1)
    >>> groups = [{"params": [net.weight], "weight_decay": 0.01}, {"params": [net.bias], "weight_decay": 0.0}]
    >>> read_weight_decay([optim.SGD(groups, lr=0.1)], net.named_parameters())
    {'weight': 0.01, 'bias': 0.0}
    """
    named = list(named_parameters)
    found: dict[int, float] = {}
    for optimizer in map(_unwrap, optimizers):
        for group in optimizer.param_groups:
            decay = _decay(optimizer, group)
            for p in group["params"]:
                if found.setdefault(id(p), decay) != decay:
                    name = next((n for n, q in named if q is p), "a parameter")
                    raise UnsuitableError(
                        f"{name} has weight decay {found[id(p)]:g} in one optimiser and {decay:g} in another. Decay "
                        "it in one of them, or pass weight_decay=."
                    )
    return {name: found.get(id(p), 0.0) for name, p in named}


def _decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    decay = float(group.get("weight_decay", 0.0))
    if decay == 0.0:
        return 0.0
    name = type(optimizer).__name__
    if isinstance(optimizer, optim.AdamW) or group.get("decoupled_weight_decay") or name.endswith("W"):
        raise UnsuitableError(
            f"{name} decouples weight decay from the loss, so that its result minimises no objective with this decay. "
            f"Use torch.optim.Adam or SGD with weight_decay={decay:g}, or pass weight_decay=lambda to say which "
            "objective the head is polished to and unlearned in."
        )
    if not isinstance(optimizer, _COUPLED):
        raise UnsuitableError(
            f"Whether {name} adds weight decay to the gradient or decouples it is not known here. Use "
            "torch.optim.SGD or Adam, or pass weight_decay=lambda."
        )
    return decay


def _unwrap(optimizer: Any) -> Optimizer:
    """The optimiser inside wrappers such as LightningOptimizer."""
    while not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return inner


def no_decay_text(names: list[str]) -> str:
    """What is said where the objective has no curvature of its own: at the end of a fit and by ``unlearn``."""
    return (
        f"Weight decay is 0 (PyTorch's default) for {', '.join(names)}: without it the minimiser is not unique and the "
        "system to solve is singular. Give the optimiser weight_decay (1e-4 to 1e-2 is usual), or pass "
        "weight_decay=lambda; the head is then polished to that objective."
    )


def inspect_optimizers(
    optimizers: Iterable[Any],
    module: nn.Module,
    names: list[str],
    weight_decay: object = "auto",
    *,
    damped: bool = False,
) -> list[Finding]:
    """Findings about the optimisers, for unlearning the parameters ``names``; a given ``weight_decay`` settles it.

    Args:
        damped: the solve is damped (beyond the head), so that decay may be 0.
    """
    plain = [_unwrap(o) for o in optimizers]
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
    if weight_decay != "auto":
        return out
    try:
        decays = read_weight_decay(plain, named.items())
    except UnsuitableError as e:
        return [*out, Finding("skip", str(e))]
    undecayed = [n for n in names if decays[n] == 0.0]
    weights = [n for n in undecayed if named[n].dim() > 1 or len(names) == 1]
    if weights and damped:
        shown = ", ".join(weights[:3]) + (", ..." if len(weights) > 3 else "")
        text = f"Weight decay is 0 for {shown}: the minimiser is not unique, damping alone holds the steps."
        out.append(Finding("warning", text, "Give the optimiser weight_decay (1e-4 to 1e-2 is usual)."))
    elif weights:
        out.append(Finding("skip", no_decay_text(weights)))
    elif undecayed:
        text = f"{', '.join(undecayed)} is not decayed: results will carry no certificate."
        out.append(Finding("note", text, "Decay every parameter of the head for one."))
    return out
