"""lightning_muter: machine unlearning for adversarially trained PyTorch Lightning models.

Public names, in the order of the flow. Each is imported when it is first used, so that `muter --help` and the like do
not wait for torch and Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_muter.adversarial.attacks import LossAttack
    from lightning_muter.callback import MUterCallback
    from lightning_muter.curvature.inner import Smoothing
    from lightning_muter.curvature.response import Response
    from lightning_muter.methods import Method, MUter
    from lightning_muter.snapshot import Snapshot
    from lightning_muter.solvers import Solver
    from lightning_muter.taking import refresh, take_snapshot
    from lightning_muter.threat import ThreatModel
    from lightning_muter.training import AdversarialTraining, AdversarialTrainingMixin
    from lightning_muter.unlearning import UnlearnResult, unlearn
    from lightning_muter.wide import unlearn_wide
    from lightning_muter.wide_snapshot import WideSnapshot
    from lightning_muter.wide_taking import take_wide_snapshot

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 - in the order of the flow
    "ThreatModel",
    "LossAttack",
    "AdversarialTrainingMixin",
    "AdversarialTraining",
    "MUterCallback",
    "take_snapshot",
    "take_wide_snapshot",
    "refresh",
    "Snapshot",
    "WideSnapshot",
    "unlearn",
    "unlearn_wide",
    "UnlearnResult",
    "Method",
    "MUter",
    "Response",
    "Solver",
    "Smoothing",
]

# Public name -> module that defines it; the same names as above, in the same order.
_HOME = {
    "ThreatModel": "threat",
    "LossAttack": "adversarial.attacks",
    "AdversarialTrainingMixin": "training",
    "AdversarialTraining": "training",
    "MUterCallback": "callback",
    "take_snapshot": "taking",
    "take_wide_snapshot": "wide_taking",
    "refresh": "taking",
    "Snapshot": "snapshot",
    "WideSnapshot": "wide_snapshot",
    "unlearn": "unlearning",
    "unlearn_wide": "wide",
    "UnlearnResult": "unlearning",
    "Method": "methods",
    "MUter": "methods",
    "Response": "curvature.response",
    "Solver": "solvers",
    "Smoothing": "curvature.inner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
