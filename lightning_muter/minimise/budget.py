"""How much the end of a fit may cost, counted in gradients per sample, so that a seed still determines the result.

A gradient is one pass forward and back through the backbone; an epoch of PGD-k costs k + 1 of them per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_muter.errors import ArgumentError

#: Of a forward pass alone, in gradients.
FORWARD = 0.5
#: Of a pass back from several directions at once, each; of a forward-mode product. Measured on small convolutional networks.
PULL, PUSH = 0.75, 1.25
#: Gradients per sample and epoch where nothing is known of the attack: PGD-10.
USUAL = 11
#: "auto": this share of the fit, or this many of its epochs, whichever is more.
SHARE, EPOCHS = 0.1, 3
#: What of an allowance is left to work without gradients: the algebra, reading the step, the files.
ALGEBRA = 0.05


@dataclass(frozen=True)
class Fit:
    """What a fit cost: epochs, and gradients per sample in each."""

    epochs: float = 0.0
    gradients: float = USUAL

    def allowance(self, budget: float | str | None) -> float | None:
        """Gradients per sample that ``budget`` allows after this fit, a twentieth of it being left to the algebra; None: no limit.

        Args:
            budget: "auto": the larger of a tenth of the fit and three of its epochs; a number: the share of the fit (of those
                three epochs where the fit is not known); None: no limit.

        Raises:
            ArgumentError: something else.

        >>> round(Fit(10).allowance("auto"), 2), Fit(100).allowance("auto"), Fit(10).allowance(0.5), Fit(10).allowance(None)
        (31.35, 104.5, 52.25, None)
        """
        if budget is None:
            return None
        known = self.epochs * self.gradients
        if budget == "auto":
            return float(max(SHARE * known, EPOCHS * self.gradients)) * (1 - ALGEBRA)
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
            raise ArgumentError("budget", budget, "'auto', a share of the fit above 0, or None", "Use 'auto'.")
        return float(budget * (known or EPOCHS * self.gradients)) * (1 - ALGEBRA)


@dataclass
class Budget:
    """An allowance of gradients per sample, and what of it is spent."""

    limit: float | None = None
    spent: float = 0.0

    def spend(self, gradients: float) -> None:
        self.spent += gradients

    def affords(self, gradients: float) -> bool:
        """Whether this much more stays within the limit."""
        return self.limit is None or self.spent + gradients <= self.limit

    def to_dict(self) -> dict[str, Any]:
        return {"limit": self.limit, "spent": round(self.spent, 2)}
