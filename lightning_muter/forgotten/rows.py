"""Rows once forgotten, as every door knows them again: by position, and by content in whatever dataset they come back.

Positions count in the training set that they were forgotten from. Content is known by keyed digests (HMAC): who holds the key
and a row can tell that the row was forgotten, nobody else learns anything from them. So the key is never written beside them,
but for its own file (mode 0600); keys that this process has used are remembered here.

Another row of the very same content may have stayed: a digest goes with the number of rows that may still have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_muter.errors import MismatchError, RequestError
from lightning_muter.forgotten.digests import content_digests
from lightning_muter.storage.fingerprint import DIGEST_BYTES, DigestKey

if TYPE_CHECKING:
    from lightning_muter.snapshot.stored import Stored

Collate = Callable[[list[Any]], Any] | None
_KEYS: dict[str, DigestKey] = {}


def known_keys() -> Mapping[str, DigestKey]:
    """The keys that this process has used, by their id."""
    return _KEYS


def remember_key(key: DigestKey | None) -> None:
    """Keep a key at hand for this process."""
    if key is not None:
        _KEYS[key.key_id] = key


def _no_digests() -> Tensor:
    return torch.zeros(0, DIGEST_BYTES, dtype=torch.uint8)


def _no_copies() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Barred:
    """Content that may not be trained on again.

    Attributes:
        digests: keyed, (m, 16) uint8, each once.      copies: rows that may still have it, (m,) int64: those retained.
    """

    digests: Tensor = field(default_factory=_no_digests)
    copies: Tensor = field(default_factory=_no_copies)

    def __post_init__(self) -> None:
        if tuple(self.digests.shape) != (len(self.copies), DIGEST_BYTES) or self.digests.dtype != torch.uint8:
            raise ValueError(
                f"barred digests of shape {tuple(self.digests.shape)}, {len(self.copies)} numbers of copies"
            )

    def __len__(self) -> int:
        return len(self.copies)

    def __repr__(self) -> str:
        return f"Barred({len(self)})"

    @classmethod
    def of(cls, counts: Mapping[bytes, int]) -> Barred:
        if not counts:
            return cls()
        digests = torch.frombuffer(bytearray(b"".join(counts)), dtype=torch.uint8).reshape(-1, DIGEST_BYTES)
        return cls(digests, torch.tensor(list(counts.values()), dtype=torch.int64))

    def counts(self) -> dict[bytes, int]:
        """How many rows may still have each content."""
        raw, n = self.digests.numpy().tobytes(), DIGEST_BYTES
        return {raw[n * i : n * (i + 1)]: int(c) for i, c in enumerate(self.copies.tolist())}

    def __or__(self, other: Barred) -> Barred:
        """Both; of a content in both the smaller number of rows may stay."""
        if not len(other) or not len(self):
            return self if len(self) else other
        found = self.counts()
        for digest, copies in other.counts().items():
            found[digest] = min(copies, found.get(digest, copies))
        return Barred.of(found)


def barred_after(
    snapshot: Stored,
    data: Dataset[Any],
    positions: Sequence[int],
    collate: Collate = None,
    *,
    key: DigestKey | None = None,
) -> Barred:
    """What is barred once these rows are forgotten too; ``snapshot`` still lists them as retained."""
    key = key or snapshot.key
    assert key is not None  # the rows were compared by it
    gone = set(positions)
    stay = [i for i in snapshot.retained_positions if i not in gone]
    exact = [bytes(row) for row in snapshot.digests[list(positions)].numpy()]
    same = _occurrences(snapshot.digests[stay], set(exact))
    before = snapshot.barred.counts()
    for content, of in zip(content_digests(key, data, positions, collate), exact, strict=True):
        before[content] = same[of]
    return Barred.of(before)


def barred_of(
    key: DigestKey, data: Dataset[Any], positions: Sequence[int], retained: Sequence[int], collate: Collate = None
) -> Barred:
    """The content of these rows, compared with that of the retained ones (which are read)."""
    gone = set(content_digests(key, data, positions, collate))
    stay = Counter(digest for digest in content_digests(key, data, retained, collate) if digest in gone)
    return Barred.of({digest: stay[digest] for digest in sorted(gone)})


def _occurrences(digests: Tensor, wanted: set[bytes]) -> Counter[bytes]:
    """How often each of the wanted digests is among these."""
    raw, n = digests.numpy().tobytes(), DIGEST_BYTES
    return Counter(digest for i in range(len(digests)) if (digest := raw[n * i : n * (i + 1)]) in wanted)


@dataclass(frozen=True)
class Forgotten:
    """What is known of forgotten rows, wherever it was kept.

    Attributes:
        n_total: rows of the training set in which ``positions`` count; 0 where none is known.
        key_id: of the key of the digests.
    """

    n_total: int = 0
    positions: tuple[int, ...] = ()
    key_id: str = ""
    barred: Barred = field(default_factory=Barred)

    @classmethod
    def of(cls, snapshot: Stored) -> Forgotten:
        """As a snapshot knows it."""
        remember_key(snapshot.key)
        if not snapshot.forgotten and not len(snapshot.barred):
            return cls()
        return cls(snapshot.n_total, tuple(sorted(map(int, snapshot.forgotten))), snapshot.key_id, snapshot.barred)

    def __bool__(self) -> bool:
        return bool(self.positions) or len(self.barred) > 0

    @property
    def count(self) -> int:
        """How many rows, as far as is known."""
        return max(len(self.positions), len(self.barred))

    def covers(self, other: Forgotten) -> bool:
        """Whether all that ``other`` knows is known here."""
        if not other:
            return True
        if self.key_id != other.key_id:
            return False
        mine, theirs = self.barred.counts(), other.barred.counts()
        content = all(mine.get(digest, copies + 1) <= copies for digest, copies in theirs.items())
        return content and (self.n_total != other.n_total or set(other.positions) <= set(self.positions))

    def __or__(self, other: Forgotten) -> Forgotten:
        """Both; of two that know the same content but count in different training sets the positions of the second.

        Raises:
            MismatchError: they count in different training sets, neither of which came after the other, or have other keys.
        """
        if not self or not other:
            return self or other
        if self.key_id != other.key_id:
            raise MismatchError(
                f"forgotten rows: two lists under different keys ({self.key_id}, {other.key_id}) do not belong to one model. "
                "Restore checkpoint, snapshot, key and ledger from one backup."
            )
        if self.n_total == other.n_total:
            positions = tuple(sorted({*self.positions, *other.positions}))
            return Forgotten(self.n_total, positions, self.key_id, self.barred | other.barred)
        if not (self.covers(other) or other.covers(self)):
            raise MismatchError(
                f"forgotten rows: one list counts in {self.n_total} rows, another in {other.n_total}, and neither knows all "
                "of the other. Restore checkpoint, snapshot, key and ledger from one backup."
            )
        later, earlier = (other, self) if other.covers(self) else (self, other)
        return Forgotten(later.n_total, later.positions, later.key_id, later.barred | earlier.barred)

    # -- as plain values, for checkpoints ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Numbers and text only: it may lie in a checkpoint that is read without running code."""
        return {
            "n_total": self.n_total,
            "forgotten": list(self.positions),
            "key_id": self.key_id,
            "digests": self.barred.digests.numpy().tobytes().hex(),
            "copies": self.barred.copies.tolist(),
        }

    @classmethod
    def from_dict(cls, content: Any) -> Forgotten:
        """From a file that anybody may have written.

        Raises:
            ValueError: it is not such a list.
        """
        try:
            positions = tuple(sorted({int(i) for i in content["forgotten"]}))
            n_total = int(content["n_total"] or 0)
            raw = bytes.fromhex(content.get("digests", ""))
            copies = [int(c) for c in content.get("copies", [])]
            if len(raw) != DIGEST_BYTES * len(copies) or (
                positions and not 0 <= positions[0] <= positions[-1] < n_total
            ):
                raise ValueError("its parts do not fit together")
            digests = [raw[DIGEST_BYTES * i : DIGEST_BYTES * (i + 1)] for i in range(len(copies))]
            return cls(
                n_total, positions, str(content.get("key_id", "")), Barred.of(dict(zip(digests, copies, strict=True)))
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a list of forgotten rows ({error})") from error

    # -- in a dataset ------------------------------------------------------------------------------------------------------

    def located(self, dataset: Dataset[Any], collate: Collate = None, argument: str = "dataset") -> list[int]:
        """The positions of ``dataset`` that may not be trained on: by position where it has the length of the training set
        (or is a part of one that has), by content everywhere.

        Raises:
            RequestError: it cannot be told, for the key of the digests is not at hand.
        """
        if not self:
            return []
        length: int = len(dataset)  # type: ignore[arg-type]
        placed = set(self.placed(dataset))
        if self.positions and not len(self.barred):
            return sorted(self._without_digests(placed, dataset, argument))
        key = _KEYS.get(self.key_id)
        if key is None:
            raise RequestError(
                f"{argument}: {self.count} rows were forgotten, and it cannot be told whether they are among these: the key "
                f"{self.key_id} of their digests is not at hand. Put the key file beside the checkpoint again "
                "(<name>.muter.key), or load it: DigestKey.load(path). If it is lost for good: "
                "`muter refresh --recover_key true` where the snapshot is."
            )
        rest = [i for i in range(length) if i not in placed]
        where: dict[bytes, list[int]] = {}
        allowed = self.barred.counts()
        for position, digest in zip(rest, content_digests(key, dataset, rest, collate), strict=True):
            if digest in allowed:
                where.setdefault(digest, []).append(position)
        over = {i for digest, found in where.items() for i in found[allowed[digest] :]}
        return sorted(placed | over)

    def placed(self, dataset: Dataset[Any]) -> list[int]:
        """Where the forgotten positions lie in a dataset of the training set's length, or in a part (of a part) of one."""
        length: int = len(dataset)  # type: ignore[arg-type]
        at = list(range(length))  # where each row lies in the dataset looked at
        gone, found = set(self.positions), set()
        level: Any = dataset
        while gone:
            if len(level) == self.n_total:
                found |= {row for row, position in enumerate(at) if position in gone}
            if not isinstance(level, Subset):
                break
            at = [int(level.indices[position]) for position in at]
            level = level.dataset
        return sorted(found)

    def _without_digests(self, placed: set[int], dataset: Dataset[Any], argument: str) -> set[int]:
        """Files from before digests were kept know positions alone."""
        base: Any = dataset
        while isinstance(base, Subset):
            base = base.dataset
        if self.n_total not in (len(dataset), len(base)):  # type: ignore[arg-type]
            raise RequestError(
                f"{argument}: {self.count} rows of {self.n_total} were forgotten by an earlier release, which kept positions "
                f"alone; these {len(dataset)} rows cannot be compared. Pass the training set itself "  # type: ignore[arg-type]
                "(forgotten rows are left out), or the part of it that retained() gives."
            )
        return placed
