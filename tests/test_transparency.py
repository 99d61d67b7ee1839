"""What a stranger can check: signatures without the key, heads, copies that cannot be written to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lightning_muter import cli
from lightning_muter.deletion.witness import tell_witness
from lightning_muter.storage.fingerprint import DigestKey
from tests.commands import fixed, unlearn

README = Path(__file__).parents[1] / "examples/deletion_requests/README.md"


def audit(*arguments):
    return cli.main(["audit", "--ckpt_path", "last.ckpt", *arguments])


def head(capsys):
    capsys.readouterr()
    assert audit() == 0
    (found,) = re.findall(r"^head ([0-9a-f]{64})$", capsys.readouterr().out, re.MULTILINE)
    return found


def run_verifier(tmp_path, *arguments):
    """The README's own program, in an interpreter that cannot find this package."""
    program = re.search(r"<!-- verify.py -->\n```python\n(.+?)```", README.read_text(), re.DOTALL)[1]
    (tmp_path / "verify.py").write_text(program)
    command = [sys.executable, "-I", str(tmp_path / "verify.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)


def test_ten_lines_without_this_package_verify_the_receipts(folder, tmp_path, capsys):
    assert unlearn("--forget.indices", "[5]", "--request_id", "t") == 0
    now = head(capsys)
    receipts, public = str(folder / "last.muter.receipts"), str(folder / "last.muter.pub")
    done = run_verifier(tmp_path, receipts, public)
    assert done.stdout == f"head {now}\n", done.stderr
    path = Path("last.muter.receipts/000002-t.json")
    original = path.read_text()
    path.write_text(original.replace('"n_retained": 119', '"n_retained": 120'))
    assert "AssertionError" in run_verifier(tmp_path, receipts, public).stderr
    path.write_text(re.sub(r'("signature": ")..', r"\g<1>00", original))
    assert "InvalidSignature" in run_verifier(tmp_path, receipts, public).stderr
    path.write_text(original)
    Path("other.pub").write_bytes(DigestKey(bytes(32)).public_key.pem())
    assert run_verifier(tmp_path, receipts, str(folder / "other.pub")).returncode == 1
    assert audit("--verify", "--public_key", "other.pub") == 0  # the key is here, and it knows its own signatures
    Path("last.muter.key").unlink()
    assert audit("--verify", "--public_key", "other.pub") == 1
    assert "not one of the public keys" in capsys.readouterr().out


def test_a_copy_without_the_key_is_audited_and_not_written_to(folder, tmp_path, capsys):
    assert unlearn("--forget.indices", "[5]") == 0
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.key", "*.lock"))
    os.chdir(tmp_path / "copy")
    before = fixed(tmp_path / "copy")
    capsys.readouterr()
    assert audit("--verify") == 0
    out = capsys.readouterr().out
    assert "2 receipts: chain, signatures and files checked" in out
    assert "the key is not here" in out
    assert fixed(tmp_path / "copy") == before
    Path("last.muter.pub").unlink()
    assert audit("--verify") == 0
    assert "whose they are is not known" in capsys.readouterr().out


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_audits_what_he_cannot_write_to(folder, capfd):
    with tempfile.TemporaryDirectory() as there:  # pytest's own folders are closed to others
        shutil.copytree(folder, there, dirs_exist_ok=True)
        Path(there).chmod(0o755)
        os.chdir(there)
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.setgid(65534)
                os.setuid(65534)
                code = audit("--verify")
            finally:
                sys.stdout.flush()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, capfd.readouterr()
        os.chdir(folder)


def test_a_head_seen_once_stays_in_the_history_or_the_audit_fails(folder, tmp_path, capsys):
    first = head(capsys)
    shutil.copytree(folder, tmp_path / "old")
    assert unlearn("--forget.indices", "[5]") == 0
    second = head(capsys)
    assert audit("--expect", first) == audit("--expect", second) == 0
    assert audit("--expect", "0" * 64) == 1
    assert audit("--expect", "last") == 1
    Path("last.muter.key").unlink()
    assert audit("--expect", first) == audit("--expect", second.upper()) == 0
    os.chdir(tmp_path / "old")  # the whole folder rolled back: sound in itself
    assert audit("--verify") == audit("--expect", first) == 0
    assert audit("--expect", second) == 1
    assert "rolled back or forked" in capsys.readouterr().out
    Path("last.muter.ledger").unlink()
    assert audit("--expect", first) == audit() == 1


def test_a_witness_is_told_every_head_and_its_failure_undoes_nothing(folder, capsys, monkeypatch):
    monkeypatch.setenv("MUTER_WITNESS", f'{sys.executable} -c \'open("{{head}}", "w").write(input())\'')
    assert unlearn("--forget.indices", "[5]") == 0
    told = head(capsys)
    assert Path(told).read_text() == told
    monkeypatch.setenv("MUTER_WITNESS", f"{sys.executable} -c 'exit(3)'")
    assert unlearn("--forget.indices", "[6]") == 0
    assert "the witness refused (exit code 3" in capsys.readouterr().out
    assert audit("--verify") == 0
    for command in ("/no/such/program", "'unfinished"):
        monkeypatch.setenv("MUTER_WITNESS", command)
        assert "could not be told" in tell_witness(told)
    monkeypatch.delenv("MUTER_WITNESS")
    assert tell_witness(told) is None
