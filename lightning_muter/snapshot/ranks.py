"""Several processes make one call: before anything is summed they agree on what it is of, or nothing happens in any of them.

What would go unseen otherwise: sums of other rows, or of the same rows in another order (each process reads every world-th),
from other weights, under other options; or another request. Compared are digests, under a key of this one call.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from lightning_muter.called_with import bind
from lightning_muter.forgotten.digests import sample_digests
from lightning_muter.forgotten.modules import recalled
from lightning_muter.forgotten.rows import known_keys, remember_key
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.distributed import Shards
from lightning_muter.snapshot.stored import Stored
from lightning_muter.storage.fingerprint import DigestKey, tensor_bytes, weight_fingerprint

Door = TypeVar("Door", bound=Callable[..., Any])
_DATA = ("dataset", "data", "retain")
#: May differ: where a process works, what it shows, how it reads.
_OWN = ("key", "progress", "device", "num_workers", "shards", "resume", "optimizers", "batch_size", "attack")


def ranks_agree(door: Door) -> Door:
    """Of a function that several processes call together (``shards``, else torch.distributed).

    Raises:
        MismatchError: in every process: they differ in what the message names.
    """
    signature = inspect.signature(door)

    @functools.wraps(door)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = bind(door.__name__, signature, args, kwargs)
        shards: Shards = bound.arguments.get("shards") or Shards.current()
        if shards.world == 1:
            return door(*args, **kwargs)
        if isinstance(bound.arguments.get("forget"), Iterable):
            bound.arguments["forget"] = list(bound.arguments["forget"])  # read once
        model: nn.Module = bound.arguments["model"]
        if "key" in signature.parameters:  # one key for all, the first process's
            like = getattr(bound.arguments.get("like"), "key", None)
            own = bound.arguments.get("key") or known_keys().get(recalled(model).key_id) or like
            bound.arguments["key"] = shards.gather(own or DigestKey.generate())[0]
            remember_key(bound.arguments["key"])
        shards.agree(_of_all_but_rows(model, bound.arguments))
        ephemeral = shards.gather(DigestKey.generate())[0]
        with shards.together():
            rows = _of_rows(ephemeral, bound.arguments)
        shards.agree(rows)
        return door(*bound.args, **bound.kwargs)

    return cast(Door, call)


def _of_all_but_rows(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, str]:
    told = {name: value for name, value in arguments.items() if name not in (*_OWN, *_DATA, "model", "forget")}
    record = recalled(model)
    return {
        "weights": weight_fingerprint(model.state_dict()),
        "request": _described(arguments.get("forget")),
        "forgotten rows": _described([record.n_total, list(record.positions)]),
        "numbers of rows": _described({name: len(arguments[name]) for name in _DATA if _is_data(arguments.get(name))}),
        **{name: _described(value) for name, value in told.items()},
    }


def _is_data(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _of_rows(key: DigestKey, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Digests of all rows that are read: what they are, and in which order."""
    found = {}
    for name in _DATA:
        data: Any = arguments.get(name)
        if not _is_data(data):
            continue
        positions = _read(name, len(data), arguments)
        source = SampleSource(data, collate=arguments.get("collate"), readable=positions) if positions else None
        rows = [bytes(row) for row in sample_digests(key, source, positions).numpy()] if source is not None else []
        found[f"rows of {name}"] = hashlib.sha256(b"".join(sorted(rows))).hexdigest()
        found[f"order of the rows of {name}"] = hashlib.sha256(b"".join(rows)).hexdigest()
    return found


def _read(name: str, length: int, arguments: Mapping[str, Any]) -> list[int]:
    """The positions that the call reads of this data (what is wrong with them is said by the call itself)."""
    snapshot, asked = arguments.get("snapshot"), arguments.get("forget")
    gone = set(recalled(arguments["model"]).placed(arguments[name]))
    if isinstance(snapshot, Stored):
        gone |= set(range(snapshot.n_total)) - set(snapshot.retained_positions)
        if (
            name == "data"
            and asked is not None
            and (arguments.get("retain") is not None or not snapshot.reads_retained)
        ):
            wanted = [int(i) for i in asked if isinstance(i, int) and 0 <= i < length]
            return sorted(set(wanted) - gone)
    return [i for i in range(length) if i not in gone]


def _described(value: Any) -> str:
    """Plain values, tensors and records by content; anything else by its kind."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(tensor_bytes(value)).hexdigest()]
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, Stored):  # its digests are under a key that each process may have of its own
        return _plain([value.fingerprint, value.n_total, list(value.forgotten), value.scope])
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return getattr(value, "__qualname__", type(value).__qualname__)
