"""Rows 3 and 7 were forgotten: every way in which they might come back is refused, or honoured without them; none is silent."""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_muter import (
    MUterCallback,
    Snapshot,
    ThreatModel,
    refresh,
    take_snapshot,
    take_wide_snapshot,
    unlearn,
    unlearn_wide,
)
from lightning_muter.deletion.checkpoints import load_checkpoint
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.errors import MuterError
from lightning_muter.forgotten import rows as forgotten_rows
from lightning_muter.forgotten.modules import recalled
from lightning_muter.storage.fingerprint import DigestKey

from .world import QUIET, N, Net, command, dataset, plain_checkpoint, rows

GONE = [3, 7]
KEPT = [i for i in range(N) if i not in GONE]
PERMUTED = [*range(1, N), 0]
OPTIONS: dict[str, Any] = {"threat_model": ThreatModel("l2", 0.1, None), "weight_decay": 0.1, "progress": False}


class Plain(pl.LightningModule):
    """Knows nothing of this package; the same weights as `Net`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3).double()
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    forward = Net.__dict__["forward"].__wrapped__ if hasattr(Net.forward, "__wrapped__") else Net.forward

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)


def callback(**options: Any) -> MUterCallback:
    return MUterCallback(verbose=False, threat_model=ThreatModel("l2", 0.1, None), **options)


def fit(module: Any, of: Dataset[Any], *callbacks: Any, resume: Path | None = None, epochs: int = 1) -> None:
    """A fit, in which no forgotten row is seen."""
    points, _ = rows()
    seen: list[torch.Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch["x"] if isinstance(batch, dict) else batch[0])

    files = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, enable_checkpointing=files, callbacks=[*callbacks, Watch()])
    trainer.fit(module, DataLoader(of, 8), ckpt_path=None if resume is None else str(resume))
    for x in seen:
        for row in GONE:
            assert not (x.double().reshape(len(x), -1) - points[row]).norm(dim=1).lt(1e-6).any()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cli/: by the command line; fit/: by a callback, whose own last.ckpt has an optimiser's state. before/: of cli/."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("cli", "before", "fit"):
        (folder / name).mkdir()
    plain_checkpoint(folder / "cli/last.ckpt")
    command("snapshot", folder / "cli/last.ckpt")
    for path in (folder / "cli").glob("last.muter.*"):
        if path.is_file():
            shutil.copy(path, folder / "before")
    command("unlearn", folder / "cli/last.ckpt", forget=GONE, request_id="ticket")
    module, muter = Net(), callback()
    fit_all(module, muter, ModelCheckpoint(folder / "fit", save_last=True, filename="best"))
    muter.unlearn(module, GONE)
    muter.save()
    return folder


def fit_all(module: Any, *callbacks: Any) -> None:
    trainer = pl.Trainer(**QUIET, max_epochs=1, callbacks=list(callbacks))
    trainer.fit(module, DataLoader(dataset(), 8))


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "work")
    forgotten_rows._KEYS.clear()  # another process
    return tmp_path / "work"


def without_forgotten(snapshot: Any) -> None:
    """The snapshot counts no forgotten row, and knows both again."""
    assert snapshot.key is not None
    x, y = rows()
    held = {bytes(row) for row in snapshot.digests.numpy()}
    for row in GONE:
        assert snapshot.key.digest(x[row], y[row]) not in held
        assert snapshot.key.digest(x[row].float(), y[row]) not in held
    assert len(snapshot.barred) == len(GONE)


def snapshot_by_command(path: Path, of: Dataset[Any] | None = None, out: Path | None = None, **options: Any) -> None:
    command("snapshot", path, of, out=None if out is None else str(out), **options)
    without_forgotten(Snapshot.load(Places.of(out or path).snapshot))


def taken(model: Any, of: Dataset[Any] | None = None, **options: Any) -> Snapshot:
    snapshot = take_snapshot(model, of or dataset(), **(OPTIONS | options))
    without_forgotten(snapshot)
    return snapshot


def loaded(folder: Path, kind: Any = Net) -> Any:
    return kind.load_from_checkpoint(folder / "cli/last.muter.ckpt", map_location="cpu", weights_only=True)


def keys(folder: Path) -> None:
    forgotten_rows.remember_key(DigestKey.load(folder / "cli/last.muter.key"))


def once_more(order: list[int] | None = None) -> Dataset[Any]:
    return dataset([*(order or range(N)), GONE[0]])


def with_dtype(order: list[int]) -> Dataset[Any]:
    x, y = rows()
    return TensorDataset(x[order].float(), y[order].int())


class AsDicts(Dataset[Any]):
    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        x, y = rows()
        return {"x": x[self.order[index]], "y": y[self.order[index]]}


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        x, y = rows()
        return iter(zip(x, y, strict=True))


def forget_in_memory(module: Any) -> Snapshot:
    snapshot = take_snapshot(module, dataset(), **OPTIONS)
    unlearn(module, snapshot, GONE, dataset(), progress=False)
    return snapshot


# --- the command line's snapshot --------------------------------------------------------------------------------------

Way = Callable[[Path], Any]
REFUSED, HONOURED = True, False
WAYS: dict[str, tuple[bool, Way]] = {}


def way(name: str, refused: bool) -> Callable[[Way], Way]:
    def enter(function: Way) -> Way:
        WAYS[name] = (refused, function)
        return function

    return enter


def cli(name: str, refused: bool, change: Callable[[Path], object] = lambda f: None, **options: Any) -> None:
    """`muter snapshot` of a checkpoint in cli/ (current, or original), after something was changed there."""

    def run(folder: Path) -> None:
        change(folder)
        path = folder / "cli" / ("last.ckpt" if options.get("original") else "last.muter.ckpt")
        (folder / "other").mkdir()
        out = options.get("out")
        rest = {k: v for k, v in options.items() if k not in ("original", "out", "of")}
        snapshot_by_command(path, options.get("of"), out=None if out is None else folder / out, **rest)

    WAYS[f"snapshot: {name}"] = (refused, run)


def lost(*names: str) -> Callable[[Path], object]:
    return lambda f: [(f / "cli" / f"last.muter.{name}").unlink() for name in names]


def put_back(*names: str) -> Callable[[Path], object]:
    return lambda f: [shutil.copy(f / "before" / f"last.muter.{name}", f / "cli") for name in names]


cli("of the unlearned checkpoint", HONOURED)
cli("of the unlearned checkpoint under another name", HONOURED, out="cli/n.ckpt")
cli("of the unlearned checkpoint in another folder", HONOURED, out="other/n.ckpt")
cli("of the original", REFUSED, original=True)
cli("of the original under another name", REFUSED, original=True, out="cli/n.ckpt")
cli("of the original in another folder", REFUSED, original=True, out="other/n.ckpt")
cli("of the original in another folder, every scope", REFUSED, original=True, out="other/n.ckpt", scope="all")
cli("of every parameter", HONOURED, scope="all")
cli("of every parameter in another folder", HONOURED, scope="all", out="other/n.ckpt")
cli("of a pattern of parameters", HONOURED, scope=["layer.*"])
cli("key lost", REFUSED, lost("key"))
cli("key lost, in another folder", REFUSED, lost("key"), out="other/n.ckpt")
cli("key lost, data permuted", REFUSED, lost("key"), of=dataset(PERMUTED))
cli("key of somebody else", REFUSED, lambda f: (f / "cli/last.muter.key").write_bytes(bytes(32)))
cli("ledger deleted", HONOURED, lost("ledger"))
cli("ledger deleted, in another folder", HONOURED, lost("ledger"), out="other/n.ckpt")
cli("ledger deleted, data permuted", REFUSED, lost("ledger"), of=dataset(PERMUTED))
cli("ledger and key deleted", REFUSED, lost("ledger", "key"))
cli("snapshot deleted", HONOURED, lost("snapshot"))
cli("snapshot deleted, data permuted", REFUSED, lost("snapshot"), of=dataset(PERMUTED))
cli("snapshot and ledger deleted", HONOURED, lost("snapshot", "ledger"))
cli("snapshot and ledger deleted, data permuted, every scope", REFUSED, lost("snapshot", "ledger"),
    of=dataset(PERMUTED), scope="all")  # fmt: skip
cli("data permuted", REFUSED, of=dataset(PERMUTED))
cli("data permuted, in another folder", REFUSED, of=dataset(PERMUTED), out="other/n.ckpt")
cli("data permuted, every scope", REFUSED, of=dataset(PERMUTED), scope="all")
cli("a row once more", REFUSED, of=once_more())
cli("a row once more, in another folder", REFUSED, of=once_more(), out="other/n.ckpt")
cli("the retained rows and a forgotten one", REFUSED, of=once_more(KEPT))
cli("the retained rows alone", HONOURED, of=dataset(KEPT))
cli("the retained rows alone, in another folder", HONOURED, of=dataset(KEPT), out="other/n.ckpt")
cli("other rows alone", REFUSED, of=TensorDataset(rows()[0] + 1, rows()[1]))
cli("fewer and other rows", REFUSED, of=TensorDataset(rows()[0][:9] + 1, rows()[1][:9]))
cli("older ledger put back", REFUSED, put_back("ledger"))
cli("older snapshot put back", REFUSED, put_back("snapshot"))
cli("older snapshot put back, ledger deleted", REFUSED, lambda f: (put_back("snapshot")(f), lost("ledger")(f)))
cli("older checkpoint put back", REFUSED, put_back("ckpt"))
cli("older checkpoint put back, ledger deleted", REFUSED, lambda f: (put_back("ckpt")(f), lost("ledger")(f)))
cli("older checkpoint and snapshot put back", REFUSED, put_back("ckpt", "snapshot"))


def copied(folder: Path, *names: str, of: Dataset[Any] | None = None, as_name: str = "last.muter.ckpt") -> None:
    (folder / "alone").mkdir()
    shutil.copy(folder / "cli/last.muter.ckpt", folder / "alone" / as_name)
    for name in names:
        shutil.copy(folder / "cli" / f"last.muter.{name}", folder / "alone")
    snapshot_by_command(folder / "alone" / as_name, of)


WAYS |= {
    "copied: the checkpoint alone": (REFUSED, copied),
    "copied: the checkpoint alone, renamed": (REFUSED, lambda f: copied(f, as_name="model.ckpt")),
    "copied: with its key": (HONOURED, lambda f: copied(f, "key")),
    "copied: with its key, data permuted": (REFUSED, lambda f: copied(f, "key", of=dataset(PERMUTED))),
    "copied: with its key, the retained rows": (REFUSED, lambda f: copied(f, "key", of=dataset(KEPT))),
    "copied: with key and snapshot": (HONOURED, lambda f: copied(f, "key", "snapshot")),
    "copied: with an older snapshot": (
        REFUSED,
        lambda f: (put_back("snapshot")(f), copied(f, "key", "snapshot")),
    ),
}


# --- other commands ---------------------------------------------------------------------------------------------------


@way("unlearn: older ledger put back", REFUSED)
def _(folder: Path) -> None:
    put_back("ledger")(folder)
    command("unlearn", folder / "cli/last.ckpt", forget=[9])


@way("unlearn: older checkpoint and snapshot put back", REFUSED)
def _(folder: Path) -> None:
    put_back("ckpt", "snapshot")(folder)
    command("unlearn", folder / "cli/last.ckpt", forget=[9])


@way("unlearn: a forgotten row again", REFUSED)
def _(folder: Path) -> None:
    command("unlearn", folder / "cli/last.ckpt", forget=[3])


@way("unlearn: data permuted", REFUSED)
def _(folder: Path) -> None:
    command("unlearn", folder / "cli/last.ckpt", dataset(PERMUTED), forget=[9])


@way("refresh: data permuted", REFUSED)
def _(folder: Path) -> None:
    command("refresh", folder / "cli/last.ckpt", dataset(PERMUTED))


@way("refresh: a row once more", REFUSED)
def _(folder: Path) -> None:
    command("refresh", folder / "cli/last.ckpt", once_more())


@way("refresh: key lost", REFUSED)
def _(folder: Path) -> None:
    lost("key")(folder)
    command("refresh", folder / "cli/last.ckpt")


@way("refresh: key recovered, data permuted", REFUSED)
def _(folder: Path) -> None:
    lost("key")(folder)
    try:
        command("refresh", folder / "cli/last.ckpt", dataset(PERMUTED), recover_key=True)
    finally:
        assert not (folder / "cli/last.muter.key").exists()


@way("refresh: key recovered", HONOURED)
def _(folder: Path) -> None:
    lost("key")(folder)
    command("refresh", folder / "cli/last.ckpt", recover_key=True)
    without_forgotten(Snapshot.load(folder / "cli/last.muter.snapshot"))
    command("unlearn", folder / "cli/last.ckpt", forget=[9])  # and so it goes on
    with pytest.raises(MuterError):
        snapshot_by_command(folder / "cli/last.ckpt", dataset(PERMUTED))


# --- python doors -----------------------------------------------------------------------------------------------------


def python(name: str, refused: bool, make: Callable[[Path], Any], of: Dataset[Any] | None = None) -> None:
    WAYS[f"take_snapshot: {name}"] = (refused, lambda folder: taken(make(folder), of))


def forgetful(_: Path, kind: Any = Net) -> Any:
    module = kind()
    forget_in_memory(module)
    return module


def reloaded(folder: Path) -> Any:
    keys(folder)
    return loaded(folder)


def by_state_dict(folder: Path) -> Any:
    torch.save(forgetful(folder).state_dict(), folder / "weights.pt")
    fresh = Net()
    fresh.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return fresh


def by_own_checkpoint(folder: Path) -> Any:
    module = forgetful(folder)
    trainer = pl.Trainer(**QUIET, max_epochs=0, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "mine.ckpt", weights_only=True)
    return Net.load_from_checkpoint(folder / "mine.ckpt", weights_only=True)


python("after unlearn", HONOURED, forgetful)
python("after unlearn, any module", HONOURED, lambda f: forgetful(f, Plain))
python(
    "after unlearn, a module of plain torch",
    HONOURED,
    lambda f: forgetful(f, lambda: nn.Sequential(nn.Linear(2, 3).double())),
)
python("after unlearn, data permuted", REFUSED, forgetful, dataset(PERMUTED))
python("after unlearn, a row once more", REFUSED, forgetful, once_more())
python("after unlearn, in float32, permuted", REFUSED, forgetful, with_dtype(PERMUTED))
python("after unlearn, as dictionaries, permuted", REFUSED, forgetful, AsDicts(PERMUTED))
python("after unlearn, parts of a permuted whole", REFUSED, forgetful, Subset(dataset(PERMUTED), KEPT))
python("after unlearn, a part of a longer whole", REFUSED, forgetful, Subset(once_more(), [*KEPT, N]))
python("after unlearn, the retained part", HONOURED, forgetful, Subset(dataset(), KEPT))
python("of a copy", HONOURED, lambda f: copy.deepcopy(forgetful(f)))
python("of a pickled copy", HONOURED, lambda f: pickle.loads(pickle.dumps(forgetful(f))))
python("of weights saved and loaded", HONOURED, by_state_dict)
python("of the user's own checkpoint, loaded", HONOURED, by_own_checkpoint)
python("after loading", HONOURED, reloaded)
python("after loading, without the key", REFUSED, loaded)
python("after loading, data permuted", REFUSED, reloaded, dataset(PERMUTED))


@way("take_snapshot: another key than the forgotten rows'", REFUSED)
def _(folder: Path) -> None:
    taken(forgetful(folder), key=DigestKey.generate())


@way("take_snapshot: like= a snapshot that forgot", HONOURED)
def _(folder: Path) -> None:
    module = Plain()
    snapshot = forget_in_memory(module)
    fresh = Plain()
    fresh.load_state_dict(module.state_dict())
    assert taken(fresh, like=snapshot, polish=0).forgotten == GONE


@way("take_snapshot: like= a snapshot that forgot, data permuted", REFUSED)
def _(folder: Path) -> None:
    module = Plain()
    snapshot = forget_in_memory(module)
    fresh = Plain()
    fresh.load_state_dict(module.state_dict())
    taken(fresh, dataset(PERMUTED), like=snapshot, polish=0)


@way("take_wide_snapshot: after unlearn", HONOURED)
def _(folder: Path) -> None:
    without_forgotten(take_wide_snapshot(forgetful(folder), dataset(), **OPTIONS))


@way("take_wide_snapshot: data permuted", REFUSED)
def _(folder: Path) -> None:
    take_wide_snapshot(forgetful(folder), dataset(PERMUTED), **OPTIONS)


@way("unlearn_wide: earlier rows are left out", HONOURED)
def _(folder: Path) -> None:
    module = forgetful(folder)
    result = unlearn_wide(module, [9], dataset(), steps=1, **OPTIONS)
    assert result.n_retained == N - 3
    assert recalled(module).positions == (3, 7, 9)


@way("unlearn_wide: data permuted", REFUSED)
def _(folder: Path) -> None:
    unlearn_wide(forgetful(folder), [9], dataset(PERMUTED), steps=1, **OPTIONS)


@way("unlearn: a snapshot from before", REFUSED)
def _(folder: Path) -> None:
    module = Plain()
    old = take_snapshot(module, dataset(), **OPTIONS)
    before = copy.deepcopy((module.state_dict(), old))
    unlearn(module, old, GONE, dataset(), progress=False)
    module.load_state_dict(before[0])
    unlearn(module, before[1], [9], dataset(), progress=False)


@way("refresh in memory: data permuted", REFUSED)
def _(folder: Path) -> None:
    module = Plain()
    refresh(module, forget_in_memory(module), dataset(PERMUTED), progress=False)


def retained(name: str, refused: bool, of: Callable[[], Dataset[Any]], *, key: bool = True) -> None:
    def run(folder: Path) -> None:
        if not key:
            lost("key")(folder)
        kept = Snapshot.load(folder / "cli/last.muter.snapshot").retained(of())
        assert not set(kept.indices) & set(GONE)

    WAYS[f"retained: {name}"] = (refused, run)


retained("of the training set", HONOURED, dataset)
retained("of another order", REFUSED, lambda: dataset(PERMUTED))
retained("of a row more", REFUSED, once_more)
retained("without the key", REFUSED, dataset, key=False)


# --- fits -------------------------------------------------------------------------------------------------------------


def fitted(name: str, refused: bool, of: Callable[[], Dataset[Any]], *, resume: str | None = None) -> None:
    """Another process fits a new module in the folder of the first, with the callback."""

    def run(folder: Path) -> None:
        place = folder / "fit"
        saving = ModelCheckpoint(place, save_last=True, filename="best", enable_version_counter=False)
        fit(Net(), of(), callback(), saving, resume=None if resume is None else place / resume, epochs=2)

    WAYS[f"fit: {name}"] = (refused, run)


fitted("anew in the folder", REFUSED, dataset)
fitted("anew in the folder, data permuted", REFUSED, lambda: dataset(PERMUTED))
fitted("anew in the folder, a part of permuted data", REFUSED, lambda: Subset(dataset(PERMUTED), KEPT))
fitted("anew in the folder, joined data sets", REFUSED, lambda: ConcatDataset([dataset(KEPT), dataset([7])]))
fitted("anew in the folder, one forgotten row among others", REFUSED, lambda: dataset([0, 1, 2, 3, 4]))
fitted("anew in the folder, retained rows", HONOURED, lambda: dataset(KEPT))
fitted("anew in the folder, the retained part", HONOURED, lambda: Subset(dataset(), KEPT))
fitted("resumed from the callback's own last.ckpt", REFUSED, dataset, resume="last.ckpt")
fitted("resumed from last.ckpt with retained rows", REFUSED, lambda: dataset(KEPT), resume="last.ckpt")
fitted("resumed from an epoch's checkpoint with retained rows", REFUSED, lambda: dataset(KEPT), resume="best.ckpt")
fitted("resumed from the unlearned checkpoint", REFUSED, lambda: dataset(KEPT), resume="last.muter.ckpt")


@way("fit: another folder of files, the first one's checkpoint resumed", REFUSED)
def _(folder: Path) -> None:
    fit(Net(), dataset(KEPT), callback(dirpath=folder / "elsewhere"), resume=folder / "fit/last.ckpt", epochs=2)


@way("fit: key lost", REFUSED)
def _(folder: Path) -> None:
    (folder / "fit/last.muter.key").unlink()
    fit(Net(), dataset(KEPT), callback(dirpath=folder / "fit"))


@way("fit: the same callback, another module", REFUSED)
def _(folder: Path) -> None:
    module, muter = Net(), callback()
    fit_all(module, muter)
    muter.unlearn(module, GONE)
    fit(Net(), dataset(), muter)


@way("fit: the same callback resumes the checkpoint from before", REFUSED)
def _(folder: Path) -> None:
    module, muter = Net(), callback()
    fit_all(module, muter, ModelCheckpoint(folder / "again", save_last=True))
    muter.unlearn(module, GONE)
    fit(Net(), dataset(KEPT), muter, resume=folder / "again/last.ckpt", epochs=2)


@way("fit: a loaded module, no callback", REFUSED)
def _(folder: Path) -> None:
    fit(reloaded(folder), dataset())


@way("fit: a loaded module, no callback, no key", REFUSED)
def _(folder: Path) -> None:
    fit(loaded(folder), dataset(KEPT))


@way("fit: any module after unlearn, no callback", REFUSED)
def _(folder: Path) -> None:
    fit(forgetful(folder, Plain), dataset())


@way("fit: any module after unlearn, other types", REFUSED)
def _(folder: Path) -> None:
    fit(forgetful(folder, Plain), with_dtype(PERMUTED))


@way("fit: any module after unlearn, a stream", REFUSED)
def _(folder: Path) -> None:
    fit(forgetful(folder, Plain), Streamed())


@way("fit: any module after unlearn, retained rows", HONOURED)
def _(folder: Path) -> None:
    fit(forgetful(folder, Plain), dataset(KEPT))


@way("callback: retained() of another order", REFUSED)
def _(folder: Path) -> None:
    module, muter = Net(), callback()
    fit_all(module, muter)
    muter.unlearn(module, GONE)
    muter.retained(dataset(PERMUTED))


@way("callback: retained() of the whole it was made of", HONOURED)
def _(folder: Path) -> None:
    module, muter = Net(), callback()
    fit_all(module, muter)
    muter.unlearn(module, GONE)
    fit(module, muter.retained(dataset()), muter)
    muter.unlearn(module, [0])
    assert muter.retained(dataset()).indices == KEPT[1:]


@way("callback: save, then the command's snapshot", HONOURED)
def _(folder: Path) -> None:
    snapshot_by_command(folder / "fit/last.muter.ckpt")


@way("callback: save, then the command's snapshot of its own last.ckpt", REFUSED)
def _(folder: Path) -> None:
    snapshot_by_command(folder / "fit/last.ckpt")


@pytest.mark.parametrize("name", WAYS)
def test_no_way_back_is_silent(name: str, folder: Path) -> None:
    refused, attempt = WAYS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not refused:
            attempt(folder)
            return
        with pytest.raises(MuterError) as caught:
            attempt(folder)
    assert "anew under another name" not in str(caught.value)
    assert "--out" not in str(caught.value)


def test_there_are_at_least_fifty_ways() -> None:
    assert len(WAYS) >= 50


# --- ways out ---------------------------------------------------------------------------------------------------------


def test_a_fit_of_the_retained_rows_in_the_same_folder_is_followed_by_requests(folder: Path) -> None:
    """Positions count in the new training set; the old rows stay known by content; the ledger goes on."""
    place = folder / "fit"
    saving = ModelCheckpoint(place, save_last=True, filename="best", enable_version_counter=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Net(), dataset(KEPT), callback(), saving)
    command("unlearn", place / "last.ckpt", dataset(KEPT), forget=[3])  # row 4
    snapshot = Snapshot.load(place / "last.muter.snapshot")
    assert (snapshot.n_total, snapshot.forgotten, len(snapshot.barred)) == (N - 2, [3], 3)
    with Ledger.open(place / "last.muter.ledger") as ledger:
        assert ledger.verify(DigestKey.load(place / "last.muter.key")) == []
        assert list(ledger.forgotten()) == [3]
        assert [r["forgotten"] for r in ledger.receipts() if r["kind"] == "unlearn"] == [GONE, [3]]
    for of in (dataset(KEPT), dataset([i for i in range(N) if i != 4])):
        with pytest.raises(MuterError):
            fit(Net(), of, callback(dirpath=place))


@pytest.mark.parametrize("times", [1, 2])
def test_requests_in_memory_are_saved_as_the_command_line_saves_them(tmp_path: Path, times: int) -> None:
    module, muter = Net(), callback(dirpath=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_all(module, muter)
        for row in range(times):
            muter.unlearn(module, [row])
        path = muter.save()
        assert muter.save() == path  # nothing more to do
        (checkpoint,) = tmp_path.glob("*.muter.ckpt")
        command("unlearn", checkpoint, forget=[9])
        muter.unlearn(module, [11])
        with pytest.raises(MuterError, match="other requests"):
            muter.save()
    assert Snapshot.load(path).forgotten == [*range(times), 9]
    with Ledger.open(Places.of(checkpoint).ledger) as ledger:
        assert ledger.verify(DigestKey.load(Places.of(checkpoint).key)) == []
        assert [r["forgotten"] for r in ledger.receipts()] == [list(range(times)), [9]]


def test_files_are_made_by_save_where_the_fit_wrote_none(tmp_path: Path) -> None:
    module, muter = Net(), callback()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_all(module, muter)
        muter.unlearn(module, [3])
        assert muter.save(tmp_path / "a.muter.snapshot") == tmp_path / "a.muter.snapshot"
        muter.refresh(module)
        muter.save()
        command("unlearn", tmp_path / "a.ckpt", forget=[9])
    assert load_checkpoint(tmp_path / "a.muter.ckpt")["lightning_muter"]["forgotten"] == [3, 9]
    with Ledger.open(tmp_path / "a.muter.ledger") as ledger:
        assert [r["kind"] for r in ledger.receipts()] == ["unlearn", "refresh", "unlearn"]


def test_a_row_of_the_same_content_that_stays_is_not_taken_for_a_forgotten_one() -> None:
    x, y = rows()
    twins = TensorDataset(torch.cat([x, x[3:4]]), torch.cat([y, y[3:4]]))
    module = Plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        snapshot = take_snapshot(module, twins, **OPTIONS)
        unlearn(module, snapshot, [3], twins, progress=False)
        assert recalled(module).located(twins) == [3]
        assert recalled(module).located(dataset([0, 3])) == []
        assert recalled(module).located(dataset([3, 3])) == [1]
        unlearn(module, snapshot, [N], twins, progress=False)  # now it is gone for good
    assert recalled(module).located(dataset([0, 3])) == [1]
