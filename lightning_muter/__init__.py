"""lightning_muter: machine unlearning for adversarially trained PyTorch Lightning models."""

from lightning_muter.threat import ThreatModel

__version__ = "0.1.0"
__all__ = ["ThreatModel"]
