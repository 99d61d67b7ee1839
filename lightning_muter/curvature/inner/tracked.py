"""The local maxima that go along from point to point, and how a file keeps them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tracked:
    """Where the local maxima of n samples are, and what they weigh.

    Attributes:
        delta: the largest, (n, D).
        rivals: m others, (m, n, D).
        prior: weights of all, (1 + m, n).
    """

    delta: Tensor
    rivals: Tensor | None = None
    prior: Tensor | None = None

    def at(self, rows: slice) -> Tracked:
        """Those of some samples."""
        return Tracked(
            self.delta[rows],
            None if self.rivals is None else self.rivals[:, rows],
            None if self.prior is None else self.prior[:, rows],
        )

    def _all(self) -> tuple[Tensor, Tensor]:
        if self.rivals is None or self.prior is None:
            return self.delta[None], torch.ones_like(self.delta[:, 0])[None]
        return torch.cat([self.delta[None], self.rivals]), self.prior

    def heaviest(self, most: int) -> Tensor:
        """The largest weight of each of the ``most`` local maxima, (most,), 0 where there are not so many."""
        prior = self._all()[1]
        top = prior.new_zeros(most)
        if prior.shape[1]:
            top[: len(prior)] = prior.amax(1)
        return top

    def rows(self, eps: float, keep: Tensor) -> Tensor:
        """For a file: (n, kept, D + 1) in half precision, which keeps three digits of positions in units of eps, and weights."""
        places, prior = self._all()
        missing = len(keep) - len(places)
        places = torch.cat([places, self.delta.expand(missing, *self.delta.shape)])[keep]
        prior = torch.cat([prior, prior.new_zeros(missing, prior.shape[1])])[keep]
        return torch.cat([places / eps, prior[:, :, None].to(places)], 2).movedim(0, 1).to(torch.float16).cpu()

    @classmethod
    def of_rows(cls, stored: Tensor, eps: float, device: torch.device, dtype: torch.dtype) -> Tracked:
        """What :meth:`rows` gave."""
        rows = stored.to(device, dtype).movedim(1, 0)
        places, prior = rows[:, :, :-1] * eps, rows[:, :, -1]
        if len(places) == 1:
            return cls(places[0])
        return cls(places[0], places[1:], prior / prior.sum(0).clamp(min=1e-12))
