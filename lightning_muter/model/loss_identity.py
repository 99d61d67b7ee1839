"""What tells one loss from another: function, arguments, and the content of the tensors and numbers inside."""

from __future__ import annotations

import functools
import hashlib
import inspect
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muter.model.losses import IgnoresReduction, Loss


def loss_identity(loss: Any) -> str:
    """A description that is the same for the same loss and another one for another: function, arguments, content of tensors.

    >>> loss_identity(nn.CrossEntropyLoss()) == loss_identity(F.cross_entropy)
    True
    >>> loss_identity(nn.CrossEntropyLoss(label_smoothing=0.2))
    'torch.nn.functional.cross_entropy(label_smoothing=0.2)'
    """
    if isinstance(loss, IgnoresReduction):
        summed = "sums over outputs, " if loss.sums else ""
        return summed + loss_identity(loss.module)
    if isinstance(loss, functools.partial):
        keywords = ", ".join(f"{k}={_shown(v)}" for k, v in sorted(loss.keywords.items()) if k != "reduction")
        arguments = ", ".join([*map(_shown, loss.args), *([keywords] if keywords else [])])
        return f"{loss_identity(loss.func)}({arguments})" if arguments else loss_identity(loss.func)
    if isinstance(loss, nn.Module):
        return _module_identity(loss)
    if getattr(loss, "traced", False):
        return repr(loss)
    name = getattr(loss, "__qualname__", None)
    if name is None:
        return repr(loss)
    inside = _inside(loss)
    return f"{loss.__module__}.{name}" + (f"#{inside}" if inside else "")


def in_words(identity: str) -> str:
    """An identity as people read it: a loss without a name is the step's own, known again by the digest of its operations.

    >>> in_words("traced:1758faac5c222a1e"), in_words("my.loss#77aa")
    ("the step's own, as written (1758faac)", 'my.loss#77aa')
    """
    kind, _, digest = identity.partition(":")
    return f"the step's own, as written ({digest[:8]})" if kind == "traced" else identity


def _inside(function: Any) -> str:
    """Digest of the numbers and tensors that a function of one's own holds: constants, defaults, closure, globals; "" for none."""
    if not inspect.isfunction(function) or str(function.__module__).split(".")[0] == "torch":
        return ""
    seen = inspect.getclosurevars(function)
    held = [c for c in function.__code__.co_consts if isinstance(c, (int, float))]
    held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    held += [*seen.nonlocals.values(), *seen.globals.values()]
    shown = [_shown(v) for v in held if isinstance(v, (int, float, Tensor, nn.Module, functools.partial))]
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:12] if shown else ""


#: What files of version 0.1 call these losses.
_EARLIER = {
    "CrossEntropyLoss()": "torch.nn.functional.cross_entropy",
    "MSELoss()": "torch.nn.functional.mse_loss",
    "BCEWithLogitsLoss()": "torch.nn.functional.binary_cross_entropy_with_logits",
    "HuberLoss()": "torch.nn.functional.huber_loss",
    "SoftMarginLoss()": "torch.nn.functional.soft_margin_loss",
}


def same_loss(one: str, other: str) -> bool:
    """Whether two identities are of the same loss; of a function of one's own, files of version 0.1 hold the name alone.

    >>> same_loss("my.loss", "my.loss#0a1b"), same_loss("my.loss#77aa", "my.loss#0a1b")
    (True, False)
    """
    one, other = _EARLIER.get(one, one), _EARLIER.get(other, other)
    return one == other or (("#" in one) != ("#" in other) and one.partition("#")[0] == other.partition("#")[0])


#: Loss modules and the functions they are.
_FUNCTIONS: dict[type, Loss] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.MultiLabelSoftMarginLoss: F.multilabel_soft_margin_loss,
    nn.MultiMarginLoss: F.multi_margin_loss,
}


def _module_identity(loss: nn.Module) -> str:
    """By class and whatever it holds: public attributes and tensors."""
    function = _FUNCTIONS.get(type(loss))
    held = {k: v for k, v in vars(loss).items() if not k.startswith("_") and k not in ("training", "reduction")}
    held |= dict(loss.named_buffers()) | dict(loss.named_parameters())
    if function is None:
        base, defaults = repr(loss), {}
    else:
        base = loss_identity(function)
        defaults = {k: p.default for k, p in inspect.signature(function).parameters.items()}
        held = {k: v for k, v in held.items() if k in defaults and not isinstance(v, Tensor) and v != defaults[k]} | {
            k: v for k, v in held.items() if isinstance(v, Tensor)
        }
    arguments = ", ".join(f"{k}={_shown(v)}" for k, v in sorted(held.items()))
    return f"{base}({arguments})" if arguments else base


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return loss_identity(value) if isinstance(value, (nn.Module, functools.partial)) else repr(value)
    plain = value.detach().cpu().double().contiguous()
    digest = hashlib.sha256(repr((tuple(plain.shape), plain.flatten().tolist())).encode()).hexdigest()
    return f"tensor:{digest[:16]}"
