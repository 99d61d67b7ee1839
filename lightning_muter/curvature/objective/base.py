"""What one pass over the samples tells of the robust objective at a point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_muter.curvature.objective.soft_maximum import Kinks


@dataclass(frozen=True)
class Evaluation:
    """F, its gradient, sum |d phi_i|, the maximisers found (n, D) and the fraction that converged; for samples with several
    maxima also those (see `curvature.contest`), ``contested`` where there are such samples.
    """

    value: float
    gradient: Tensor
    scale: float
    delta: Tensor
    converged: float
    rivals: Tensor | None = None
    prior: Tensor | None = None
    share: Tensor | None = None
    kinks: Kinks | None = None
    contested: bool = False

    @property
    def stationarity(self) -> float:
        """|grad F| / sum_i |grad phi_i|."""
        return float(self.gradient.norm()) / max(self.scale, 1e-300)

    @property
    def gap(self) -> float:
        """How far the maxima of weight are from equal, over F (:meth:`Kinks.gap`)."""
        return 0.0 if self.kinks is None else self.kinks.gap() / max(abs(self.value), 1e-300)

    @property
    def unsettled(self) -> float:
        """The stationarity, or the gap where that is more."""
        return max(self.stationarity, self.gap)

    def reweighed(self, temperature: float, places_of: Callable[[Kinks], tuple[Tensor, Tensor]]) -> Evaluation:
        """The evaluation with every local maximum weighed by its share here, q <- p."""
        share, kinks = self.share, self.kinks
        if kinks is None:
            return self
        new = kinks.reweighed(temperature)
        shares = new.shares()
        moved = (new.gradient(shares) - kinks.gradient(kinks.shares())).reshape(self.gradient.shape)
        weights = share
        if share is not None:
            weights = share.clone()
            which, rows = places_of(new)
            weights[: shares.shape[1], rows] = shares[which, : len(weights)].T.to(weights)
        return replace(
            self,
            value=self.value + float(new.total() - kinks.total()),
            gradient=self.gradient + moved,
            prior=share if share is not None else self.prior,
            share=weights,
            kinks=new,
        )


@dataclass
class Met:
    """The rivals met in a pass, their weights q and shares p; and the kinks between them, by batches."""

    rivals: Tensor | None = None
    prior: Tensor | None = None
    share: Tensor | None = None
    kinks: list[tuple[int, Kinks]] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: list[Met]) -> Met:
        if not parts or any(part.rivals is None or part.prior is None for part in parts):
            return cls()
        shares = [part.prior if part.share is None else part.share for part in parts]
        alone = all(part.share is None for part in parts)
        return cls(
            torch.cat([part.rivals for part in parts if part.rivals is not None], 1),
            torch.cat([part.prior for part in parts if part.prior is not None], 1),
            None if alone else torch.cat([s for s in shares if s is not None], 1),
            [kink for part in parts for kink in part.kinks],
        )
