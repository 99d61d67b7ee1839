"""The seam: what may change in a request, and all that depends on it. A further kind is one subclass, named in `scope.choose`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import nn
from torch.utils.data import Dataset

from lightning_muter.errors import ArgumentError
from lightning_muter.model.head import Head
from lightning_muter.model.reading import Reading
from lightning_muter.scope.asked import Take
from lightning_muter.snapshot.reread import Access
from lightning_muter.snapshot.stored import Stored
from lightning_muter.unlearning.result import UnlearnResult

if TYPE_CHECKING:
    from lightning_muter.unlearning.unlearn import Unlearn

#: What a scope stores.
S = TypeVar("S", bound=Stored)


@dataclass(frozen=True)
class Extent:
    """What a scope covers of a module: names of parameters; whether solves are damped; the head that is stored of, if one is."""

    names: list[str]
    damped: bool
    head: Head | None = None


@dataclass(frozen=True, eq=False)
class Retained(Generic[S]):
    """A model, its snapshot, and the rows that are left, which ``data`` holds and ``reading`` says the loss of."""

    model: nn.Module
    snapshot: S
    data: Dataset[Any]
    kept: list[int]
    reading: Reading
    access: Access


@dataclass(frozen=True, eq=False)
class Removal(Retained[S]):
    """One request, checked: ``positions`` go, ``kept`` ones stay and may be read from ``access.retain``, where it is given."""

    access: Unlearn
    positions: list[int]


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a request comes to; nothing is changed yet.

    Attributes:
        result: what will have been done.
        after: the snapshot as it will be.
        parameters: those that ``write`` writes.
        said: notes that are warned of before.
    """

    result: UnlearnResult
    after: Stored
    parameters: Iterable[nn.Parameter]
    write: Callable[[], None]
    said: list[str]


class Scope(ABC, Generic[S]):
    """What may change in a request.

    Attributes:
        record: the kind of snapshot that is stored of it.
        useless: options of :func:`lightning_muter.take_snapshot` that say nothing to it.
        refusal: what is allowed of these, and an advice.
        polishing: passes over the data that a polish usually takes, and what they are called.
    """

    record: ClassVar[type[Any]]
    useless: ClassVar[tuple[str, ...]]
    refusal: ClassVar[tuple[str, str]]
    polishing: ClassVar[tuple[int, str]]

    @classmethod
    @abstractmethod
    def of(cls, snapshot: S) -> Scope[S]:
        """The one that a snapshot was taken of."""

    @abstractmethod
    def extent(self, module: nn.Module, reading: Reading | None, cap: int) -> Extent | None:
        """What it covers of a module, of which no more than ``cap`` bytes may be stored; None: only a reading would tell.

        Raises:
            ArgumentError: it covers nothing.
        """

    @abstractmethod
    def take(self, asked: Take) -> Stored:
        """A snapshot of the model as it is asked for, polished, which is written to the model."""

    @abstractmethod
    def refresh(self, left: Retained[S], polish: str | int, progress: bool) -> S:
        """A new snapshot of the rows that are left at the current weights; the old one stays as it is."""

    @abstractmethod
    def check(self, asked: Unlearn) -> None:
        """Look at the options of a request before anything is read.

        Raises:
            ArgumentError: one is out of range, or means nothing to this scope.
        """

    @abstractmethod
    def propose(self, removal: Removal[S]) -> Proposal:
        """What one request comes to; model and snapshot stay as they are.

        Raises:
            SolveError: no step was found, or it makes the model worse.
        """

    @abstractmethod
    def difference(self, left: Retained[S]) -> tuple[float, float]:
        """How far the rows at hand are from those that were trained on, by what was stored; and how far is rounding."""

    def passes(self, polish: str | int) -> int:
        """Passes over the data that a polish takes, "auto" about.

        Raises:
            ArgumentError: neither "auto" nor a number.
        """
        usual, what = self.polishing
        if polish == "auto":
            return usual
        if not (isinstance(polish, int) and polish >= 0):
            raise ArgumentError("polish", polish, f"'auto', 0 or a number of {what}")
        return polish

    def check_useful(self, asked: Take) -> None:
        """Raise `ArgumentError` where an option is given that says nothing to this scope."""
        for name in self.useless:
            if (value := getattr(asked, name)) is not None:
                raise ArgumentError(name, value, *self.refusal)
