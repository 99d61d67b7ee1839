"""Lightning under both of its names: `lightning.pytorch` and `pytorch_lightning` are the same code with different classes.

What is a callback here is one under either name, and what is asked of a module is asked under either name. Mixing the
two (a module of one, a trainer of the other) is Lightning's own to refuse.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning_utilities.core.overrides import is_overridden as _overrides

try:  # `lightning` brings it along; once torch is loaded it costs a tenth of a second
    other: ModuleType = importlib.import_module("pytorch_lightning")
except ImportError:
    other = pl

#: LightningModule and LightningDataModule under both names.
MODULES: tuple[type[pl.LightningModule], ...] = (pl.LightningModule, other.LightningModule)
DATAMODULES: tuple[type[pl.LightningDataModule], ...] = (pl.LightningDataModule, other.LightningDataModule)

if TYPE_CHECKING or other is pl:
    Callback = pl.Callback
else:

    class Callback(pl.Callback, other.Callback):
        """A callback for the trainers of both names: a single one is recognised by its class, as are those of a CLI."""


def is_overridden(name: str, owner: Any) -> bool:
    """Whether a module or a datamodule defines this hook itself, instead of Lightning's default."""
    parent = next((c for c in (*MODULES, *DATAMODULES) if isinstance(owner, c)), None)
    return parent is not None and bool(_overrides(name, owner, parent))
