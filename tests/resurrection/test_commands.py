"""Ways back through the command line: refused, or honoured without the forgotten rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset, TensorDataset

from lightning_muter import (
    Snapshot,
)
from lightning_muter.errors import MuterError
from tests.world import command, dataset, rows

from .ways import (
    HONOURED,
    KEPT,
    PERMUTED,
    REFUSED,
    Ways,
    lost,
    once_more,
    put_back,
    snapshot_by_command,
    without_forgotten,
)

WAYS = Ways()
way = WAYS.way


def cli(name: str, ending: str, change: Callable[[Path], object] = lambda f: None, **options: Any) -> None:
    """`muter snapshot` of a checkpoint in cli/ (current, or original), after something was changed there."""

    def run(folder: Path) -> None:
        change(folder)
        path = folder / "cli" / options.get("named", "last.ckpt" if options.get("original") else "last.muter.ckpt")
        (folder / "other").mkdir()
        out = options.get("out")
        rest = {k: v for k, v in options.items() if k not in ("original", "named", "out", "of")}
        snapshot_by_command(path, options.get("of"), out=None if out is None else folder / out, **rest)

    WAYS[f"snapshot: {name}"] = (ending, run)


cli("of the unlearned checkpoint", HONOURED)
cli("of the unlearned checkpoint under another name", HONOURED, out="cli/n.ckpt")
cli("of the unlearned checkpoint in another folder", HONOURED, out="other/n.ckpt")
cli("of the original", REFUSED, original=True)
cli("of the original under another name", REFUSED, original=True, out="cli/n.ckpt")
cli("of the original in another folder", REFUSED, original=True, out="other/n.ckpt")
cli("of the original in another folder, every scope", REFUSED, original=True, out="other/n.ckpt", scope="all")
cli(
    "of a copy of the original under another name",
    REFUSED,
    lambda f: shutil.copy(f / "cli/last.ckpt", f / "cli/b.ckpt"),
    named="b.ckpt",
)
cli(
    "of a copy of the original in a folder below",
    REFUSED,
    lambda f: ((f / "cli/s").mkdir(), shutil.copy(f / "cli/last.ckpt", f / "cli/s/b.ckpt")),
    named="s/b.ckpt",
)
cli("of a link to the original", REFUSED, lambda f: (f / "cli/l.ckpt").symlink_to(f / "cli/last.ckpt"), named="l.ckpt")
cli(
    "of a link elsewhere to the original",
    REFUSED,
    lambda f: (f / "l.ckpt").symlink_to(f / "cli/last.ckpt"),
    named="../l.ckpt",
)
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


@pytest.mark.parametrize("name", WAYS)
def test_no_way_back_is_silent(name: str, folder: Path) -> None:
    WAYS.attempt(name, folder)
