"""Removals that are hard to hide: wrong labels, confused classes, outliers. Random removals flatter every method.

A model hardly remembers one typical sample among many like it, so that doing nothing scores well there. What it must have learnt
from the sample alone shows whether it was forgotten. Wrong labels and confused classes are put into the data before training,
by :meth:`Setting.prepare`, and all of them are asked for; outliers are in the data already.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from lightning_muter.errors import ArgumentError
from lightning_muter.study.data.arrays import ArrayDataset
from lightning_muter.study.requests import Scenario, Setting, percent_label, share


def relabelled(data: ArrayDataset, positions: Sequence[int], labels: np.ndarray) -> ArrayDataset:
    """The dataset with other labels at some positions; inputs are shared, the given dataset stays as it is."""
    y = data.targets.clone()
    y[torch.as_tensor(np.asarray(positions), dtype=torch.int64)] = torch.as_tensor(labels, dtype=torch.int64)
    return ArrayDataset(data.x, y, num_classes=data.num_classes, box=data.box, ids=data.ids, every_class=False)


class Mislabelled(Setting):
    """A share of the private part is trained on with a wrong label, ``y + 1 .. K - 1 (mod K)`` at random, and asked for."""

    def __init__(self, fraction: float = 0.05) -> None:
        self.fraction = fraction

    def _positions(self, data: ArrayDataset, seed: int) -> list[int]:
        order = np.random.default_rng(seed).permutation(len(data)).tolist()
        return sorted(order[: share(self.fraction, len(data))])

    def prepare(self, data: ArrayDataset, seed: int) -> ArrayDataset:
        at = self._positions(data, seed)
        shift = np.random.default_rng([seed, 1]).integers(1, data.num_classes, len(at))
        return relabelled(data, at, (data.targets.numpy()[at] + shift) % data.num_classes)

    def scenarios(self, data: ArrayDataset, seed: int) -> list[Scenario]:
        return [Scenario((f"{percent_label(self.fraction)} mislabelled",), (tuple(self._positions(data, seed)),))]


class Interclass(Setting):
    """Labels of two classes are exchanged in a share of their samples, which are then asked for.

    A method that forgets them restores the border between the two classes, as retraining does.

    Source: the interclass confusion test of S. Goel et al., "Towards Adversarial Evaluations for Inexact Machine Unlearning", 2022.
    """

    def __init__(self, classes: Sequence[int] = (0, 1), fraction: float = 0.3) -> None:
        self.classes, self.fraction = tuple(int(c) for c in classes), fraction

    def _positions(self, data: ArrayDataset, seed: int) -> list[int]:
        # drawn from both classes together, so that the same positions come out before and after the exchange
        if len(set(self.classes)) != 2 or not all(0 <= c < data.num_classes for c in self.classes):
            raise ArgumentError("classes", self.classes, f"two different classes from 0 to {data.num_classes - 1}")
        members = np.flatnonzero(np.isin(data.targets.numpy(), self.classes))
        return sorted(np.random.default_rng(seed).permutation(members)[: share(self.fraction, len(members))].tolist())

    def prepare(self, data: ArrayDataset, seed: int) -> ArrayDataset:
        at = self._positions(data, seed)
        return relabelled(data, at, sum(self.classes) - data.targets.numpy()[at])

    def scenarios(self, data: ArrayDataset, seed: int) -> list[Scenario]:
        one, other = self.classes
        label = f"{percent_label(self.fraction)} of {one} and {other} confused"
        return [Scenario((label,), (tuple(self._positions(data, seed)),))]


class Outliers(Setting):
    """The samples that are furthest from their own class: mean distance to the nearest ``neighbours`` of the same label.

    Source: S. Ramaswamy et al., "Efficient Algorithms for Mining Outliers from Large Data Sets", SIGMOD 2000 (distance to
    nearest neighbours); here within the class.
    """

    def __init__(self, fraction: float = 0.05, neighbours: int = 5) -> None:
        if neighbours < 1:
            raise ArgumentError("neighbours", neighbours, "a whole number, 1 or more")
        self.fraction, self.neighbours = fraction, neighbours

    def scenarios(self, data: ArrayDataset, seed: int) -> list[Scenario]:
        x, y = data.x.flatten(1).double().numpy(), data.targets.numpy()
        distance = np.zeros(len(data))
        for label in np.unique(y):
            at = np.flatnonzero(y == label)
            if len(at) == 1:
                distance[at] = np.inf
                continue
            nearest = NearestNeighbors(n_neighbors=min(self.neighbours, len(at) - 1)).fit(x[at])
            distance[at] = nearest.kneighbors()[0].mean(1)  # without arguments a sample is not its own neighbour
        furthest = np.argsort(-distance, kind="stable")[: share(self.fraction, len(data))]
        return [Scenario((f"{percent_label(self.fraction)} outliers",), (tuple(sorted(furthest.tolist())),))]
