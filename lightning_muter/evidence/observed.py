"""What an attack sees: the margins of some points in many worlds, and which point was removed and which never seen in each.

One *world* is one draw of the training data and everything made from it: a model trained on it, what a method made of that
model after the request, the model retrained without the removed points. In each world a third of the points is kept, a third
removed (trained on, then unlearned in one request) and a third out (never seen). A *margin* is

    m = log p_y - log sum_{k != y} p_k,      p_y = sigmoid(m)

of a point under a world's model, y the label it was (or would have been) trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_muter.errors import ArgumentError, MismatchError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

KEPT, REMOVED, OUT = 0, 1, 2


@dataclass(frozen=True)
class Observed:
    """Margins under one kind of model (after a method, or retrained, ...) in all worlds.

    Args:
        margins: (points, worlds).
        roles: (points, worlds) of ``KEPT``, ``REMOVED``, ``OUT``.
        population: (samples, worlds), margins of samples that no world was trained on, or None.
        trained: one description per world of how it was trained; all must be equal.

    Raises:
        ArgumentError: shapes that do not fit, values that are not finite, fewer than four worlds.
        MismatchError: a world was trained otherwise than the first one: it is no shadow of it.
    """

    margins: Floats
    roles: NDArray[np.int64]
    population: Floats | None = None
    trained: Sequence[str] | None = None

    def __post_init__(self) -> None:
        margins, roles = _array("margins", self.margins), np.asarray(self.roles, np.int64)
        if margins.ndim != 2 or margins.shape[1] < 4:
            raise ArgumentError("margins", margins.shape, "(points, worlds) with at least four worlds")
        if roles.shape != margins.shape:
            raise ArgumentError("roles", roles.shape, f"the shape of margins {margins.shape}")
        object.__setattr__(self, "margins", margins)
        object.__setattr__(self, "roles", roles)
        if self.population is not None:
            population = _array("population", self.population)
            if population.ndim != 2 or population.shape[1] != margins.shape[1]:
                raise ArgumentError("population", population.shape, f"(samples, {margins.shape[1]})")
            object.__setattr__(self, "population", population)
        refuse_other_training(self.trained or [])

    @property
    def removed(self) -> Flags:
        return self.roles == REMOVED

    @property
    def out(self) -> Flags:
        return self.roles == OUT


def refuse_other_training(trained: Sequence[str]) -> None:
    """Raise unless all worlds were trained alike: a shadow of other settings says nothing about the target."""
    for world, how in enumerate(trained):
        if how != trained[0]:
            raise MismatchError(
                f"worlds: world {world} was trained as {how}, world 0 as {trained[0]}. Shadows must be trained as the target: "
                "same data, model, attack, settings and end; make that world again or leave it out."
            )


def draw_roles(points: int, worlds: int, seed: int) -> NDArray[np.int64]:
    """Roles (points, worlds): a third each in every world, and each point once each in any three worlds in a row from 0 on.

    >>> np.bincount(draw_roles(30, 3, seed=0)[:, 1]).tolist()
    [10, 10, 10]
    """
    generator = np.random.default_rng(seed)
    roles = np.empty((points, worlds), np.int64)
    for first in range(0, worlds, 3):
        dealt = generator.permutation(np.arange(points) % 3)
        for world in range(first, min(first + 3, worlds)):
            roles[:, world] = (dealt + world - first) % 3
    return roles


def _array(name: str, values: ArrayLike) -> Floats:
    found = np.asarray(values, np.float64)
    if not np.isfinite(found).all():
        raise ArgumentError(
            name, f"{int((~np.isfinite(found)).sum())} values that are NaN or infinite", "finite numbers"
        )
    return found
