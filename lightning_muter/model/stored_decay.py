"""Weight decay of the optimiser that trained, read off a checkpoint: not off the optimiser that today's code would make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn, optim

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.weight_decay import decay_of, unwrapped, used_optimizers

# How a step is computed, not what it minimises: they come and go between versions of torch.
_HOW = {"foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay"}
# What schedulers and Lightning add to a group.
_ADDED = {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
_RECOGNISED = (optim.SGD, optim.Adam, optim.Adagrad, optim.Adadelta, optim.ASGD, optim.RMSprop, optim.NAdam)
_Group = Mapping[str, Any]
_PASS = "Pass weight_decay=lambda (--weight_decay) of the optimiser that trained."


def stored_decay(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, float] | None:
    """lambda by parameter name, of the optimisers whose states a Lightning checkpoint holds; None where it holds none.

    A checkpoint numbers parameters and does not name the optimiser. Names come from the groups themselves (torch's
    ``named_parameters``), from ``configure_optimizers`` where it makes groups of the same sizes, or from the module's order;
    the shapes of stored momenta must agree. The kind comes from the hyperparameters that the groups hold.

    Raises:
        UnsuitableError: the groups cannot be matched with parameters, or the kind of optimiser is not known or decouples
            decay.
    """
    states = [s for s in checkpoint.get("optimizer_states") or [] if s.get("param_groups")]
    if not states:
        return None
    try:
        today = [unwrapped(o) for o in used_optimizers(model)]
    except Exception:  # the user's own code, which may need arguments or a trainer that only the training had
        today = []
    named = _named(states, model, today)
    found = dict.fromkeys((name for name, _ in model.named_parameters()), 0.0)
    for number, (state, names) in enumerate(zip(states, named, strict=True)):
        kind = today[number] if number < len(today) else None
        at = iter(names)
        for group in state["param_groups"]:
            decay = _decay(group, kind)
            for _ in group["params"]:
                found[next(at)] = decay
    return found


def _decay(group: _Group, today: optim.Optimizer | None) -> float:
    """The weight decay of one group of an optimiser.

    Raises:
        UnsuitableError: decoupled, or of an unknown kind.
    """
    if not float(group.get("weight_decay", 0.0)):
        return 0.0
    kind = type(today) if today is not None and _marks(today.param_groups[0]) == _marks(group) else _kind(group)
    return decay_of(kind, group)


def _kind(group: _Group) -> type[optim.Optimizer]:
    """The optimiser that keeps exactly these hyperparameters; Adam and AdamW keep the same and tell by a flag."""
    for kind in _RECOGNISED:
        sample: Any = kind
        if _marks(sample([nn.Parameter(Tensor([0.0]))], lr=0.1).param_groups[0]) != _marks(group):
            continue
        if kind is not optim.Adam or "decoupled_weight_decay" in group:
            return kind
    raise UnsuitableError(
        f"The optimiser that trained keeps {', '.join(sorted(_marks(group)))}: whether it adds weight decay to the gradient "
        f"or decouples it cannot be told from the checkpoint. {_PASS}"
    )


def _marks(group: _Group) -> set[str]:
    return set(group) - _HOW - _ADDED


def _named(states: Sequence[Any], model: nn.Module, today: Sequence[optim.Optimizer]) -> list[list[str]]:
    """The names of the parameters of each stored optimiser, in its order.

    Raises:
        UnsuitableError: no order fits.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    sizes = [[len(g["params"]) for g in s["param_groups"]] for s in states]
    ways: list[list[list[str]]] = []
    if all(g.get("param_names") for s in states for g in s["param_groups"]):
        ways.append([[n for g in s["param_groups"] for n in g["param_names"]] for s in states])
    if [[len(g["params"]) for g in o.param_groups] for o in today] == sizes:
        ways.append([[names.get(id(p), "") for g in o.param_groups for p in g["params"]] for o in today])
    if len(states) == 1:
        alike = len({float(g.get("weight_decay", 0.0)) for g in states[0]["param_groups"]}) == 1
        for choice in ([n for n, p in model.named_parameters() if p.requires_grad], list(names.values())):
            if (alike or len(sizes[0]) == 1) and len(choice) == sum(sizes[0]):
                ways.append([choice])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for way in ways:
        if all(n in shapes for part in way for n in part) and all(
            map(lambda s, part: _fits(s, part, shapes), states, way)
        ):
            return way
    decays = [[(len(g["params"]), float(g.get("weight_decay", 0.0))) for g in s["param_groups"]] for s in states]
    raise UnsuitableError(
        f"The checkpoint's optimiser has groups of (parameters, weight decay) {decays}, which cannot be matched with this "
        f"module's parameters by configure_optimizers or by their order. {_PASS}"
    )


def _fits(state: Any, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether stored momenta have the shapes of the parameters that they would belong to."""
    numbers = [i for g in state["param_groups"] for i in g["params"]]
    if len(numbers) != len(names):
        return False
    for number, name in zip(numbers, names, strict=True):
        kept = [t for t in state.get("state", {}).get(number, {}).values() if isinstance(t, Tensor) and t.dim()]
        if any(tuple(t.shape) != shapes[name] for t in kept):
            return False
    return True
