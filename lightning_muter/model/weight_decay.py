"""Weight decay, read off the optimisers: the lambda of the objective F = sum phi_i + (n / 2) sum_j lambda_j w_j^2.

Optimisers of the coupled kind (SGD, Adam, ...) add lambda w to the gradient of the *mean* loss: their stationary points
are those of F. AdamW and its like decouple it: theirs are those of no objective with this lambda.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn, optim
from torch.optim import Optimizer

from lightning_muter.errors import ArgumentError, UnsuitableError

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


class WholeDecay(dict[str, float]):
    """lambda per parameter name with everything in it, a penalty that the training step adds by itself too: of a snapshot."""


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
    for optimizer in map(unwrapped, optimizers):
        for group in optimizer.param_groups:
            decay = decay_of(type(optimizer), group)
            for p in group["params"]:
                if found.setdefault(id(p), decay) != decay:
                    name = next((n for n, q in named if q is p), "a parameter")
                    raise UnsuitableError(
                        f"{name} has weight decay {found[id(p)]:g} in one optimiser and {decay:g} in another. Decay "
                        "it in one of them, or pass weight_decay=."
                    )
    return {name: found.get(id(p), 0.0) for name, p in named}


def decay_of(kind: type[Optimizer], group: Mapping[str, Any]) -> float:
    """lambda of one parameter group of an optimiser of this kind.

    Raises:
        UnsuitableError: decoupled (AdamW), or of a kind that is not known.
    """
    decay = float(group.get("weight_decay", 0.0))
    if decay == 0.0:
        return 0.0
    name = kind.__name__
    if group.get("decoupled_weight_decay") and not name.endswith("W"):
        name += "W"
    if issubclass(kind, optim.AdamW) or group.get("decoupled_weight_decay") or name.endswith("W"):
        raise UnsuitableError(
            f"{name} decouples weight decay from the loss, so that its result minimises no objective with this decay. "
            f"Use torch.optim.Adam or SGD with weight_decay={decay:g}, or pass weight_decay=lambda to say which "
            "objective the head is polished to and unlearned in."
        )
    if not issubclass(kind, _COUPLED):
        raise UnsuitableError(
            f"Whether {name} adds weight decay to the gradient or decouples it is not known here. Use "
            "torch.optim.SGD or Adam, or pass weight_decay=lambda."
        )
    return decay


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimiser inside wrappers such as LightningOptimizer."""
    while not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return inner


def used_optimizers(model: nn.Module, optimizers: Iterable[Any] | None = None) -> list[Any]:
    """The optimisers: given, those of the trainer that fitted the module, or what ``configure_optimizers`` makes today.

    Raises:
        ArgumentError: the module has none of them.
    """
    if optimizers is not None:
        return list(optimizers)
    trained = getattr(getattr(model, "_trainer", None), "optimizers", None)
    if trained:
        return list(trained)
    configure: Any = getattr(model, "configure_optimizers", None)
    if configure is None:
        raise ArgumentError(
            "weight_decay",
            "auto",
            "a number for a module without configure_optimizers",
            "Pass the weight_decay that the optimiser used, e.g. weight_decay=5e-4.",
        )
    return _flat_optimizers(configure())


def _flat_optimizers(found: Any) -> list[Any]:
    """The optimisers in any of the forms that ``configure_optimizers`` may return."""
    if isinstance(found, Optimizer):
        return [found]
    if isinstance(found, Mapping):
        return _flat_optimizers(found["optimizer"])
    if isinstance(found, (tuple, list)):
        out = []
        for item in found:
            if isinstance(item, (Optimizer, Mapping)) or (
                isinstance(item, (tuple, list)) and any(isinstance(i, Optimizer) for i in item)
            ):
                out += _flat_optimizers(item) if not (isinstance(item, Mapping) and "optimizer" not in item) else []
        return out
    return []


def no_decay_text(names: list[str]) -> str:
    """What is said where the objective has no curvature of its own: at the end of a fit and by ``unlearn``."""
    return (
        f"Weight decay is 0 (PyTorch's default) for {', '.join(names)}: without it the minimiser is not unique and the "
        "system to solve is singular. Give the optimiser weight_decay (1e-4 to 1e-2 is usual), or pass "
        "weight_decay=lambda; the head is then polished to that objective."
    )
