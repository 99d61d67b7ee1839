"""How large the sums of a head are, and when nothing of that size is stored."""

from __future__ import annotations

from lightning_muter.model.head import Head

#: Bytes of a snapshot above which a head's sums are not stored.
DEFAULT_CAP = 2 * 2**30


def dense_bytes(head: Head) -> int:
    """Of the sums of a head's p parameters in float64: a matrix (p, p) and four vectors."""
    p = sum(t.numel() for t in head.linear.parameters())
    return 8 * p * p + 4 * 8 * p


def parameter_names(head: Head) -> list[str]:
    """Of the head's parameters in its model."""
    return [f"{head.name}.{name}".lstrip(".") for name, _ in head.linear.named_parameters()]


def without_matrix(head: Head, cap: int) -> str | None:
    """What a user should know where the sums of this head are not stored; None: they are.

    >>> from torch import nn
    >>> without_matrix(Head("fc", nn.Linear(2048, 10)), DEFAULT_CAP) is None
    False
    >>> without_matrix(Head("fc", nn.Linear(512, 10)), DEFAULT_CAP) is None
    True
    """
    size = dense_bytes(head)
    if size <= cap:
        return None
    p = sum(t.numel() for t in head.linear.parameters())
    return (
        f"The head has {p} parameters; a matrix of their sums would take {size / 2**30:.1f} GiB (cap {cap / 2**30:g} GiB). "
        "None is stored: a request takes Newton-CG steps by products with the Hessian, and reads the retained rows."
    )
