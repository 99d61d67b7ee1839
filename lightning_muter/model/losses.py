"""Losses as the rest of the package wants them: one number per sample, from logits and labels.

A loss is a ``callable(logits, y, reduction="none") -> (n,)``: a function of ``torch.nn.functional``, a ``torch.nn``
loss module, a ``functools.partial`` of either, or a function of one's own with a ``reduction`` argument.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_muter.errors import ArgumentError

Loss = Callable[..., Tensor]

_BINARY = (F.binary_cross_entropy_with_logits, F.soft_margin_loss)
_BINARY_MODULES = (nn.BCEWithLogitsLoss, nn.SoftMarginLoss)
_FORMS = (
    "a callable(logits, y, reduction='none') that gives one number per sample, such as "
    "torch.nn.functional.cross_entropy, or a torch.nn loss module"
)


def resolve_loss(loss: Loss | None, module: nn.Module | None = None) -> Loss:
    """The loss in force: ``loss``, else ``module.criterion``, else cross-entropy; takes ``reduction="none"``.

    A ``torch.nn`` loss module is copied (shallowly: its class weights stay shared and move with the model).

    Raises:
        ArgumentError: it cannot give one number per sample.

    >>> resolve_loss(nn.MSELoss())(torch.zeros(2), torch.tensor([1.0, 2.0]), reduction="none")
    tensor([1., 4.])
    """
    if loss is None:
        loss = getattr(module, "criterion", None)
        if loss is None:
            return F.cross_entropy
    if not callable(loss):
        raise ArgumentError("loss", loss, _FORMS)
    if isinstance(loss, nn.Module):
        if _takes_reduction(loss.forward):
            return loss
        if not hasattr(loss, "reduction"):
            raise ArgumentError("loss", loss, _FORMS, "Give your loss module a `reduction` attribute that it obeys.")
        summed = loss.reduction == "sum"
        unreduced = copy.copy(loss)
        setattr(unreduced, "reduction", "none")  # noqa: B010 - nn.Module types it as a Tensor
        return IgnoresReduction(unreduced, summed)
    if not _takes_reduction(loss):
        raise ArgumentError("loss", loss, _FORMS, "Add an argument reduction='mean' to your function and obey 'none'.")
    return loss


class IgnoresReduction:
    """A loss module whose reduction is already "none", called as a function would be."""

    def __init__(self, module: nn.Module, sums: bool) -> None:
        self.module, self.sums = module, sums

    def __call__(self, logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
        if reduction != "none":
            raise ArgumentError("reduction", reduction, "'none'")
        out: Tensor = self.module(logits, y)
        return out

    def __repr__(self) -> str:
        return repr(self.module)


def per_sample(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """ell_i = loss(logits_i, y_i), shape (n,); several outputs per sample are averaged, as torch's own mean does (summed where the
    loss module was made with ``reduction="sum"``).

    One logit per sample may come as (n,) or (n, 1), its labels likewise and in any dtype; they are aligned first (a
    silent broadcast to (n, n) is the classic trap).

    >>> per_sample(F.binary_cross_entropy_with_logits, torch.zeros(2, 1), torch.tensor([0, 1]))
    tensor([0.6931, 0.6931])
    """
    n = logits.shape[0]
    if not getattr(loss, "traced", False):  # a traced one takes z and y as they are
        logits, y = aligned(loss, logits, y)
    out = called(loss, logits, y, reduction="none")
    if out.dim() == 0 or out.shape[0] != n:
        raise ArgumentError("loss", loss, _FORMS, f"It gave shape {tuple(out.shape)} for {n} samples.")
    if out.dim() == 1:
        return out
    out = out.reshape(n, -1)
    return out.sum(1) if getattr(loss, "sums", False) else out.mean(1)


def aligned(loss: Loss, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels in the shapes and dtypes that ``loss`` takes: one logit flat, class indices as int64, the rest as logits."""
    n = logits.shape[0]
    if one_logit(logits):
        if is_cross_entropy(loss) or bare(loss) in (F.cross_entropy, nn.CrossEntropyLoss):
            raise ArgumentError(
                "loss",
                loss,
                "a loss for one logit",
                "The model gives one logit, where cross-entropy over classes is always 0: set `criterion` on "
                "the module, or pass loss=torch.nn.functional.binary_cross_entropy_with_logits (two classes) or "
                "loss=torch.nn.functional.mse_loss (regression).",
            )
        if y.numel() != n:
            raise ArgumentError("y", tuple(y.shape), f"one label per sample, ({n},) or ({n}, 1)")
        return logits.reshape(n), y.reshape(n).to(logits.dtype)
    if bare(loss) in (F.cross_entropy, nn.CrossEntropyLoss):
        if y.dim() == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.dim() == 1 and y.dtype != torch.int64:
            y = y.long()
    same = y.shape == logits.shape
    return logits, y.to(logits.dtype) if y.is_floating_point() or same else y


