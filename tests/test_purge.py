"""Purge deletes what provably is an earlier state of this very model, and nothing of any other."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from lightning_muter.deletion import evidence, purge
from lightning_muter.deletion.checkpoints import load_checkpoint
from lightning_muter.deletion.evidence import find
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.ledger_access import open_ledger
from lightning_muter.deletion.transactions import exclusive
from lightning_muter.errors import ArgumentError
from lightning_muter.storage.fingerprint import DigestKey

from .world import Net, command, plain_checkpoint, unlearned


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rows 3 and 7 forgotten from last; before.* are its files from before; a fork `next` forgot 9 as well."""
    folder = tmp_path_factory.mktemp("purge")
    places = unlearned(folder, [])
    (folder / "kept").mkdir()
    for path in (places.checkpoint, places.snapshot, places.key, places.ledger):
        shutil.copy(path, folder / "kept")
    command("unlearn", folder / "last.ckpt", forget=[3, 7], request_id="ticket")
    command("unlearn", folder / "last.ckpt", forget=[9], out=str(folder / "next.ckpt"))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


def findings(folder: Path, name: str = "last.ckpt", **options) -> dict[str, evidence.Finding]:
    places = Places.of(folder / name)
    with exclusive(places), open_ledger(places) as ledger:
        return {os.path.relpath(f.path, folder): f for f in find(places, ledger, **options)}


def deletable(folder: Path, name: str = "last.ckpt", **options) -> set[str]:
    return {path for path, finding in findings(folder, name, **options).items() if finding.delete}


