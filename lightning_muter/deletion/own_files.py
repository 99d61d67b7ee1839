"""The files of one callback: where they lie, what they hold, and what was done in memory since they were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_muter.deletion.checkpoints import checkpoint_fingerprint, load_checkpoint
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.request_flow import entry_of
from lightning_muter.deletion.saving import save_fit, save_requests
from lightning_muter.errors import ArgumentError, MuterError
from lightning_muter.forgotten.modules import ENTRY
from lightning_muter.snapshot.stored import Stored, key_path
from lightning_muter.storage.atomic import commit_files
from lightning_muter.storage.fingerprint import DigestKey
from lightning_muter.storage.plain import Plain, plain
from lightning_muter.unlearning.result import UnlearnResult


def stem_of(trainer: pl.Trainer, dirpath: Path | None) -> Path | None:
    """Path without suffix of the files: after the last checkpoint, in dirpath where one is given."""
    checkpoint = trainer.checkpoint_callback
    last = ""
    if checkpoint is not None:
        last = str(getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", ""))
    name = Path(last).stem if last else "model"
    if dirpath is not None:
        return dirpath / name
    return Path(last).parent / name if last else None


def folders_of(trainer: pl.Trainer, dirpath: Path | None) -> list[Path]:
    """Where the files of this run go, and where the one that is resumed lies: who was forgotten there counts here."""
    own = getattr(trainer.checkpoint_callback, "dirpath", None)
    resumed = trainer.ckpt_path
    found = [dirpath, own, None if resumed is None else Path(resumed).parent]
    return [Path(folder) for folder in found if folder is not None]


def kept_key(stem: Path, key: DigestKey | None, *, anew: bool) -> DigestKey:
    """The key that lies beside files of this stem; ``key`` where there is none, or instead of it (``anew``)."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = key_path(f"{stem}.muter.snapshot")
    if key is not None and (anew or not path.exists()):
        key.keep(path)
    return DigestKey.load(path)


@dataclass
class OwnFiles:
    """What `save` needs: the module, what a checkpoint holds besides weights, and what was done since the files."""

    paths: dict[str, Path] = field(default_factory=dict)
    _module: pl.LightningModule | None = None
    _base: dict[str, Any] = field(default_factory=dict)
    _on_disk: str | None = None
    _unsaved: list[UnlearnResult] = field(default_factory=list)
    _changed: bool = False

    def at_the_end_of_fit(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        snapshot: Stored,
        stem: Path | None,
        trained: str,
        *,
        verbose: bool,
    ) -> None:
        """Write checkpoint and snapshot, where they have a place.

        Args:
            trainer: tells what the checkpoint holds besides weights.
            module: with the weights of the snapshot.
            snapshot: that was taken.
            stem: path of the files without suffix.
            trained: fingerprint of the weights before polish.
            verbose: say what was written.
        """
        self._module, self._unsaved, self._on_disk, self._changed = module, [], None, True
        dumped = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
        del dumped["state_dict"]
        written = plain(dumped)
        self._base = {**written.value, ENTRY: entry_of(snapshot)}
        if stem is not None and trainer.is_global_zero:
            self._write(snapshot, module, Places(stem.parent, stem.name), trained)
            notes = [
                *_left_out(self.paths["checkpoint"], written, verbose),
                *_read_back(self.paths["checkpoint"], snapshot),
            ]
            for note in notes:
                rank_zero_warn(note)
            snapshot.warnings += notes
            if verbose:
                rank_zero_info(f"MUter: written: {self.paths['snapshot']} (weights: {self.paths['checkpoint'].name})")

    def changed(self, module: pl.LightningModule, results: Sequence[UnlearnResult] = ()) -> None:
        """Note what was done in memory: these requests, or a refresh."""
        self._module, self._changed = module, True
        self._unsaved += results

    def save(self, snapshot: Stored, path: str | Path | None) -> Path:
        """Enter what was done in memory: checkpoint, snapshot and ledger in one transaction. Returns the snapshot's path."""
        target = Path(path) if path is not None else self.paths.get("snapshot")
        if target is None:
            raise ArgumentError(
                "path", None, "a file name", "The fit wrote no files: say where, e.g. 'a.muter.snapshot'."
            )
        places = Places.named(target)
        assert self._module is not None  # there is a snapshot
        if places.snapshot == self.paths.get("snapshot") and not self._changed:
            return places.snapshot  # as it was written
        before = self._on_disk or (self._unsaved[0].fingerprint_before if self._unsaved else snapshot.fingerprint)
        save_requests(places, self._module, snapshot, self._unsaved, before=before, base=self._base)
        self._written(places, snapshot)
        return places.snapshot

    def _written(self, places: Places, snapshot: Stored) -> None:
        self.paths = {"checkpoint": places.checkpoint, "snapshot": places.snapshot}
        self._on_disk, self._unsaved, self._changed = snapshot.fingerprint, [], False

    def _write(self, snapshot: Stored, module: pl.LightningModule, places: Places, trained: str) -> None:
        checkpoint = {**self._base, "state_dict": module.state_dict()}
        if snapshot.key is not None:
            snapshot.key.keep(places.key)
        if places.ledger.exists():  # requests were carried out on the files here: this is entered after them
            save_fit(places, module, snapshot, checkpoint, trained)
        else:
            commit_files(  # both or none: a crash in between must not leave a snapshot of other weights
                {places.checkpoint: lambda file: torch.save(checkpoint, file), places.snapshot: snapshot.writer()}
            )
        self._written(places, snapshot)


def _left_out(checkpoint: Path, written: Plain, verbose: bool) -> list[str]:
    """What a checkpoint of plain values lacks."""
    written.left_out.pop("hparams_type", None)  # of OmegaConf: a class
    if written.changed and verbose:
        shown = ", ".join(f"{name} ({kind})" for name, kind in written.changed.items())
        rank_zero_info(f"MUter: written as plain dicts and tensors, and so they come back: {shown}")
    if not written.left_out:
        return []
    shown = ", ".join(f"{name} ({kind})" for name, kind in written.left_out.items())
    return [
        f"{checkpoint.name} was written without {shown}: reading such objects would run code. "
        "Pass them again where the checkpoint is loaded: load_from_checkpoint(path, name=value), or in the "
        "command line's configuration."
    ]


def _read_back(checkpoint: Path, snapshot: Stored) -> list[str]:
    """What was written must be what the command line can read; said now, not when the first request comes."""
    try:
        found = checkpoint_fingerprint(load_checkpoint(checkpoint))
    except MuterError as error:
        return [f"Requests from the command line will not work: {error}"]
    if found == snapshot.fingerprint:
        return []
    return [f"{checkpoint} does not hold the weights of the snapshot ({found[:16]}…)."]
