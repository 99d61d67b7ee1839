"""Lightning checkpoints as requests see them: read without running code, written without anybody's old influence.

What a request writes is an ordinary Lightning checkpoint (`load_from_checkpoint`, `trainer.test(ckpt_path=...)`,
`weights_only=True`) holding the new weights, the hyperparameters and counters. Left out is what may remember forgotten
samples: optimiser and scheduler states, callback states (averaged weights lie there) and tensors of unknown entries.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_muter.errors import ArgumentError, CorruptFileError
from lightning_muter.storage.archive import check_archive
from lightning_muter.storage.atomic import Writer
from lightning_muter.storage.fingerprint import weight_fingerprint

# What Lightning needs for loading; none of it depends on single samples except through the weights themselves.
_KEPT = (
    "epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "hparams_name", "hparams_type",
    "datamodule_hyper_parameters", "datamodule_hparams_name", "datamodule_hparams_type",
)  # fmt: skip
_DROPPED = ("optimizer_states", "lr_schedulers", "callbacks", "loops", "MixedPrecision", "native_amp_scaling_state")
_SLACK = 64 << 20  # bytes of weights that a file need not hold: expanded tensors are stored once
_ADVICE = "Restore it from a backup, or name another checkpoint."


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A Lightning checkpoint on the CPU, read by torch's restricted unpickler: nothing in the file is run, and no more memory
    is taken than the file has bytes (and 64 MiB).

    Raises:
        ArgumentError: there is no such file.
        CorruptFileError: it is damaged, needs an unrestricted unpickler, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ArgumentError("ckpt_path", str(path), "an existing checkpoint file")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's contents; whatever matters is checked below
            check_archive(file)
            checkpoint = _load(file)
            limit = os.fstat(file.fileno()).st_size + _SLACK
    except Exception as error:  # a third party's parser on untrusted bytes: whatever it raises means the same
        reason = " ".join(str(error).split())[:300]
        raise CorruptFileError(
            f"{path}: not a checkpoint that can be read safely ({type(error).__name__}: {reason}). {_ADVICE} One that "
            "holds objects other than tensors, numbers and text must be saved anew without them."
        ) from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(name, str) and _dense(value) for name, value in weights.items())
    ):
        raise CorruptFileError(f"{path}: no `state_dict` of plain tensors in it; not a Lightning checkpoint. {_ADVICE}")
    if (needed := sum(tensor.numel() * tensor.element_size() for tensor in weights.values())) > limit:
        raise CorruptFileError(
            f"{path}: its weights would take {needed} bytes, far more than the file has: elements that share memory (stride "
            f"0), or nothing behind them. {_ADVICE}"
        )
    return checkpoint


def _load(file: BinaryIO) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _dense(value: object) -> bool:
    """A tensor whose bytes can be read; the restricted unpickler also lets sparse and quantised ones through."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.numel() < 1 << 48


def checkpoint_fingerprint(checkpoint: Mapping[str, Any]) -> str:
    """The fingerprint of a checkpoint's weights."""
    return weight_fingerprint(checkpoint["state_dict"])


def renewed(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """The checkpoint with other weights and without old influence; also what was left out of it besides the usual.

    >>> one = torch.ones(1)
    >>> old = {"state_dict": {"w": one}, "epoch": 3, "optimizer_states": [], "ema": {"w": one}, "note": "a"}
    >>> renewed(old, {"w": torch.zeros(1)})
    ({'epoch': 3, 'note': 'a', 'state_dict': {'w': tensor([0.])}}, ['ema'])
    """
    result, left_out = {}, []
    for name, value in checkpoint.items():
        if name in _KEPT or (name not in _DROPPED and name != "state_dict" and not _holds_tensors(value)):
            result[name] = value
        elif name not in _DROPPED and name != "state_dict":
            left_out.append(str(name))
    result["state_dict"] = {name: tensor.detach().to("cpu").clone() for name, tensor in weights.items()}
    return result, left_out


def _holds_tensors(value: object) -> bool:
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, (Mapping, list, tuple, set)):
            if id(item) not in seen:  # lists of one list, many times over, take exponentially long otherwise
                seen.add(id(item))
                waiting += item.values() if isinstance(item, Mapping) else item
        elif not isinstance(item, (str, bytes, int, float, bool, type(None))):
            return True
    return False


def checkpoint_writer(checkpoint: Mapping[str, Any]) -> Writer:
    """A writer of this checkpoint for a transaction."""
    return lambda file: torch.save(dict(checkpoint), file)


def remembers(checkpoint: Mapping[str, Any]) -> list[str]:
    """What a checkpoint holds besides weights that may remember single samples."""
    found = [name for name in _DROPPED if checkpoint.get(name) and _holds_tensors(checkpoint[name])]
    known = {*_KEPT, *_DROPPED, "state_dict"}
    return found + sorted(str(name) for name in checkpoint if name not in known and _holds_tensors(checkpoint[name]))
