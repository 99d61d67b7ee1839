"""Statistics that survive an interruption: partial sums and a cursor in a file, written every so many samples.

The file is taken up again only by the same computation on the same samples: weights, objective, order and process are
compared, and a hash of the samples summed so far, so that nothing is added twice or left out. It is deleted at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.hessian.sums import BlockSymmetric, Sums
from lightning_muter.curvature.objective.sharded import ShardedObjective
from lightning_muter.curvature.response.choose import Response
from lightning_muter.errors import ArgumentError, CorruptFileError, MismatchError
from lightning_muter.forgotten.digests import sample_digests
from lightning_muter.model.loss_identity import loss_identity
from lightning_muter.snapshot.codec import encode
from lightning_muter.storage.container import read_container, write_container
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint

_KIND = "partial sums"
_ANEW = "Delete the file to begin anew."


@dataclass(frozen=True)
class Resumable:
    """Where partial sums are kept and how often they are written.

    Args:
        path: the file; process r of several appends ``.r``.
        every: samples between two writes, rounded up to whole batches.
    """

    path: Path
    every: int = 10_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not (isinstance(self.every, int) and self.every >= 1):
            raise ArgumentError("every", self.every, "a number of samples, 1 or larger")

    def sums(
        self, objective: ShardedObjective, theta: Tensor, response: Response, curvature: Curvature, settle: bool = True
    ) -> tuple[Sums, Tensor]:
        """``objective.sums(theta, response=..., curvature=...)``, chunk by chunk, from where the file left off.

        Raises:
            MismatchError: the file is of another computation or of other samples; CorruptFileError: it is damaged.
        """
        path = self.path
        if objective.shards.world > 1:
            path = path.with_name(f"{path.name}.{objective.shards.rank}")
        positions, problem = [int(i) for i in objective.own], objective.problem
        identity = _identity(objective, theta, response, curvature, positions)
        total = Sums.zeros(problem.shape, problem.dtype, problem.device, hessian=True)
        key = DigestKey(bytes.fromhex(identity))
        deltas: list[Tensor] = []
        seen: list[Tensor] = []
        done = 0
        if path.exists():
            total, delta, done, samples = _read(path, identity, objective, len(positions))
            deltas.append(delta)
            seen.append(sample_digests(key, objective.source, positions[:done]))
            if samples != _hash(seen):
                raise MismatchError(f"{path}: the samples summed there are not those at hand. {_ANEW}")
        batch = objective.source.batch_size
        step = batch * -(-self.every // batch)
        while done < len(positions):
            at = slice(done, done + step)
            part = objective.part(at)
            sums, delta = part.sums(theta, response=response, curvature=curvature, settle=settle)
            _add(total, sums)
            deltas.append(delta)
            done = min(done + step, len(positions))
            if done < len(positions):
                seen.append(sample_digests(key, objective.source, positions[at]))
                _write(path, identity, done, _hash(seen), total, torch.cat(deltas))
        path.unlink(missing_ok=True)
        return objective.joined(total), torch.cat(deltas)


def _add(total: Sums, part: Sums) -> None:
    assert total.hessian is not None
    assert part.hessian is not None
    total.value += part.value
    total.gradient += part.gradient
    total.gradient_scale += part.gradient_scale
    total.hessian.blocks += part.hessian.blocks
    total.count += part.count
    total.counts.update(part.counts)


def _identity(
    objective: ShardedObjective, theta: Tensor, response: Response, curvature: Curvature, positions: list[int]
) -> str:
    """Hash of everything the sums depend on but the samples."""
    optional = {
        "delta": objective.delta,
        "rivals": objective.rivals,
        "prior": objective.prior,
        "weight": objective.source.weight,
    }
    tensors: dict[str, Tensor] = {name: t for name, t in optional.items() if t is not None}
    settings = {
        "threat": objective.threat,
        "response": response,
        "inner": objective.inner,
        "smoothing": objective.smoothing,
    }
    settings = encode(settings, "settings", tensors)
    parts: dict[str, Any] = {
        "weights": weight_fingerprint(objective.problem.module.state_dict()),
        "settings": settings,
        "tensors": weight_fingerprint({"theta": theta, "positions": torch.tensor(positions), **tensors}),
        "curvature": curvature,
        "loss": loss_identity(objective.problem.loss),
        "batch": objective.source.batch_size,
        "process": [objective.shards.rank, objective.shards.world],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hash(digests: list[Tensor]) -> str:
    """One hash of all samples so far, keyed by the computation: single samples cannot be read off it."""
    return hashlib.sha256(torch.cat(digests).numpy().tobytes()).hexdigest()


def _write(path: Path, identity: str, done: int, samples: str, sums: Sums, delta: Tensor) -> None:
    assert sums.hessian is not None
    tensors = {
        "value": sums.value,
        "gradient": sums.gradient,
        "gradient_scale": sums.gradient_scale,
        "hessian": sums.hessian.blocks,
        "delta": delta,
    }
    meta = {"identity": identity, "samples": samples, "done": done, "counts": dict(sums.counts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_container(path, _KIND, meta, tensors)


def _read(path: Path, identity: str, objective: ShardedObjective, count: int) -> tuple[Sums, Tensor, int, str]:
    """Sums, maximisers, how many samples are done, and the hash of those."""
    meta, tensors = read_container(path, _KIND)
    problem = objective.problem
    zeros = Sums.zeros(problem.shape, problem.dtype, problem.device, hessian=True)
    assert zeros.hessian is not None
    if meta.get("identity") != identity:
        raise MismatchError(
            f"{path}: these partial sums are of another computation (weights, data order, batch size, threat model, response "
            f"or processes differ). {_ANEW}"
        )
    try:
        done = int(meta["done"])
        whole = (
            0 < done < count
            and tuple(tensors["gradient"].shape) == problem.shape
            and tensors["hessian"].shape == zeros.hessian.blocks.shape
            and len(tensors["delta"]) == done
        )
        counts = Counter({str(k): int(v) for k, v in meta["counts"].items()})
        found = {name: tensors[name].to(problem.device) for name in ("value", "gradient", "gradient_scale", "hessian")}
        delta = tensors["delta"].to(problem.device)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{path}: not partial sums ({error}). {_ANEW}") from error
    if not whole:
        raise CorruptFileError(f"{path}: its sums do not fit the model. {_ANEW}")
    blocks = BlockSymmetric(problem.shape[0], problem.shape[1], found["hessian"])
    sums = Sums(found["value"], found["gradient"], found["gradient_scale"], blocks, done, counts)
    return sums, delta, done, str(meta.get("samples"))
