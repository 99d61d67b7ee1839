"""Which rows a fit trained on: from what its loader can reach, and from the content of the batches where that does not tell."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from lightning_muter.errors import UnsuitableError
from lightning_muter.lightning_names import is_overridden
from lightning_muter.model.distributed import Shards
from lightning_muter.model.rows import RowHashes, in_order, reachable, reached_in_one_epoch

_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device")
_WAY_OUT = (
    "Train on one dataset that holds every row (a Subset or ConcatDataset of it), or take the snapshot of all of them: "
    "take_snapshot(model, dataset, threat_model=...)."
)


class TrainedRows:
    """Follows one fit; nothing but hashes of its batches is kept.

    Args:
        earlier: :meth:`state` of the run that this one resumes.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, earlier: dict[str, Any] | None = None) -> None:
        owners = [o for o in (module, getattr(trainer, "datamodule", None)) if o is not None]
        self._plain = not any(is_overridden(hook, owner) for owner in owners for hook in _HOOKS)
        self._seen, self._earlier = RowHashes(), earlier
        self._datasets: list[Any] = []
        self._whole_epochs = 0
        self._trainer: Any = trainer
        self.epoch_starts()

    def epoch_starts(self) -> None:
        """The loader may be another one than in the epoch before."""
        dataset = getattr(self._trainer.train_dataloader, "dataset", None)
        if dataset is not None and not any(dataset is d for d in self._datasets):
            self._datasets.append(dataset)

    def epoch_ends(self) -> None:
        self._whole_epochs += self._at_the_end()

    def _at_the_end(self) -> bool:
        """Whether the last batch of a whole epoch was trained on."""
        limited = self._trainer.limit_train_batches not in (1.0, None) or bool(self._trainer.overfit_batches)
        return not limited and self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

    def batch(self, batch: Any) -> None:
        """See a batch on its way to ``training_step``, before any attack."""
        if not self._plain:
            return
        try:
            self._seen.add(batch)
        except Exception:  # of tensors that cannot be looked at bit by bit; asked for only where it matters
            self._plain = False

    def state(self) -> dict[str, Any] | None:
        """Number and sum of the hashes of the rows so far, to compare with those of a run that goes on; None: not known.

        A sum tells whether the set is the same and nothing about any single row.
        """
        whole = self._whole_epochs or self._at_the_end()
        loader: Any = self._trainer.train_dataloader
        if not (whole and self._plain and self._trainer.world_size == 1 and reached_in_one_epoch(loader)):
            return None
        return _summed(self._seen.seen())

    def positions(self) -> list[int] | None:
        """Positions, in the loader's dataset, of the rows that this fit could reach or did; None for all of them.

        Raises:
            UnsuitableError: some are not in it, or it cannot be told.
        """
        loader: Any = self._trainer.train_dataloader
        known, told = self._by_sampler(loader)
        shards = Shards.current()
        if told and len(self._datasets) == 1 and shards.world == 1 and not self._earlier:
            return known
        if not all(shards.gather(self._plain and self._seen.readable)):
            if told and len(self._datasets) == 1:
                return known
            raise UnsuitableError(
                "No snapshot was taken: which rows were trained on cannot be told, for the sampler does not say and hooks "
                f"change batches on their way ({', '.join(_HOOKS)}). {_WAY_OUT}"
            )
        table = self._table(loader, shards)
        for part in shards.gather(self._seen.seen()):
            self._seen.include(part)
        found, missing = self._seen.positions_in(table)
        if missing:
            raise UnsuitableError(
                f"No snapshot was taken: {missing} of the {len(self._seen.seen())} different rows that were trained on are "
                f"not in the last training loader's dataset (loaders made anew, or other rows in other processes). {_WAY_OUT}"
            )
        if told:
            found = sorted({*found, *(range(len(table)) if known is None else known)})
        self._compare_with_earlier(table[found])
        return None if len(found) == len(table) else found

    def _by_sampler(self, loader: DataLoader[Any]) -> tuple[list[int] | None, bool]:
        """What the sampler's kind tells, and whether it tells."""
        if isinstance(loader.sampler, SequentialSampler) and not self._whole_epochs:
            return None, False
        try:
            return reachable(loader), True
        except LookupError:
            return None, False

    def _table(self, loader: DataLoader[Any], shards: Shards) -> Tensor:
        """The hash of every row of the dataset, each read by one process.

        Raises:
            UnsuitableError: processes have datasets of other lengths.
        """
        n = len(loader.dataset)  # type: ignore[arg-type]
        if len(lengths := set(shards.gather(n))) > 1:
            raise UnsuitableError(
                f"No snapshot was taken: processes train on datasets of {sorted(lengths)} rows. Give every process the same "
                "dataset; the DistributedSampler shares it out."
            )
        rows = []
        for batch in in_order(loader, shards.share(range(n))):
            found = self._seen.hashes(self._trainer.precision_plugin.convert_input(batch))
            rows.append(torch.zeros(0, dtype=torch.int64) if found is None else found.cpu())
        mine = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        table = torch.zeros(n, dtype=torch.int64)
        for rank, part in enumerate(shards.gather(mine)):
            table[rank :: shards.world] = part
        return table

    def _compare_with_earlier(self, reached: Tensor) -> None:
        """Compare the rows of this run with those of the run that it resumes.

        Raises:
            UnsuitableError: the run that is resumed trained on other rows.
        """
        if self._earlier and _summed(reached.unique()) != self._earlier:
            raise UnsuitableError(
                f"No snapshot was taken: the run that was resumed had trained on {self._earlier['count']} rows, this one on "
                f"{len(reached.unique())}, and they are not the same rows (another split?). {_WAY_OUT}"
            )


def _summed(hashes: Tensor) -> dict[str, Any]:
    return {"count": len(hashes), "sum": int(hashes.sum())}
