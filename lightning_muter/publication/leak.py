"""What a removal itself gives away: the rows that were removed, rebuilt from the published weights before and after.

Who knows both, and public data like the training data, multiplies the difference by the Hessian of the plain loss on the public data
(at the weights before, scaled to the training set): by first order this is the gradient of what was removed,

    (n H_public + n lambda) (W_before - W_after) ~ - sum_removed (p - e_y) (phi, 1)^T

For one row it has rank one: its right singular vector is the row's features, and the one class with p - e_y < 0 is its label.
The floor is what the same attack makes of two releases of one state.

Source: M. Bertran et al., "Reconstruction Attacks on Machine Unlearning: Simple Models are Vulnerable", NeurIPS 2024. Plain
torch, on the weights of a softmax head; usable without the rest of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muter.errors import ArgumentError


@dataclass(frozen=True)
class Rebuilt:
    """What a pair of releases says of one removed row: its features (f,), up to scale, and its label."""

    features: Tensor
    label: int


def rebuild(before: Tensor, after: Tensor, public: Tensor, count: int, decay: float) -> Rebuilt:
    """One removed row from two heads.

    Args:
        before, after: (K, f + 1) weights with the bias as the last column.
        public: (m, f) features of public samples.      count: samples trained on.      decay: lambda.

    >>> public = torch.eye(3, dtype=torch.float64)
    >>> pull = torch.tensor([[-2.0], [1.0], [1.0]]) @ torch.tensor([[0.6, 0.8, 0.0, 1.0]])  # (p - e_0) (x, 1)
    >>> found = rebuild(-pull / 100, torch.zeros(3, 4), public, count=1, decay=100.0)  # the penalty alone bends
    >>> found.label, [round(v, 1) for v in (found.features / found.features.norm()).tolist()]
    (0, [0.6, 0.8, 0.0])
    """
    width = before.shape[1]
    if after.shape != before.shape or public.ndim != 2 or public.shape[1] + 1 != width:
        raise ArgumentError(
            "public", tuple(public.shape), f"(samples, {width - 1}) features for heads of {tuple(before.shape)} alike"
        )
    w, step = before.double(), (before - after).double()
    x = torch.cat([public.double(), torch.ones(len(public), 1, dtype=torch.float64)], 1)
    p = torch.softmax(x @ w.T, 1)
    moved = x @ step.T  # (m, K), the step's effect on the logits
    curved = p * moved - p * (p * moved).sum(1, keepdim=True)
    gradient = count / len(x) * curved.T @ x + count * decay * step
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    u, v = left[:, 0], right[0]
    if float(v[-1]) < 0:  # the column of ones has a sign
        u, v = -u, -v
    # the weights lose the pull of e_y - p, whose one positive entry is the label's
    return Rebuilt(v[:-1], int(u.argmax()))


@dataclass(frozen=True)
class Leak:
    """Over many removals of one row each: the mean cosine between the rebuilt features and the row's own, the median rank of the row
    among all candidates (1: it is the nearest), and the share of labels read.
    """

    cosine: float
    median_rank: float
    label_rate: float
    trials: int


def leak(found: Sequence[Rebuilt], removed: Sequence[int], candidates: Tensor, labels: Tensor) -> Leak:
    """How well rows were rebuilt.

    Args:
        removed: position in ``candidates`` of the row behind each of ``found``.
        candidates: (n, f) features that an attacker would compare with, the removed rows among them; labels: (n,).

    >>> rows, labels = torch.eye(3), torch.tensor([0, 1, 2])
    >>> leak([Rebuilt(rows[1].double(), 1)], [1], rows, labels)
    Leak(cosine=1.0, median_rank=1.0, label_rate=1.0, trials=1)
    """
    if not found or len(found) != len(removed):
        raise ArgumentError("found", len(found), "one rebuilt row for each removed one, at least one")
    unit = torch.nn.functional.normalize(candidates.double(), dim=1)
    cosines, ranks, read = [], [], 0
    for one, at in zip(found, removed, strict=True):
        alike = unit @ torch.nn.functional.normalize(one.features, dim=0)
        cosines.append(float(alike[at]))
        ranks.append(int((alike > alike[at]).sum()) + 1)
        read += int(one.label == int(labels[at]))
    return Leak(
        sum(cosines) / len(cosines), float(torch.tensor(ranks).double().median()), read / len(found), len(found)
    )
