"""What a module itself remembers of rows that it was made to forget.

After `unlearn`, and when one that uses `AdversarialTrainingMixin` is loaded, the list lies on the module as a plain attribute:
no parameter, no buffer, nothing that changes its weights or their names. It goes along with copies of the module and, as
metadata of the state dict, into every file that its weights are written to; a LightningModule checks by it what it is about to
be trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import Dataset

from lightning_muter.errors import CorruptFileError, MismatchError, RequestError
from lightning_muter.forgotten.rows import Forgotten
from lightning_muter.model.rows import collate_of

if TYPE_CHECKING:
    from lightning_muter.snapshot.stored import Stored

#: Entry of checkpoints, of the metadata of state dicts, and (as a prefix) the attribute of modules.
ENTRY = "lightning_muter"
_ATTRIBUTE = "_lightning_muter_forgotten"
Collate = Callable[[list[Any]], Any] | None


def recalled(module: object) -> Forgotten:
    """What this module remembers; nothing for one that was never made to forget."""
    found = vars(module).get(_ATTRIBUTE) if hasattr(module, "__dict__") else None
    return found if isinstance(found, Forgotten) else Forgotten()


def remember(module: nn.Module, record: Forgotten) -> None:
    """Add to what a module remembers.

    Raises:
        MismatchError: the two lists do not belong together.
    """
    if not record:
        return
    vars(module)[_ATTRIBUTE] = recalled(module) | record
    if _into_metadata not in module._state_dict_hooks.values():
        module._register_state_dict_hook(_into_metadata)
        if callable(getattr(type(module), "on_fit_start", None)):  # a LightningModule, which asks at the start of a fit
            vars(module)["on_fit_start"] = functools.partial(_start_fit, module)


def remember_instead(module: nn.Module, record: Forgotten) -> None:
    """Replace what a module remembers: the same rows, known under another key from now on."""
    vars(module).pop(_ATTRIBUTE, None)
    remember(module, record)


def check_remembered(module: nn.Module, snapshot: Stored) -> None:
    """Raise `MismatchError` where a module was made to forget rows that its snapshot does not list."""
    if not (Forgotten.of(snapshot) if recalled(module) else Forgotten()).covers(recalled(module)):
        raise MismatchError(
            f"snapshot: the model was made to forget {recalled(module).count} rows, and the snapshot does not list all of "
            "them: it is an older one. Use the snapshot that was saved with these weights (<name>.muter.snapshot)."
        )


def entries_of(checkpoint: Mapping[str, Any], origin: str = "checkpoint") -> list[Forgotten]:
    """The lists in a checkpoint, empty ones included: its own entry, the states of callbacks, the metadata of its weights.

    Raises:
        CorruptFileError: one is damaged.
    """
    metadata = getattr(checkpoint.get("state_dict"), "_metadata", None) or {}
    callbacks = checkpoint.get("callbacks")
    states = list(callbacks.values()) if isinstance(callbacks, Mapping) else []
    found = [checkpoint.get(ENTRY), *(part.get(ENTRY) for part in metadata.values() if isinstance(part, Mapping))]
    found += [state for state in states if isinstance(state, Mapping) and {"forgotten", "n_total"} <= set(state)]
    try:
        return [Forgotten.from_dict(entry) for entry in found if entry is not None]
    except ValueError as error:
        raise CorruptFileError(f"{origin}: {error}. Restore it from a backup.") from error


def recorded_in(checkpoint: Mapping[str, Any], origin: str = "checkpoint") -> Forgotten:
    """What a checkpoint says was forgotten.

    Raises:
        CorruptFileError: an entry is damaged; MismatchError: they contradict one another.
    """
    record = Forgotten()
    for entry in entries_of(checkpoint, origin):
        record = record | entry
    return record


def refuse_forgotten_rows(
    record: Forgotten, dataset: Dataset[Any], collate: Collate = None, argument: str = "train_dataloader"
) -> None:
    """Raise `RequestError` where a dataset that is to be trained on holds forgotten rows, or where it cannot be told."""
    if found := record.located(dataset, collate, argument):
        raise RequestError(
            f"{argument}: {len(found)} forgotten rows are among its {len(dataset)}, e.g. at {found[:5]}. "  # type: ignore[arg-type]
            "Train on what is retained: MUterCallback.retained(dataset), or "
            "Snapshot.load('<name>.muter.snapshot').retained(dataset)."
        )


def _into_metadata(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    if record := recalled(module):
        local_metadata[ENTRY] = record.to_dict()


def _start_fit(module: Any) -> None:
    """Stands before a LightningModule's own `on_fit_start` once it remembers something."""
    trainer = module.trainer
    trainer.fit_loop.setup_data()  # Lightning does the same right after; it keeps the loaders
    loaders = trainer.fit_loop._combined_loader
    for loader in [] if loaders is None else loaders.flattened:
        dataset = getattr(loader, "dataset", None)
        if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise RequestError(
                f"train_dataloader: {recalled(module).count} rows were forgotten, and it cannot be told whether they are among "
                f"those of a {type(dataset).__name__}. Train on a map-style dataset (with __getitem__ and __len__)."
            )
        refuse_forgotten_rows(recalled(module), dataset, collate_of(loader))
    type(module).on_fit_start(module)
