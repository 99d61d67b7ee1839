"""Exceptions of the package: a few types; a message names the argument, its value, what is allowed, the next step."""

from __future__ import annotations


class MuterError(Exception):
    """Base of every error that this package raises on purpose: one `except` for all of them.

    >>> all(issubclass(kind, MuterError) for kind in (ArgumentError, UnsuitableError, MismatchError, SolveError))
    True
    """


class ArgumentError(MuterError, ValueError):
    """An argument has a value that cannot be used.

    Args:
        argument: the argument's name as the caller wrote it.
        value: what came.
        allowed: what is allowed.
        advice: the next step.

    >>> raise ArgumentError("eps", -1.0, "a number above 0", "Pass e.g. eps=8/255.")
    Traceback (most recent call last):
        ...
    lightning_muter.errors.ArgumentError: eps: got -1.0; allowed: a number above 0. Pass e.g. eps=8/255.
    """

    def __init__(self, argument: str, value: object, allowed: str, advice: str = "") -> None:
        self.argument, self.value, self.allowed, self.advice = argument, value, allowed, advice
        super().__init__(argument, value, allowed, advice)

    def __str__(self) -> str:
        shown = repr(self.value)
        if len(shown) > 200:
            shown = shown[:197] + "..."
        return f"{self.argument}: got {shown}; allowed: {self.allowed}." + (f" {self.advice}" if self.advice else "")


class UnsuitableError(MuterError):
    """Model, loss, data or optimiser cannot be handled; the message lists every reason with its way out.

    >>> from torch import nn
    >>> import torch
    >>> from lightning_muter.model.head import find_head
    >>> find_head(nn.ReLU(), torch.zeros(1, 2))
    Traceback (most recent call last):
        ...
    lightning_muter.errors.UnsuitableError: ...
    """


class MismatchError(MuterError):
    """A snapshot, a model, a dataset or a file do not belong together; the message prints both sides.

    Example::

        try:
            unlearn(model, snapshot, [3], train_set)
        except MismatchError as error:  # weights of another fit, say: the message has both fingerprints
            print(error)
    """


class SolveError(MuterError):
    """A linear system was not solved well enough to touch a model; the message has status, residual and a way out.

    >>> import torch
    >>> from lightning_muter.solvers.base import Solution
    >>> Solution(torch.zeros(2), "capped", residual=0.1, iterations=5).require("cg")
    Traceback (most recent call last):
        ...
    lightning_muter.errors.SolveError: solver: 'cg' ended with status 'capped', relative residual 1.00e-01 after 5 ...
    """


class CorruptFileError(MuterError):
    """A file is truncated, altered or of an unknown format; nothing in it was used.

    >>> import pathlib, tempfile
    >>> from lightning_muter import Snapshot
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "a.muter.snapshot")
    ...     _ = path.write_bytes(b"something else")
    ...     Snapshot.load(path)
    Traceback (most recent call last):
        ...
    lightning_muter.errors.CorruptFileError: ...
    """


class RequestError(MuterError):
    """A deletion request cannot be carried out: already forgotten, nothing left, another one running, ...

    Example::

        muter.unlearn(model, forget=[3])
        muter.unlearn(model, forget=[3])  # RequestError: positions [3] were forgotten before
    """
