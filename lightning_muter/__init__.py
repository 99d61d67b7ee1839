"""lightning_muter: machine unlearning for adversarially trained PyTorch Lightning models.

Public names, in the order of the flow. Each is imported when it is first used, so that `muter --help` and the like do
not wait for torch and Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_muter.adversarial.climb import LossAttack
    from lightning_muter.adversarial.threat_model import ThreatModel
    from lightning_muter.adversarial.training import AdversarialTraining, AdversarialTrainingMixin
    from lightning_muter.callback import MUterCallback
    from lightning_muter.curvature.inner.maximiser import Smoothing
    from lightning_muter.curvature.response.base import Response
    from lightning_muter.preflight.check import check
    from lightning_muter.publication.publish import Publication, publish
    from lightning_muter.scope.head_methods import Method, MUter
    from lightning_muter.scope.network import unlearn_wide
    from lightning_muter.snapshot.refreshing import refresh
    from lightning_muter.snapshot.snapshot import Snapshot, WideSnapshot
    from lightning_muter.snapshot.take import take_snapshot, take_wide_snapshot
    from lightning_muter.solvers.base import Solver
    from lightning_muter.unlearning.result import UnlearnResult
    from lightning_muter.unlearning.unlearn import unlearn

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 - in the order of the flow
    "ThreatModel",
    "LossAttack",
    "AdversarialTrainingMixin",
    "AdversarialTraining",
    "MUterCallback",
    "check",
    "take_snapshot",
    "take_wide_snapshot",
    "refresh",
    "Snapshot",
    "WideSnapshot",
    "unlearn",
    "unlearn_wide",
    "UnlearnResult",
    "publish",
    "Publication",
    "Method",
    "MUter",
    "Response",
    "Solver",
    "Smoothing",
]

# Public name -> module that defines it; the same names as above, in the same order.
_HOME = {
    "ThreatModel": "adversarial.threat_model",
    "LossAttack": "adversarial.climb",
    "AdversarialTrainingMixin": "adversarial.training",
    "AdversarialTraining": "adversarial.training",
    "MUterCallback": "callback",
    "check": "preflight.check",
    "take_snapshot": "snapshot.take",
    "take_wide_snapshot": "snapshot.take",
    "refresh": "snapshot.refreshing",
    "Snapshot": "snapshot.snapshot",
    "WideSnapshot": "snapshot.snapshot",
    "unlearn": "unlearning.unlearn",
    "unlearn_wide": "scope.network",
    "UnlearnResult": "unlearning.result",
    "publish": "publication.publish",
    "Publication": "publication.publish",
    "Method": "scope.head_methods",
    "MUter": "scope.head_methods",
    "Response": "curvature.response.base",
    "Solver": "solvers.base",
    "Smoothing": "curvature.inner.maximiser",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
