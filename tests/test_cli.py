"""The command `muter` on somebody else's training code: requests, refusals, exit codes, evidence."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_muter import cli
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.callback import MUterCallback
from lightning_muter.deletion.checkpoints import load_checkpoint
from lightning_muter.deletion.command_line import LIGHTNING_READS_CLASSES
from lightning_muter.deletion.files import Places
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.deletion.transactions import exclusive
from lightning_muter.errors import RequestError
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.storage.fingerprint import DigestKey
from tests.commands import CONFIG, SOURCE, environment, fixed, muter, unlearn, weights

from .faults import listing
from .userproject import UserData, UserNet

# --- doing ------------------------------------------------------------------------------------------------------------


def test_a_request_leaves_an_ordinary_checkpoint_and_a_verified_chain(folder, capsys):
    before = weights()
    assert unlearn("--forget.indices", "[3,17]", "--request_id", "ticket-1") == 0
    out = capsys.readouterr().out
    assert "forgotten: 2 rows; 118 are retained" in out
    after = load_checkpoint("last.muter.ckpt")
    assert "optimizer_states" not in after
    assert not torch.equal(after["state_dict"]["layer.weight"], before["layer.weight"])
    spec = importlib.util.spec_from_file_location("userproject_alone", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded = module.UserNet.load_from_checkpoint("last.muter.ckpt", weights_only=True)
    assert torch.equal(loaded.layer.weight, after["state_dict"]["layer.weight"])
    assert sorted(Snapshot.load("last.muter.snapshot").forgotten) == [3, 17]
    receipt = json.loads(Path("last.muter.receipts/000002-ticket-1.json").read_text())
    assert receipt["forgotten"] == [3, 17]
    assert receipt["n_retained"] == 118
    assert Path("last.muter.receipts/000002-ticket-1.md").read_text().startswith("# Receipt 2: unlearn")
    assert muter("audit", "--verify") == 0
    out = capsys.readouterr().out
    assert "120 trained on, 2 forgotten" in out
    assert "2 receipts: chain, signatures and files checked" in out
    assert "muter refresh" in out
    assert cli.main(["test", "--config", "config.yaml", "--ckpt_path", "last.muter.ckpt"]) == 0
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_bars_are_drawn_where_the_trainer_has_bars_and_somebody_watches(folder, capsys, monkeypatch, wanted):
    request = ["--forget.indices", "[3]", "--refine", "1", "--dry_run", "true", "--trainer.enable_progress_bar", wanted]
    assert unlearn(*request) == 0
    assert "samples" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert unlearn(*request) == 0
    assert ("samples" in capsys.readouterr().err) == (wanted == "true")


def test_users_are_forgotten_by_table_or_datamodule_and_leave_no_trace_but_a_keyed_hash(folder, capsys):
    Path("ids.csv").write_text("id,who\n" + "".join(f"{i},person{i // 3}\n" for i in range(120)))
    Path("users.txt").write_text("person1\nperson5\n")
    request = ["--forget.ids", "users.txt", "--forget.table", "ids.csv", "--forget.column", "who"]
    assert unlearn(*request, "--dry_run", "true") == 0
    out = capsys.readouterr().out
    assert "user in line 2: 3 rows: 15, 16, 17\n" in out
    assert "person" not in out
    assert unlearn(*request, "--dry_run", "true", "--forget.show_ids", "true") == 0
    assert "user in line 2 ('person5'): 3 rows" in capsys.readouterr().out
    assert unlearn(*request) == 0
    Path("more.txt").write_text("user20\n")
    assert unlearn("--forget.ids", "more.txt") == 0
    with Ledger.open(Path("last.muter.ledger")) as ledger:
        assert set(ledger.forgotten()) == {3, 4, 5, 15, 16, 17, 80, 81, 82, 83}
        first = ledger.receipts()[1]
    key = DigestKey.load("last.muter.key")
    assert first["users"] == sorted(map(key.digest_id, ("person1", "person5")))
    stored = [content for name, content in listing(folder).items() if "muter" in name]
    assert not any(b"person1" in content or b"user20" in content for content in stored)


def test_what_the_callback_left_after_fit_is_unlearned(folder, capsys):
    fit = ["fit", "--config", "config.yaml", "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"]
    callback = ["--trainer.callbacks+=lightning_muter.MUterCallback", "--trainer.callbacks.dirpath", "models"]
    threat = ["--trainer.callbacks.threat_model", "{norm: l2, eps: 0.1, box: null}"]
    assert cli.main([*fit, *callback, *threat]) == 0
    assert Path("config.yaml").read_text() == CONFIG  # Lightning saves its own beside, under another name
    (made,) = Path("models").glob("*.muter.ckpt")
    request = ["unlearn", "--config", "config.yaml", "--ckpt_path", str(made), "--forget.indices", "[3,17]"]
    assert cli.main([*request, "--refine", "1", "--request_id", "t"]) == 0
    assert "bound: " in capsys.readouterr().out
    assert cli.main(["audit", "--ckpt_path", str(made), "--verify"]) == 0
    assert "1 receipt: chain, signatures and files checked" in capsys.readouterr().out
    assert cli.main(["refresh", "--config", "config.yaml", "--ckpt_path", str(made)]) == 0


def test_a_dry_run_computes_and_writes_nothing(folder, capsys):
    before = fixed(folder)
    assert unlearn("--forget.indices", "[3]", "--dry_run", "true") == 0
    assert fixed(folder) == before
    out = capsys.readouterr().out
    assert "nothing was written" in out
    assert "step_norm" in out


def test_the_same_request_again_returns_the_first_receipt(folder, capsys):
    assert unlearn("--forget.indices", "[3,17]", "--request_id", "ticket-1") == 0
    before = fixed(folder)
    assert unlearn("--forget.indices", "[17,3]", "--request_id", "ticket-1") == 0
    assert "carried out before" in capsys.readouterr().out
    assert unlearn("--forget.indices", "[3,17]") == 1
    assert "all of the 2 rows are forgotten already, by 'ticket-1'" in capsys.readouterr().err
    assert unlearn("--forget.indices", "[3,18]") == 1
    assert "Ask for the others alone" in capsys.readouterr().err
    assert unlearn("--forget.indices", "[18]", "--request_id", "ticket-1") == 1
    assert "asked for something else" in capsys.readouterr().err
    assert fixed(folder) == before


def test_out_leaves_the_checkpoint_and_goes_on_under_another_name(folder, capsys):
    assert unlearn("--forget.indices", "[3]", "--request_id", "one") == 0
    before = fixed(folder)
    assert unlearn("--forget.indices", "[5]", "--out", "next.ckpt") == 0
    after = fixed(folder)
    assert {name: after[name] for name in before} == before
    assert sorted(Snapshot.load("next.muter.snapshot").forgotten) == [3, 5]
    assert cli.main(["audit", "--ckpt_path", "next.ckpt", "--verify"]) == 0
    assert "3 receipts" in capsys.readouterr().out
    assert unlearn("--forget.indices", "[6]", "--out", "next.ckpt") == 1
    assert "under this name already" in capsys.readouterr().err
    assert unlearn("--forget.indices", "[500]", "--out", "third.ckpt") == 1
    assert not any(name.startswith("third") for name in listing(folder))


def test_refresh_and_purge_remove_what_remembers(folder, capsys):
    assert unlearn("--forget.indices", "[3,17]") == 0
    shutil.copy("last.muter.ckpt", "after.ckpt")
    assert muter("purge") == 0
    out = capsys.readouterr().out
    assert "delete: last.ckpt" in out
    assert "look at: last.muter.snapshot: its reference point" in out
    assert Path("last.ckpt").exists()
    assert muter("refresh") == 0
    assert sorted(Snapshot.load("last.muter.snapshot").forgotten) == [3, 17]
    Path("cached.pt").write_bytes(b"adversarial examples")
    assert muter("purge", "--yes", "--also", "cached*") == 0
    out = capsys.readouterr().out
    assert not Path("last.ckpt").exists()
    assert not Path("cached.pt").exists()
    assert Path("after.ckpt").exists()
    assert "reference point" not in out
    assert muter("purge") == 0
    assert "nothing found" in capsys.readouterr().out
    assert muter("audit", "--verify") == 0
    assert unlearn("--forget.indices", "[5]") == 0  # and so it goes on
    assert unlearn("--forget.indices", "[17]") == 1


def test_weights_from_before_a_deletion_do_not_come_back(folder, capsys):
    old = Path("last.muter.ckpt").read_bytes()
    assert unlearn("--forget.indices", "[3]") == 0
    Path("last.ckpt").write_bytes(old)
    assert muter("snapshot", "--config", "threat.yaml") == 1
    assert "weights from before request" in capsys.readouterr().err
    Path("last.muter.ckpt").write_bytes(old)
    assert unlearn("--forget.indices", "[5]") == 1
    assert "changed or replaced" in capsys.readouterr().err
    assert muter("audit") == 1


def test_a_fit_resumed_from_an_unlearned_checkpoint_refuses_the_forgotten_rows(folder):
    assert unlearn("--forget.indices", "[3,5]") == 0
    model, data = UserNet(), UserData()
    data.setup("fit")
    callback = MUterCallback(threat_model=ThreatModel("l2", 0.1, None), verbose=False)
    trainer = L.Trainer(max_epochs=9, callbacks=[callback], logger=False, enable_progress_bar=False, accelerator="cpu",
                        enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    with pytest.raises(RequestError, match="2 forgotten rows"):
        trainer.fit(model, DataLoader(data.rows, 40), ckpt_path="last.muter.ckpt")


def test_a_later_fit_keeps_the_list_of_forgotten_rows(folder, capsys):
    assert unlearn("--forget.indices", "[3,17]") == 0
    model = load_checkpoint("last.muter.ckpt")
    model["state_dict"]["layer.bias"] += 0.01  # trained further, on what is retained
    torch.save(model, "last.ckpt")
    assert cli.main(["snapshot", "--config", "config.yaml", "--ckpt_path", "last.ckpt"]) == 0
    assert Snapshot.load("last.muter.snapshot").forgotten == [3, 17]
    assert muter("audit", "--verify") == 0
    assert unlearn("--forget.indices", "[17]") == 1
    assert "forgotten already" in capsys.readouterr().err
    assert unlearn("--forget.indices", "[5]") == 0


# --- refusing ---------------------------------------------------------------------------------------------------------


def no_model(config):
    return config.replace("UserNet", "WideNet")


REFUSALS = {
    "index out of range": (["--forget.indices", "[120]"], None, "positions 0 to 119"),
    "index twice": (["--forget.indices", "[5,5]"], None, "each index once"),
    "everything": (["--forget.indices", str(list(range(120)))], None, ""),
    "nobody": ([], None, "either forget.indices or forget.ids"),
    "unknown user": (["--forget.ids", "strangers.txt"], None, "unknown ids"),
    "another model": (["--forget.indices", "[5]"], no_model, "do not fit WideNet"),
    "data changed": (["--forget.indices", "[7]", "--data.salt", "0.5"], None, ""),
    "NaN in the data": (["--forget.indices", "[9]", "--data.bad", "true"], None, ""),
    "another training set": (["--forget.indices", "[5]", "--data.size", "90"], None, ""),
    "id of a person": (["--forget.indices", "[5]", "--request_id", "John Doe"], None, "not a person's name"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_reason_and_change_nothing(name, folder, capsys):
    arguments, change, message = REFUSALS[name]
    Path("strangers.txt").write_text("nobody\n")
    if change is not None:
        Path("config.yaml").write_text(change(CONFIG))
    before = fixed(folder)
    assert unlearn(*arguments) == 1
    err = capsys.readouterr().err
    assert "muter unlearn: refused: " in err
    assert "Traceback" not in err
    assert message in err
    assert fixed(folder) == before


FILES = {
    "snapshot truncated": ("last.muter.snapshot", lambda b: b[: len(b) // 2], "changed or replaced"),
    "snapshot altered": ("last.muter.snapshot", lambda b: b[:-1] + bytes([b[-1] ^ 1]), ""),
    "checkpoint truncated": ("last.muter.ckpt", lambda b: b[: len(b) // 2], ""),
    "key lost": ("last.muter.key", None, "Restore the key file"),
    "key of somebody else": ("last.muter.key", lambda b: bytes(32), ""),
    "snapshot lost": ("last.muter.snapshot", None, "muter snapshot"),
    "ledger damaged": ("last.muter.ledger", lambda b: b"SQLite format 3\0" + bytes(5000), ""),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_and_lost_files_are_found_by_requests_and_audits(name, folder, capsys):
    path, change, message = FILES[name]
    content = Path(path).read_bytes()
    Path(path).unlink() if change is None else Path(path).write_bytes(change(content))
    before = fixed(folder)
    assert unlearn("--forget.indices", "[5]") == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert fixed(folder) == before
    if name != "key lost":  # an auditor has none
        assert muter("audit", "--verify") == 1
        assert "PROBLEM" in capsys.readouterr().out


def test_an_edited_receipt_is_found(folder, capsys):
    assert unlearn("--forget.indices", "[5]", "--request_id", "t") == 0
    path = Path("last.muter.receipts/000002-t.json")
    path.write_text(path.read_text().replace('"n_retained": 119', '"n_retained": 120'))
    assert muter("audit") == 0
    assert muter("audit", "--verify") == 1
    assert "damaged or edited" in capsys.readouterr().out
    path.unlink()
    assert muter("audit", "--verify") == 1
    assert unlearn("--forget.indices", "[6]") == 0  # writes it anew
    assert muter("audit", "--verify") == 0


@pytest.mark.parametrize(
    ("kind", "message"), [("memory", "out of memory"), ("code", "ZeroDivisionError: in the user's")]
)
def test_failures_inside_of_the_users_code_change_nothing(kind, message, folder, capsys, monkeypatch):
    monkeypatch.setenv("BREAK", kind)
    Path("config.yaml").write_text(CONFIG.replace("UserNet", "BrokenNet"))
    before = fixed(folder)
    assert unlearn("--forget.indices", "[5]") == 1
    assert message in capsys.readouterr().err
    assert fixed(folder) == before


def test_a_full_disk_changes_nothing(folder, capsys, monkeypatch):
    before = fixed(folder)
    real = os.fsync

    def full(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(".muter-stage"):
            raise OSError(28, "No space left on device", name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert unlearn("--forget.indices", "[5]") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert fixed(folder) == before


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_can_be_audited_but_not_changed(folder, capsys):
    os.chmod(folder, 0o555)
    try:
        assert unlearn("--forget.indices", "[5]") == 1
        assert "cannot be written to" in capsys.readouterr().err
        assert muter("audit", "--verify") == 0
    finally:
        os.chmod(folder, 0o755)


def test_two_commands_at_once_never_both_run(folder, capsys):
    before = fixed(folder)
    with exclusive(Places.of("last.ckpt")):
        assert unlearn("--forget.indices", "[5]") == 1
        assert f"another process (pid {os.getpid()})" in capsys.readouterr().err
        assert muter("audit") == 0  # looking is free
    assert fixed(folder) == before
    assert unlearn("--forget.indices", "[5]", "--wait", "1") == 0


def test_a_certificate_is_asked_for_by_yes_no_or_seconds(folder, capsys):
    """As in Python: the same argument goes to the same function."""

    def bound(index: int, *arguments: str) -> float | None:
        assert unlearn("--forget.indices", f"[{index}]", "--request_id", f"row-{index}", *arguments) == 0
        (receipt,) = Path("last.muter.receipts").glob(f"*-row-{index}.json")
        return json.loads(receipt.read_text())["metrics"]["bound"]

    bounds = {value: bound(i, "--certify", value) for i, value in enumerate(("true", "2.5", "60", "false"))}
    assert bounds.pop("false") is None
    assert all(value > 0 for value in bounds.values())
    assert bound(10, "--certify", "false", "--refine", "1") is None
    capsys.readouterr()
    before = fixed(folder)
    assert unlearn("--forget.indices", "[11]", "--certify", "-1") == 1
    assert "True, False or a number of seconds" in capsys.readouterr().err
    assert unlearn("--forget.indices", "[11]", "--certify", "soon") == 2
    assert fixed(folder) == before


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["--help"], 0),
        (["--version"], 0),
        (["forget"], 2),
        (["unlearn"], 2),
        (["unlearn", "--help"], 0),
        (["unlearn", "--config", "none.yaml"], 2),
        (["unlearn", "--config", "config.yaml", "--ckpt_path", "last.ckpt", "--refine", "many"], 2),
        (["audit"], 2),
        (["audit", "--help"], 0),
        (["purge", "--help"], 0),
        (["audit", "--ckpt_path", "weights.pt"], 1),
    ],
)
def test_exit_codes(arguments, code, folder, capsys):
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    if "--help" in arguments:
        assert "--" in out
    if code == 2:
        assert err


def test_help_is_quick_and_the_module_is_the_command(folder):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lightning_muter", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - started < 2
    assert "unlearn" in done.stdout


def test_the_real_command_as_a_process_and_sigterm(folder):
    command = [
        sys.executable,
        "-m",
        "lightning_muter",
        "unlearn",
        "--config",
        "config.yaml",
        "--ckpt_path",
        "last.ckpt",
    ]
    done = subprocess.run(
        [*command, "--forget.indices", "[5]"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "118 are retained" not in done.stdout
    assert "119 are retained" in done.stdout
    slow = Path("userproject.py")
    slow.write_text(slow.read_text().replace("return self.layer(x)", "import time; open('going', 'w'); time.sleep(60)"))
    before = fixed(folder)
    process = subprocess.Popen(
        [*command, "--forget.indices", "[6]"], env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not Path("going").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert "stopped by SIGTERM" in process.stderr.read()
    process.stderr.close()
    Path("going").unlink()
    assert fixed(folder) == before


def test_what_a_checkpoint_names_is_imported_only_when_asked(folder, capsys):
    Path("named.py").write_text("open('imported', 'w').close()\nfrom userproject import UserNet as Named\n")
    checkpoint = load_checkpoint("last.ckpt")
    torch.save({**checkpoint, "hyper_parameters": {"_class_path": "named.Named"}}, "named.ckpt")
    test = ["test", "--config", "config.yaml", "--ckpt_path", "named.ckpt"]
    assert cli.main(test) == 0
    assert not Path("imported").exists()
    if not LIGHTNING_READS_CLASSES:
        return
    assert cli.main([*test, "--model_from_checkpoint", "true"]) == 0
    assert Path("imported").exists()
