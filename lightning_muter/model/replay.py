"""A module's own ``training_step``, run without a trace: what it logs, counts, draws or stores is as it was afterwards.

Plain torch: a LightningModule is known by its methods alone.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.head import eager, eval_mode
from lightning_muter.model.kept import Kept


class SkippedBatchError(UnsuitableError):
    """The step gives no loss for this batch; it may for another."""


#: Set while a step is replayed: what is wrapped around steps (an attack, a measurement) then stays out of the way.
replaying: ContextVar[bool] = ContextVar("replaying", default=False)

_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


def has_step(module: Any) -> bool:
    """Whether this is a module with a training step of its own (a LightningModule of either package name)."""
    step = getattr(type(module), "training_step", None)
    return step is not None and getattr(step, "__module__", "").split(".")[0] not in _LIGHTNING


def prepared(module: nn.Module, batch: Any) -> Any:
    """The batch as the step receives it: through ``on_before_batch_transfer``, ``transfer_batch_to_device`` and
    ``on_after_batch_transfer`` of the module, or of the datamodule its trainer has.
    """
    hooks: Any = module
    if not hasattr(hooks, "_apply_batch_transfer_handler"):
        return batch
    with _unlogged(module):
        return hooks._apply_batch_transfer_handler(hooks._on_before_batch_transfer(batch))


def run_step(module: nn.Module, batch: Any) -> Tensor:
    """The loss that ``training_step`` gives for ``batch``, a scalar with its graph. Call it inside :func:`undone`.

    Raises:
        UnsuitableError: the step gives no scalar loss.
    """
    step: Callable[..., Any] = module.training_step  # type: ignore[assignment]
    names = _parameters(module)
    out = step(batch, **{name: 0 for name in ("batch_idx", "dataloader_idx") if name in names}, **_second(names))
    loss = out.get("loss") if isinstance(out, Mapping) else out
    if out is None:
        raise SkippedBatchError(
            "training_step returns None, not one loss, for these rows: it skips them. Return the loss."
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UnsuitableError(
            f"training_step returns {type(out).__name__}, not one loss (a tensor with one number, or a dict with 'loss'). "
            "Return the loss, or pass loss= to say what is minimised."
        )
    return loss.reshape(())


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The step's own parameters, without self, whatever is wrapped around it for the time of a run."""
    own = vars(module).get("training_step")
    if own is not None and not hasattr(own, "__wrapped__"):
        return dict(inspect.signature(own).parameters)
    kind: Any = type(module)
    return dict(list(inspect.signature(kind.training_step).parameters.items())[1:])


def _second(names: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """A batch index under another name (`_`, `i`, `idx`) is the second positional parameter."""
    plain = [n for n, p in names.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
    known = ("batch_idx", "dataloader_idx")
    return {plain[1]: 0} if len(plain) > 1 and plain[1] not in known else {}


@contextmanager
def undone(module: nn.Module) -> Iterator[None]:
    """Eval mode, gradients on, no autocast; afterwards weights' ``.grad``, buffers, attributes, random states, metrics, loggers
    and the trainer's own attributes are as they were, also after an exception.
    """
    token = replaying.set(True)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - steps may draw from the global one
    devices = [next(module.parameters()).device] if _on_cuda(module) else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            _state_kept(module),
            eval_mode(module),
            eager(module),
            _unlogged(module),
            _unmeasured(module),
        ):
            yield
    finally:
        replaying.reset(token)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _on_cuda(module: nn.Module) -> bool:
    first = next(module.parameters(), None)
    return first is not None and first.device.type == "cuda"


@contextmanager
def _state_kept(module: nn.Module) -> Iterator[None]:
    """Weights' ``.grad``, buffers, and everything that modules hold as attributes: numbers, tensors, containers, meters."""
    grads = [(p, p.grad) for p in module.parameters()]
    buffers = [(m, name, b, b.clone()) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    keep = Kept()
    for m in module.modules():
        keep.attributes(m, leave=("_parameters", "_buffers", "_modules"))
    try:
        for p, _ in grads:
            p.grad = None
        yield
    finally:
        for p, grad in grads:
            p.grad = grad
        keep.put_back()
        with torch.no_grad():
            for m, name, buffer, before in buffers:
                m._buffers[name] = buffer
                buffer.copy_(before)


class _Silent:
    """Answers to anything, does nothing: a logger, its experiment, ..."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Silent()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Silent()


@contextmanager
def _unlogged(module: nn.Module) -> Iterator[None]:
    """``log``, ``log_dict``, ``print``, the loggers and the progress bar do nothing."""
    own = vars(module)
    names = [n for n in ("log", "log_dict", "print") if callable(getattr(type(module), n, None))]
    before = {n: own[n] for n in names if n in own}
    trainer: Any = own.get("_trainer")
    loggers = list(getattr(trainer, "loggers", ())) if trainer is not None else []
    for n in names:
        own[n] = lambda *args, **kwargs: None
    if loggers:
        trainer.loggers = [_Silent()]
    try:
        yield
    finally:
        if loggers:
            trainer.loggers = loggers
        for n in names:
            own.pop(n, None)
        own.update(before)


@contextmanager
def _unmeasured(module: nn.Module) -> Iterator[None]:
    """Metrics keep their state, and their calls cost nothing."""
    metrics = [m for m in module.modules() if isinstance(m, (torchmetrics.Metric, torchmetrics.MetricCollection))]

    def number(*args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())

    def numbers(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return _Zeros()

    with ExitStack() as stack:
        for metric in metrics:
            answer = number if isinstance(metric, torchmetrics.Metric) else numbers
            for name in ("forward", "update", "compute", "reset"):
                stack.callback(_put_back, vars(metric), name, vars(metric).get(name))
                vars(metric)[name] = answer
        yield


def _put_back(own: dict[str, Any], name: str, before: Any) -> None:
    if before is None:
        own.pop(name, None)
    else:
        own[name] = before


class _Zeros(dict[str, Tensor]):
    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(())