def remove(folder: Path, name: str) -> None:
    for path in folder.glob(f"{name}.muter.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_what_is_proved_goes_and_current_files_of_others_stay(folder):
    """In one folder: the original checkpoint, a whole copy from before, a fork; each purged for itself."""
    assert deletable(folder) == {"last.ckpt"}
    assert "current file of last" in findings(folder)["kept/last.muter.ckpt"].reason
    (folder / "kept/last.muter.ledger").unlink()
    (folder / "kept/last.muter.snapshot").rename(folder / "kept/alone.muter.snapshot")
    assert deletable(folder) == {"last.ckpt", "kept/last.muter.ckpt", "kept/alone.muter.snapshot"}
    # from the fork's side all of the original's is somebody's
    fork = findings(folder, "next.ckpt")
    assert {name for name, finding in fork.items() if finding.delete} == {
        "kept/last.muter.ckpt", "kept/alone.muter.snapshot"
    }  # fmt: skip
    assert not fork["last.muter.ckpt"].delete
    assert not fork["last.ckpt"].delete


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model of the same form, of which row 5 was forgotten."""
    folder = tmp_path_factory.mktemp("other")
    plain_checkpoint(folder / "other.ckpt", shift=0.3)
    command("snapshot", folder / "other.ckpt")
    shutil.copytree(folder, folder / "before")
    command("unlearn", folder / "other.ckpt", forget=[5])
    return folder


@pytest.mark.parametrize("age", [-1, 1])
@pytest.mark.parametrize("kind", ["plain", "snapshot", "unlearned", "no ledger", "subfolder"])
def test_other_models_of_the_same_form_are_never_deleted(folder, other, kind, age):
    place = folder / "sub" if kind == "subfolder" else folder
    place.mkdir(exist_ok=True)
    for path in (other / "before" if kind == "snapshot" else other).glob("other.*"):
        if path.is_file() and (kind != "plain" or path.name == "other.ckpt"):
            shutil.copy(path, place)
    if kind == "no ledger":
        (place / "other.muter.ledger").unlink()
    for path in place.glob("other.*"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + age * 10_000))
    assert deletable(folder) == {"last.ckpt"}


def test_links_are_resolved_and_go_with_what_they_lead_to(folder, capsys):
    (folder / "weights").mkdir()
    (folder / "last.ckpt").rename(folder / "weights/epoch3.ckpt")
    (folder / "last.ckpt").symlink_to("weights/epoch3.ckpt")
    os.link(folder / "weights/epoch3.ckpt", folder / "hard.bin")
    (folder / "mine.ckpt").symlink_to("last.muter.ckpt")
    (folder / "gone.ckpt").symlink_to("nowhere.ckpt")
    assert purge.purge_command(str(folder / "last.ckpt"), yes=True) == 0
    assert "1 more names (hard links)" in capsys.readouterr().out
    assert not (folder / "weights/epoch3.ckpt").exists()
    assert not (folder / "last.ckpt").is_symlink()
    assert (folder / "last.muter.ckpt").exists()
    assert "hard.bin" in findings(folder)
    # a link whose name is a current file of another model protects what it leads to
    remove(folder, "next")
    old = folder / "kept/last.muter.ckpt"
    (folder / "kept/last.muter.snapshot").rename(folder / "next.muter.snapshot")
    (folder / "kept/last.muter.ledger").unlink()
    (folder / "next.muter.ckpt").symlink_to(old)
    assert deletable(folder) == set()


def test_a_checkpoint_of_the_users_run_is_proved_by_the_key_it_names(folder):
    """What a callback wrote into every checkpoint of a run: whose it is, and who was forgotten by then."""
    key = DigestKey.load(folder / "last.muter.key").key_id
    weights = load_checkpoint(folder / "last.ckpt")["state_dict"]
    for name, listed in {"early": [], "other": []}.items():
        state = {"n_total": 24, "forgotten": listed, "key_id": key if name == "early" else "0" * 16}
        moved = {n: t + 0.01 for n, t in weights.items()}
        torch.save({"state_dict": moved, "callbacks": {"MUterCallback": state}}, folder / f"{name}.ckpt")
    found = findings(folder)
    assert found["early.ckpt"].delete
    assert not found["other.ckpt"].delete
    entry = load_checkpoint(folder / "last.muter.ckpt")["lightning_muter"]
    torch.save({"state_dict": moved, "callbacks": {"MUterCallback": entry}}, folder / "later.ckpt")
    assert not findings(folder)["later.ckpt"].delete


def test_what_proves_nothing_is_named_and_left(folder):
    for name in ("weights.pt", "model.safetensors", "last.muter.ckpt.bak", "broken.ckpt"):
        (folder / name).write_bytes(b"anything")
    (folder / "dist.ckpt").mkdir()
    (folder / "dist.ckpt/0.distcp").write_bytes(b"shard")
    (folder / "elsewhere.ckpt").symlink_to(folder / "dist.ckpt")
    plain_checkpoint(folder / "stranger.ckpt", shift=0.2)
    torch.save({"state_dict": {"other": torch.ones(3)}}, folder / "small.ckpt")
    found = findings(folder)
    for name in ("weights.pt", "model.safetensors", "last.muter.ckpt.bak", "broken.ckpt", "dist.ckpt", "stranger.ckpt"):
        assert not found[name].delete, name
    assert "small.ckpt" not in found
    assert deletable(folder) == {"last.ckpt"}


def test_named_files_go_but_never_a_current_one(folder):
    (folder / "cache.npy").write_bytes(b"adversarial examples")
    assert "cache.npy" in deletable(folder, also=[str(folder / "cache*")])
    for name in ("last.muter.ckpt", "last.muter.key", "next.muter.snapshot", "*.muter.ledger"):
        with pytest.raises(ArgumentError, match="current file"):
            findings(folder, also=[str(folder / name)])


def test_the_intent_is_entered_before_and_the_outcome_after(folder, monkeypatch):
    real = Path.unlink

    def stopped(path, **kwargs):
        if path.name == "last.ckpt":
            with Ledger.open(folder / "last.muter.ledger") as ledger:
                last = ledger.last()
            assert [entry["name"] for entry in last["metrics"]["intended"]] == ["last.ckpt"]
            raise KeyboardInterrupt
        real(path, **kwargs)

    monkeypatch.setattr(Path, "unlink", stopped)
    with pytest.raises(KeyboardInterrupt):
        purge.purge_command(str(folder / "last.ckpt"), yes=True)
    monkeypatch.undo()
    (folder / "last.ckpt").unlink()  # as if it had died just after
    assert purge.purge_command(str(folder / "last.ckpt"), yes=True) == 0
    with Ledger.open(folder / "last.muter.ledger") as ledger:
        intent, outcome = ledger.receipts()[-2:]
    assert outcome["metrics"]["intent"] == intent["number"]
    assert outcome["metrics"]["deleted"] == intent["metrics"]["intended"]
    assert purge.purge_command(str(folder / "last.ckpt"), yes=True) == 0
    with Ledger.open(folder / "last.muter.ledger") as ledger:
        assert ledger.last() == outcome  # closed once


def test_secrets_of_killed_writes_are_cleared_away(folder):
    leftovers = [f".last.muter.{ending}.0123456789abcdef.muter-tmp" for ending in ("key", "ledger")]
    for name in leftovers:
        (folder / name).write_bytes(b"k" * 32)
    strange = folder / ".other.muter.key.0123456789abcdef.muter-tmp"
    strange.write_bytes(b"k" * 32)
    found = findings(folder)
    assert not any((folder / name).exists() for name in leftovers)  # by the next command, whichever it is
    assert not found[strange.name].delete
    os.utime(strange, (0, 0))
    assert strange.name in deletable(folder)


@pytest.mark.parametrize("state", ["empty", "header", "no tables", "empty tables"])
def test_a_death_while_the_first_ledger_is_made_does_not_brick_the_name(tmp_path, state):
    plain_checkpoint(tmp_path / "last.ckpt")
    path = tmp_path / "last.muter.ledger"
    if state == "empty":
        path.write_bytes(b"")
    elif state == "empty tables":
        with Ledger.open(path, create=True):
            pass
    else:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        if state == "no tables":
            connection.execute("CREATE TABLE a (b)")
            connection.execute("DROP TABLE a")
        connection.close()
    command("snapshot", tmp_path / "last.ckpt", model=Net())
    command("unlearn", tmp_path / "last.ckpt", forget=[3])
    with Ledger.open(path) as ledger:
        assert [receipt["kind"] for receipt in ledger.receipts()] == ["snapshot", "unlearn"]


def test_a_ledger_of_somebody_else_is_not_taken_for_a_half_made_one(tmp_path):
    path = tmp_path / "a.ledger"
    for content in (b"not a database" * 100, b"SQLite format 3\0" + bytes(5000)):
        path.write_bytes(content)
        assert not Ledger.unborn(path)
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (a)")
    connection.close()
    assert not Ledger.unborn(path)
    assert not Ledger.discard_unborn(tmp_path / "none.ledger")
