"""What every stored state of a trained model shares, and its file: one record, one format, one codec.

Everything a stored term depends on (threat model, smoothing, tolerances, starting points of the maximisers) is frozen here, so
that a sample is subtracted exactly as it was added. A field with a default may be added: files keep every field, and one that an
older file lacks takes its default. A kind of snapshot is a subclass: files name it, and reading looks it up.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.response.choose import Response
from lightning_muter.errors import CorruptFileError, MismatchError
from lightning_muter.forgotten.digests import check_digests
from lightning_muter.forgotten.rows import Barred
from lightning_muter.model.normalization import Normalization
from lightning_muter.pictures import descent_curve, stationarity_curve
from lightning_muter.snapshot import summary
from lightning_muter.snapshot.codec import decode, encode
from lightning_muter.snapshot.format_1 import from_format_1
from lightning_muter.storage.atomic import Writer, atomic_write
from lightning_muter.storage.container import container_writer, read_container
from lightning_muter.storage.fingerprint import DigestKey, versions, weight_fingerprint

if TYPE_CHECKING:
    from typing_extensions import Self

KIND = "snapshot"
VERSION = 2
#: Fields with one row per sample.
BY_ROW = ("digests", "starts", "base_starts", "sample_weight", "mass")


@dataclass(kw_only=True, repr=False)
class Stored(ABC):
    """What every stored state of a trained model shares, whatever it covers: whose it is, of which data, what was forgotten.

    Attributes:
        n_total: samples of the dataset that positions count in.
        forgotten: positions removed so far, in order.
        threat_model: norm, eps and box of the adversary.
        response: how its maximisers move with the weights.
        absent: positions that were never trained on (the part of a split, say): in no sum, nothing to forget.
        fingerprint: of the model's whole state dict as it should be now.
        digests: keyed digest of every sample (n, 16); rows of forgotten samples are zeroed.
        stationarity: |grad F| / sum |grad phi_i| for the samples at hand when it was measured.
        normalization: of inputs that the model takes normalised; the threat model is in the scale of the data.
        loss_name: identity of the loss of a row (function, arguments, content of tensors).
        input_shape: of one sample.
        smoothing: of L-infinity switches, with its anchor.
        inner: how inner maxima are climbed.
        key_id: which key the digests were made with.
        sample_weight: c_i (n,) of F = sum c_i phi_i + (sum d_i / 2) lambda |w|^2; None where all are 1; zeroed for forgotten samples.
        mass: d_i (n,), alike.
        warnings: what was said when it was taken.
        figures: what was measured then: seconds, passes, polish.
        versions: of the packages that it was taken with.
        key: of the digests, where it is at hand; a file of its own.
        barred: keyed digests of the content of forgotten rows, those of earlier training sets included.
    """

    n_total: int
    forgotten: list[int]
    threat_model: ThreatModel
    response: Response
    loss_name: str
    input_shape: tuple[int, ...]
    smoothing: Smoothing
    inner: InnerSolver
    digests: Tensor
    key_id: str
    fingerprint: str
    stationarity: float
    sample_weight: Tensor | None = None
    mass: Tensor | None = None
    normalization: Normalization | None = None
    absent: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    barred: Barred = field(default_factory=Barred)
    key: DigestKey | None = field(default=None, repr=False, metadata={"stored": False})

    #: Whether a request reads the rows that stay, and not those to forget alone.
    reads_retained: ClassVar[bool]
    beyond_head: ClassVar[bool] = False  # of a head its output alone is asked for: it need not be linear
    #: By name; a subclass enters itself.
    kinds: ClassVar[dict[str, type[Stored]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Stored.kinds[cls.__name__] = cls

    def __repr__(self) -> str:
        return summary.text(self)

    def summary(self) -> str:
        """What it is of, which objective, what polish changed, in words: as ``repr``."""
        return summary.text(self)

    def plot(self, axis: Any = None) -> Any:
        """The curve of polish: stationarity |grad F| / sum |grad phi_i| after each accepted step, or, where cutting sets polished,
        the relative gap to the least objective after each pass. Where nothing was polished, the stationarity as it is.

        Args:
            axis: matplotlib Axes to draw on; None makes a figure.

        Returns:
            the Axes.
        """
        polish = self.figures.get("polish", {})
        title = f"snapshot of {self.scope}, stationarity {self.stationarity:.1e}"
        if curve := polish.get("curve"):
            if polish["curve_of"] == "gap":
                return descent_curve(curve, "gap to the least objective", "pass of polish", title, axis)
            values = [polish["stationarity_before"], *curve]
            return descent_curve(values, "stationarity", "accepted step of polish", title, axis)
        values = [v for v in (polish.get("stationarity_before"), self.stationarity) if v is not None]
        names = ["before polish", "snapshot"][-len(values) :]
        return stationarity_curve(values, names, title, axis)

    @property
    @abstractmethod
    def scope(self) -> str:
        """What may change, as text."""

    @property
    def n_retained(self) -> int:
        """Samples that are left."""
        return self.n_total - len(self.forgotten) - len(self.absent)

    @property
    def total(self) -> float:
        """Sum of d_i over the samples that are left: what weight decay is multiplied by."""
        return float(self.n_retained) if self.mass is None else float(self.mass[self.retained_positions].sum())

    @property
    def retained_positions(self) -> list[int]:
        """Of the samples that are left, in order."""
        gone = {*self.forgotten, *self.absent}
        return [i for i in range(self.n_total) if i not in gone]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.encoded()[1].values())

    def retained(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any] | None = None) -> Subset[Any]:
        """The part of the training dataset that may still be trained on.

        Args:
            dataset: the full training dataset, forgotten rows included (they may hold anything).
            collate: the training loader's ``collate_fn``, where it had one of its own.

        Raises:
            MismatchError: the dataset is not the one that was trained on, in its order (forgotten rows may hold anything).
        """
        self.check_length(dataset, "dataset")
        if self.forgotten:
            check_digests(self, dataset, self.retained_positions, "dataset", collate)
        return Subset(dataset, self.retained_positions)

    def check_length(self, dataset: Dataset[Any], argument: str) -> None:
        """Raise `MismatchError` unless the dataset, given as ``argument``, has as many rows as the one that was trained on."""
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
                "Load the weights that were saved with this snapshot (<name>.muter.ckpt), or take a new snapshot of these. (Buffers "
                "count: one that changes outside training, a counter say, is registered with persistent=False.)"
            )

    def counted_in(self, positions: Sequence[int], n: int) -> None:
        """Let rows count in a dataset of ``n``, where those at hand are at these positions; of the others nothing is known."""
        for name in BY_ROW:
            rows = getattr(self, name, None)
            if rows is not None:
                full = rows.new_zeros(n, *rows.shape[1:])
                full[torch.tensor(list(positions), dtype=torch.int64)] = rows
                setattr(self, name, full)
        self.n_total = n

    def without(self, positions: Sequence[int], **changes: Any) -> Self:
        """After a request: these positions are forgotten, and nothing of theirs is left; shares nothing that changes."""
        gone, left = torch.tensor(list(positions), dtype=torch.int64), {}
        for name in BY_ROW:
            rows = getattr(self, name, None)
            if rows is not None:
                left[name] = rows.clone()
                left[name][gone] = 0
        return replace(self, forgotten=[*self.forgotten, *positions], **left, **changes)

    def adopt(self, other: Stored) -> None:
        """Become `other` (used to switch to the state after a request in one step)."""
        self.__dict__.update(other.__dict__)

    # -- files -------------------------------------------------------------------------------------------------------

    def encoded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Every stored field, as JSON values and tensors."""
        tensors: dict[str, Tensor] = {}
        return encode(self, "", tensors), tensors

    def writer(self) -> Writer:
        """Writes the container file (see :mod:`lightning_muter.storage.container`)."""
        fields, tensors = self.encoded()
        meta = {"version": VERSION, "record": type(self).__name__, "fields": fields}
        return container_writer(KIND, meta, tensors, self.key)

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
    def load(cls, path: str | os.PathLike[str], key: DigestKey | None = None, *, unsealed: bool = False) -> Any:
        """Read a snapshot, a `Snapshot` or (beyond the head) a `WideSnapshot`; its key is looked for beside it.

        Args:
            path: of the file, `<name>.muter.snapshot`.
            key: of its digests; None looks for `<name>.muter.key` beside it.
            unsealed: take a file without a seal, as releases before seals wrote them: whoever could write to its folder may
                have made it.

        Raises:
            CorruptFileError: damaged, altered, without seal or of an unknown version.
            MismatchError: another key, or a class (of a response, say) that was not imported.
        """
        if key is None and os.access(key_path(path), os.R_OK):  # an auditor may not read it
            key = DigestKey.load(key_path(path))
        snapshot = cls.read(path, key, unsealed=unsealed)
        if key is not None and key.key_id != snapshot.key_id:
            raise MismatchError(
                f"{path}: its digests were made with key {snapshot.key_id}, the key at hand is {key.key_id}. Restore "
                f"{key_path(path).name} from a backup."
            )
        snapshot.key = key
        return snapshot

    @classmethod
    def read(cls, path: str | os.PathLike[str], key: DigestKey | None = None, *, unsealed: bool = False) -> Any:
        """As :meth:`load`, with no other key than this one.

        Args:
            path: of the file.
            key: None: neither seal nor samples can be checked.
            unsealed: take a file without a seal.
        """
        meta, tensors = read_container(path, KIND, key, unsealed=unsealed)
        if meta.get("version") not in (1, VERSION):
            raise CorruptFileError(
                f"{path}: snapshot version {meta.get('version')!r}; this release reads versions 1 to {VERSION}. Take a new "
                "one with `muter snapshot`, or use the release that wrote it."
            )
        try:
            if meta["version"] == 1:
                meta, tensors = from_format_1(meta, tensors)
            snapshot: Stored = decode(cls.kinds[meta["record"]], meta["fields"], tensors)
            if tensors:
                raise ValueError(f"tensors that no field names: {sorted(tensors)[:3]}")
            snapshot.check()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise CorruptFileError(
                f"{path}: its content does not describe a snapshot ({type(error).__name__}: {error}). Restore it from a "
                "backup, or take a new one with `muter snapshot`."
            ) from error
        return snapshot

    def check(self) -> None:
        """Raise `ValueError` unless the fields, right in themselves, fit together."""
        n, gone = self.n_total, [*self.forgotten, *self.absent]
        if len(set(gone)) != len(gone) or not all(0 <= i < n for i in gone):
            raise ValueError("forgotten or absent rows are not rows of the dataset")
        if tuple(self.digests.shape) != (n, 16) or self.digests.dtype != torch.uint8:
            raise ValueError(f"digests are {tuple(self.digests.shape)} {self.digests.dtype}, not {(n, 16)} bytes")
        for name in ("sample_weight", "mass"):
            rows = getattr(self, name)
            if rows is not None:
                check_numbers(name, rows, (n,))
        if self.smoothing.anchor is not None:
            check_numbers("anchor", self.smoothing.anchor)


def check_numbers(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
) -> None:
    """Raise `ValueError` unless these are finite numbers of this shape and one of these types."""
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} is not finite")


def key_path(path: str | os.PathLike[str]) -> Path:
    """Where the key of a snapshot lies: `a.muter.snapshot` -> `a.muter.key`."""
    return Path(path).with_suffix(".key")
