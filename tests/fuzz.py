"""A fuzzer of everything that reads files from strangers, guided by coverage (atheris, extra `fuzz`).

    python -m tests.fuzz [SECONDS] [PARSER ...]        ten minutes over all parsers by default

Each parser gets its share of the time, from seeds that are sound files. A parser may refuse with an error of this package; any
other exception, and more than 2 GiB of memory, is a finding: the input is left in the folder `fuzz-findings`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 600
FINDINGS = Path("fuzz-findings")


def _container(content: bytes) -> None:
    from lightning_muter.storage.container import parse_container

    parse_container(_rehashed(content), "snapshot")


def _rehashed(content: bytes) -> bytes:
    """The hash and the length made to fit, for else nothing behind them is ever reached."""
    payload = content[64:]
    return (
        content[:16].ljust(16, b"\0")
        + struct.pack("<Q", len(payload))
        + hashlib.sha256(payload).digest()
        + bytes(8)
        + payload
    )


def _receipt(content: bytes) -> None:
    from lightning_muter.deletion import receipts

    try:
        receipt = json.loads(content)
        content = receipts.canonical({**receipt, "sha256": receipts.content_sha256(receipt)})
    except (ValueError, TypeError, RecursionError, AttributeError):
        pass
    receipt = receipts.parse_receipt(content)
    receipts.seal_problem(receipt, None, [])
    receipts.markdown(receipt)
    receipts.receipt_name(receipt)


def _in_file(content: bytes, suffix: str, read: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(content)
        read(path)


def _checkpoint(content: bytes) -> None:
    from lightning_muter.deletion import checkpoints

    _in_file(content, ".ckpt", lambda path: checkpoints.remembers(checkpoints.load_checkpoint(path)))


def _ledger(content: bytes) -> None:
    from lightning_muter.deletion.ledger import Ledger

    def read(path: Path) -> None:
        with Ledger.open(path, readonly=True) as ledger:
            ledger.verify(None)
            ledger.forgotten()

    _in_file(content, ".ledger", read)


def _requests(content: bytes) -> None:
    from lightning_muter.deletion.requests import ForgetConfig, resolve

    ids, _, table = content.partition(b"\0")

    def read(path: Path) -> None:
        path.with_name("ids").write_bytes(ids)
        column = "who" if table.startswith(b"who") else None
        rows = table.rstrip(b"\n").count(b"\n") + (column is None)
        resolve(ForgetConfig(ids=str(path.with_name("ids")), table=str(path), column=column), rows)

    _in_file(table, ".csv", read)


def _public_key(content: bytes) -> None:
    from lightning_muter.storage.signing import read_public_keys

    _in_file(content, ".pub", read_public_keys)


PARSERS: dict[str, Callable[[bytes], None]] = {
    name.__name__[1:]: name for name in (_container, _receipt, _checkpoint, _ledger, _requests, _public_key)
}


CONTENT: dict[str, Any] = {
    "id": "r", "kind": "unlearn", "time": "2030-01-01T00:00:00Z", "method": "MUter", "scope": "head", "forgotten": [3],
    "users": ["ab"], "n_retained": 9, "checkpoint": {"fingerprint_before": "a", "fingerprint_after": "b"}, "snapshot": {},
    "metrics": {"bound": 0.5, "deleted": [{"name": "x"}]}, "warnings": ["a | b"], "versions": {"torch": "2"},
}  # fmt: skip


def seeds(parser: str, folder: Path) -> list[bytes]:
    """Sound files to begin with."""
    from lightning_muter.deletion import receipts
    from lightning_muter.deletion.ledger import Ledger
    from lightning_muter.storage.container import container_bytes
    from lightning_muter.storage.fingerprint import DigestKey

    key = DigestKey(bytes(32))
    if parser == "container":
        meta = {
            "version": 2,
            "record": "Snapshot",
            "fields": {"n_total": 3, "threat_model": {"norm": "l2", "eps": 0.1}},
        }
        return [container_bytes("snapshot", meta, {"a": torch.ones(2, 3), "b": torch.zeros(1, dtype=torch.int64)})]
    if parser == "receipt":
        return [receipts.canonical(receipts.make_receipt(CONTENT, 1, receipts.GENESIS, key))]
    if parser == "checkpoint":
        buffer = io.BytesIO()
        torch.save(
            {"state_dict": {"w": torch.ones(2)}, "hyper_parameters": {"a": [1, {"b": 2.5}]}, "callbacks": {}}, buffer
        )
        return [buffer.getvalue()]
    if parser == "ledger":
        path = folder / "seed.ledger"
        with Ledger.open(path, create=True) as ledger:
            ledger.commit(CONTENT, "asked", [], key)
        return [path.read_bytes()]
    if parser == "requests":
        return [b"ann\0ann,1\nbob,2\n", '\ufeffann\r\0"a\u2028b",x\nann\n'.encode()]
    return [key.public_key.pem()]


def run_one(parser: str, seconds: int, corpus: Path) -> None:
    """Fuzz one parser in this process."""
    try:
        import atheris
    except ImportError:
        sys.exit("The fuzzer needs atheris: pip install 'lightning-muter[fuzz]'")
    with atheris.instrument_imports(include=["lightning_muter.deletion", "lightning_muter.storage"]):
        import lightning_muter.deletion.audit
        import lightning_muter.deletion.requests
        import lightning_muter.storage.signing  # noqa: F401
    from lightning_muter.errors import MuterError

    FINDINGS.mkdir(exist_ok=True)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(parser, corpus.parent)):
        (corpus / f"seed{number}").write_bytes(seed)
    parse = PARSERS[parser]

    def one(data: bytes) -> None:
        with contextlib.suppress(MuterError):
            parse(data)

    limits = [f"-max_total_time={seconds}", "-rss_limit_mb=4096", "-max_len=65536", "-timeout=30"]
    options = [*limits, f"-artifact_prefix={FINDINGS}/{parser}-"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--one"]:
        run_one(arguments[1], int(arguments[2]), Path(arguments[3]))
        return 0
    seconds = int(arguments[0]) if arguments else SECONDS
    parsers = arguments[1:] or list(PARSERS)
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        for parser in parsers:
            corpus = os.path.join(folder, parser, "corpus")
            command = [
                sys.executable,
                "-m",
                "tests.fuzz",
                "--one",
                parser,
                str(max(seconds // len(parsers), 1)),
                corpus,
            ]
            done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
            lines = [
                line for line in done.stderr.splitlines() if "exec/s" in line or "ERROR" in line or "Exception" in line
            ]
            print(
                f"{parser}: {'FINDING' if done.returncode else 'sound'}; {lines[-1] if lines else done.stderr[-2000:]}",
                flush=True,
            )
            if done.returncode:
                bad.append(parser)
                print(done.stderr[-4000:])
    print(f"{len(parsers)} parsers, {len(bad)} with findings {bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