class _OneDtype(TorchFunctionMode):
    """Floating tensors meet in one dtype: class weights that a loss holds in float32 and logits in float64."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def same(value: Any) -> Any:
            return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return func(*map(same, args), **{k: same(v) for k, v in (kwargs or {}).items()})


def called(loss: Loss, logits: Tensor, y: Tensor, **more: Any) -> Tensor:
    """loss(logits, y), also where tensors inside it are of another precision than the logits: they are raised to theirs.

    >>> weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    >>> called(weighted, torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1]))
    tensor(0.6931, dtype=torch.float64)
    """
    try:
        out: Tensor = loss(logits, y, **more)
    except RuntimeError as error:
        if "scalar type" not in str(error) and "dtype" not in str(error):
            raise
        with _OneDtype(logits.dtype):
            out = loss(logits, y, **more)
    return out


def reduced(loss: Loss | None, resolved: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """L(logits, y), one number, as ``loss`` itself reduces a batch (torch's denominators); a mean where it does not.

    >>> weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    >>> z = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> reduced(weighted, resolve_loss(weighted))(z, torch.tensor([0, 1]))
    tensor(1.7685)
    """
    own = F.cross_entropy if loss is None else loss

    def whole(logits: Tensor, y: Tensor) -> Tensor:
        logits, y = aligned(resolved, logits, y)
        try:
            out = called(own, logits, y)
        except TypeError:  # a function that must be told its reduction
            out = called(own, logits, y, reduction="none")
        return out if out.dim() == 0 else out.mean()

    return whole


def one_logit(logits: Tensor) -> bool:
    """Whether each sample has a single output: (n,) or (n, 1)."""
    return logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1)


def is_cross_entropy(loss: Loss | None) -> bool:
    """Whether this is plain multi-class cross-entropy (no class weights, no smoothing), the one thing that torchattacks
    maximises.

    >>> is_cross_entropy(F.cross_entropy), is_cross_entropy(functools.partial(F.cross_entropy, label_smoothing=0.1))
    (True, False)
    """
    if isinstance(loss, IgnoresReduction):
        loss = loss.module
    if isinstance(loss, nn.CrossEntropyLoss):
        return type(loss) is nn.CrossEntropyLoss and loss.weight is None and loss.label_smoothing == 0.0
    if isinstance(loss, functools.partial):
        plain = {"reduction", "ignore_index"}
        return is_cross_entropy(loss.func) and not loss.args and set(loss.keywords) <= plain
    return loss is None or loss is F.cross_entropy


def is_binary(loss: Loss) -> bool:
    """Whether this is a known loss for two classes on one logit (the sign of the logit is the prediction)."""
    return bare(loss) in (*_BINARY, *_BINARY_MODULES)


def bare(loss: Any) -> Any:
    """The function behind partials, or the class of a loss module."""
    if isinstance(loss, IgnoresReduction):
        loss = loss.module
    while isinstance(loss, functools.partial):
        loss = loss.func
    return type(loss) if isinstance(loss, nn.Module) else loss


def _takes_reduction(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature: let the call tell
        return True
    return any(p.name == "reduction" or p.kind is p.VAR_KEYWORD for p in parameters)


def accuracy(loss: Loss, logits: Tensor, y: Tensor) -> Tensor | None:
    """Fraction of samples that are right, or None for a regression.

    Several logits: argmax against integer labels. One logit: its sign, when the loss is a known two-class one or the
    labels are integers or booleans.
    """
    from torchmetrics.functional.classification import binary_accuracy, multiclass_accuracy

    if one_logit(logits):
        if not (is_binary(loss) or not y.is_floating_point()):
            return None
        positive = (logits.reshape(-1) > 0).long()
        return binary_accuracy(positive, (y.reshape(-1) > 0).long())
    if logits.dim() != 2 or y.dim() != 1 or y.is_floating_point():
        return None
    return multiclass_accuracy(
        logits.float(), y.long(), num_classes=logits.shape[1], average="micro", validate_args=False
    )


def mean_loss(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """Mean of the per-sample losses, in float32 at least."""
    values = per_sample(loss, logits, y)
    return values.to(torch.promote_types(values.dtype, torch.float32)).mean()
