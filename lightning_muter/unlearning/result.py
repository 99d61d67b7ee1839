"""What a request did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_muter.errors import ArgumentError
from lightning_muter.pictures import stationarity_curve
from lightning_muter.snapshot.summary import shown


def _last(values: list[float], few: int) -> str | None:
    """The last of these, and how many came before."""
    before = [f"({len(values) - few} more)"] if len(values) > few else []
    return " -> ".join([*before, *(f"{v:.1e}" for v in values[-few:])]) or None


@dataclass(repr=False)
class UnlearnResult:
    """What a request did.

    Attributes:
        method: name of the :class:`lightning_muter.Method`.
        response: name of the :class:`lightning_muter.Response`.
        scope: what could change.
        forgotten: positions removed by this request.
        n_retained: samples left.
        step_norm: |w_u - w|, Euclidean.
        solver: status, residual |H delta - g| / |g| and iterations.
        stationarity_before: |grad F_R| / sum |grad phi_i| of the retained objective at w (with ``retain``).
        stationarity_after: the same at w_u.
        bound: certified distance of w_u to the retrained optimum, or None (``warnings`` says why).
        seconds: that the request took.
        fingerprint_before: of the weights.
        fingerprint_after: of the weights.
        dry_run: nothing was changed.
        within: the distance that was asked for, or None.
        parameters: names of those that were changed.
        gate: what :class:`lightning_muter.deletion.gate.Gate` measured, or None.
        refine: stationarity after each refine step.
        quality: what the step is worth: the retained objective before and after (with ``retain``), the fall that its model predicts,
            what of the step is owed to weights that were not stationary (``owed_share``), the share of inner maxima that converged.
        warnings: what is left to know.

    >>> result = UnlearnResult("muter", "l2", "head", [3, 17], 28, step_norm=0.12, solver={"status": "converged"}, bound=1e-4)
    >>> print(result)
    UnlearnResult of head
      forgotten     2 (3, 17); 28 are retained
      step          0.12 (muter, l2, solver converged)
      bound         at most 0.0001 from the retrained optimum
      seconds       0.00
    """

    method: str
    response: str
    scope: str
    forgotten: list[int]
    n_retained: int
    step_norm: float
    solver: dict[str, Any]
    stationarity_before: float | None = None
    stationarity_after: float | None = None
    bound: float | None = None
    seconds: float = 0.0
    fingerprint_before: str = ""
    fingerprint_after: str = ""
    dry_run: bool = False
    refine: list[float] = field(default_factory=list)
    within: float | None = None
    parameters: list[str] = field(default_factory=list)
    gate: dict[str, Any] | None = None
    quality: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        rows = ", ".join(map(str, self.forgotten[:8]))
        rows += f" and {len(self.forgotten) - 8} more" if len(self.forgotten) > 8 else ""
        moved = [f"{v:.1e}" for v in (self.stationarity_before, self.stationarity_after) if v is not None]
        lines = {
            "forgotten": f"{len(self.forgotten)} ({rows}); {self.n_retained} are retained",
            "step": f"{self.step_norm:.3g} ({self.method}, {self.response}, solver {self.solver.get('status')})",
            "stationarity": " -> ".join(moved) or None,
            "bound": None if self.bound is None else f"at most {self.bound:.3g} from the retrained optimum",
            "refined": _last(self.refine, 6),
            "seconds": f"{self.seconds:.2f}",
        }
        title = f"UnlearnResult of {self.scope}" + (" (dry run: nothing was changed)" if self.dry_run else "")
        return shown(title, lines, self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Every field, in JSON values only: for a log or a file of one's own."""
        return asdict(self)

    def plot(self, axis: Any = None) -> Any:
        """Stationarity of the retained objective before the request, after each refine step, and at the end; the bound, if any.

        Args:
            axis: matplotlib Axes to draw on; None makes a figure.

        Returns:
            the Axes.

        Raises:
            ArgumentError: it was not measured, for there was no ``retain``.
        """
        if self.stationarity_before is None or self.stationarity_after is None:
            raise ArgumentError(
                "retain", None, "the training dataset, for a picture", "Ask with unlearn(..., retain=train_dataset)."
            )
        values = [self.stationarity_before, *self.refine, self.stationarity_after]
        names = ["before", *(f"refine {i}" for i in range(1, len(self.refine) + 1)), "after"]
        bound = "" if self.bound is None else f"; at most {self.bound:.2g} from retraining"
        return stationarity_curve(values, names, f"{len(self.forgotten)} forgotten{bound}", axis)
