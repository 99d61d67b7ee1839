"""What every stored state of a trained model shares, whatever it holds: whose it is, of which data, and what was forgotten.

`Snapshot`      the head: dense sums, requests need the forgotten samples alone
`WideSnapshot`  any subset of the parameters: no sums, requests read the retained samples
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.response.choose import L2Response, LinfResponse, NoResponse, Response, Unconstrained
from lightning_muter.errors import ArgumentError, CorruptFileError, MismatchError
from lightning_muter.storage.atomic import Writer, atomic_write
from lightning_muter.storage.container import container_writer, read_container
from lightning_muter.storage.fingerprint import DigestKey, weight_fingerprint

KIND = "snapshot"
VERSION = 1
_RESPONSES = (NoResponse, Unconstrained, L2Response, LinfResponse)


class Stored(ABC):
    """Bookkeeping of a dataclass with these fields; :meth:`save` and :meth:`load` are its files."""

    scope: Any  # text; a field or a property
    n_total: int
    forgotten: list[int]
    threat_model: ThreatModel
    response: Response
    loss_name: str
    digests: Tensor
    key_id: str
    fingerprint: str
    stationarity: float
    sample_weight: Tensor | None
    warnings: list[str]
    figures: dict[str, Any]
    versions: dict[str, str]
    key: DigestKey | None

    @property
    def n_retained(self) -> int:
        return self.n_total - len(self.forgotten)

    @property
    def retained_positions(self) -> list[int]:
        gone = set(self.forgotten)
        return [i for i in range(self.n_total) if i not in gone]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def retained(self, dataset: Dataset[Any]) -> Subset[Any]:
        """The part of the training dataset that may still be trained on.

        Raises:
            MismatchError: the dataset has another length than the one that was trained on.
        """
        self.check_length(dataset, "dataset")
        return Subset(dataset, self.retained_positions)

    def check_length(self, dataset: Dataset[Any], argument: str) -> None:
        length = len(dataset)  # type: ignore[arg-type]
        if length != self.n_total:
            raise MismatchError(
                f"{argument}: it has {length} samples, the snapshot was taken of {self.n_total}. Pass the full training "
                "dataset, forgotten rows included (positions are counted in it)."
            )

    def check_model(self, model: nn.Module) -> None:
        """Raise `MismatchError` unless the model's weights are the ones this snapshot belongs to."""
        found = weight_fingerprint(model.state_dict())
        if found != self.fingerprint:
            raise MismatchError(
                f"model: its weights have fingerprint {found[:16]}…, the snapshot belongs to {self.fingerprint[:16]}…. "
                "Load the weights that were saved with this snapshot (<name>.muter.ckpt), or take a new snapshot of these."
            )

    def adopt(self, other: Stored) -> None:
        """Become `other` (used to switch to the state after a request in one step)."""
        self.__dict__.update(other.__dict__)

    # -- files -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def _meta(self) -> dict[str, Any]: ...

    def writer(self) -> Writer:
        """Writes the container file (see :mod:`lightning_muter.storage.container`)."""
        return container_writer(KIND, {"version": VERSION, **self._meta()}, self._tensors())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the snapshot atomically, and the key of its digests beside it (`<path without suffix>.key`, mode 0600)."""
        writer = self.writer()
        key = key_path(path)
        first = self.key is not None and not key.exists()
        if self.key is not None:
            self.key.keep(key)
        try:
            atomic_write(path, writer)
        except BaseException:
            if first and not Path(path).exists():  # a key without a snapshot is of no use
                key.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], key: DigestKey | None = None) -> Any:
        """Read a snapshot, a `Snapshot` or (beyond the head) a `WideSnapshot`; its key is looked for beside it.

        Raises:
            CorruptFileError: damaged, altered or of an unknown version.
        """
        from lightning_muter.snapshot.old_snapshot import Snapshot
        from lightning_muter.snapshot.wide_snapshot import WideSnapshot

        meta, tensors = read_container(path, KIND)
        if meta.get("version") != VERSION:
            raise CorruptFileError(
                f"{path}: snapshot version {meta.get('version')!r}; this release reads version {VERSION}. Take a new one "
                "with `muter snapshot`, or use the release that wrote it."
            )
        kind: type[Stored] = Snapshot if meta.get("scope") == "head" else WideSnapshot
        try:
            snapshot = kind._restore(meta, tensors)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise CorruptFileError(
                f"{path}: its content does not describe a snapshot ({type(error).__name__}: {error}). Restore it from a "
                "backup, or take a new one with `muter snapshot`."
            ) from error
        if key is None and os.access(key_path(path), os.R_OK):  # an auditor may not read it
            key = DigestKey.load(key_path(path))
        if key is not None and key.key_id != snapshot.key_id:
            raise MismatchError(
                f"{path}: its digests were made with key {snapshot.key_id}, the key at hand is {key.key_id}. Restore "
                f"{key_path(path).name} from a backup."
            )
        snapshot.key = key
        return snapshot

    @classmethod
    @abstractmethod
    def _restore(cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stored: ...


def described(response: Response) -> dict[str, Any]:
    """A response as JSON values."""
    if type(response) not in _RESPONSES:
        raise ArgumentError(
            "response",
            type(response).__name__,
            "one of this package's responses for a snapshot that is saved",
            "A class of your own cannot be restored from a file that holds no code.",
        )
    return {"name": response.name, **vars(response)}


def response_from(description: Mapping[str, Any]) -> Response:
    options = dict(description)
    kind: Any = {r.name: r for r in _RESPONSES}[options.pop("name")]
    made: Response = kind(**options)
    return made


def restored_rows(n: int, tensors: Mapping[str, Tensor]) -> list[int]:
    """The forgotten positions of a file, checked against its ``n`` rows, its digests and its sample weights.

    Raises:
        ValueError: they do not fit together.
    """
    forgotten = [int(i) for i in tensors["forgotten"].tolist()]
    if len(set(forgotten)) != len(forgotten) or not all(0 <= i < n for i in forgotten):
        raise ValueError("forgotten rows are not rows of the dataset")
    if tuple(tensors["digests"].shape) != (n, 16):
        raise ValueError(f"digests has shape {tuple(tensors['digests'].shape)}, not {(n, 16)}")
    if tensors["digests"].dtype != torch.uint8:
        raise ValueError(f"digests have dtype {tensors['digests'].dtype}")
    if "sample_weight" in tensors and len(tensors["sample_weight"]) != n:
        raise ValueError(f"sample_weight has {len(tensors['sample_weight'])} rows, not {n}")
    return forgotten


def key_path(path: str | os.PathLike[str]) -> Path:
    """Where the key of a snapshot lies: `a.muter.snapshot` -> `a.muter.key`."""
    return Path(path).with_suffix(".key")
