"""The command `muter`: Lightning's own subcommands, and those that honour deletion requests.

Exit codes: 0 done, 1 refused with a reason (everything is as it was), 2 wrong usage. This module imports little, so
that help is quick; torch and Lightning come when a command needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

from lightning_muter import __version__
from lightning_muter.errors import MuterError

DONE, REFUSED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
_LIGHTNING = ("fit", "validate", "test", "predict")
_REQUESTS = ("check", "snapshot", "unlearn", "refresh")
_FILES = ("audit", "purge", "publish")

HELP = """\
usage: muter COMMAND [--config FILE] [options]     (muter COMMAND --help explains each command)

Train with Lightning, then honour deletion requests in seconds instead of retraining.

training, as in any LightningCLI:
  fit, validate, test, predict       add --trainer.callbacks+=lightning_muter.MUterCallback
  check                              in seconds: will a fit end with a snapshot, and how long will
                                     that take?

deletion requests (need the model, the training data and a checkpoint):
  snapshot  --ckpt_path CKPT         store what unlearning needs, for a checkpoint trained by anyone
  unlearn   --ckpt_path CKPT --forget.indices [3,17]
            --ckpt_path CKPT --forget.ids users.txt --forget.table ids.csv
                                     remove rows of the training data; --dry_run tries it
  refresh   --ckpt_path CKPT         a new snapshot of the retained data: nothing of the old weights
                                     stays

files (need neither model nor data):
  audit     --ckpt_path CKPT [--verify]      state of a checkpoint; with --verify also the receipts
            --ckpt_path CKPT --expect HEAD   is a head that was printed earlier in the history?
  purge     --ckpt_path CKPT [--yes]         list (delete) what still holds removed influence
  publish   --ckpt_path CKPT --out FILE      weights with noise, hardly told from retraining

example:
  muter snapshot --config config.yaml --ckpt_path last.ckpt
  muter unlearn  --config config.yaml --ckpt_path last.ckpt --forget.indices [3,17]
  muter audit    --ckpt_path last.ckpt --verify

Files beside last.ckpt: last.muter.ckpt (the checkpoint that requests change), last.muter.snapshot,
last.muter.ledger, last.muter.receipts/, last.muter.pub (give it to auditors), last.muter.key (mode
0600; keep a copy elsewhere: without it samples cannot be recognised).
exit codes: 0 done, 1 refused with a reason (nothing was changed unless it says so), 2 wrong usage
environment: MUTER_TRACEBACK=1 shows the Python traceback of a refusal too; MUTER_WITNESS names a
command that is told every new head of the ledger (in place of {head}, and on its standard input)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. With `argv` given the process's own arguments are not read."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        sys.stderr.write(HELP)
        return USAGE
    command = arguments[0]
    if command in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return DONE
    if command == "--version":
        print(f"lightning-muter {__version__}")
        return DONE
    known = (*_LIGHTNING, *_REQUESTS, *_FILES)
    if command not in known and not command.startswith("-"):
        sys.stderr.write(f"muter: unknown command {command!r}; commands: {', '.join(known)}\n")
        return USAGE
    if command in _LIGHTNING:
        return _run_lightning(arguments)  # the users' own training: their tracebacks are theirs to see
    try:
        with _sigterm_stops():
            return _run_files(command, arguments[1:]) if command in _FILES else _run_lightning(arguments)
    except SystemExit as stop:
        if stop.code == TERMINATED:
            _say_refused(command, "stopped by SIGTERM. What the ledger had not taken in was undone")
        return stop.code if isinstance(stop.code, int) else USAGE if stop.code else DONE
    except KeyboardInterrupt:
        _say_refused(command, "interrupted. What the ledger had not taken in was undone")
        return INTERRUPTED
    except MuterError as error:
        _say_refused(command, str(error))
    except MemoryError as error:
        _say_refused(command, f"out of memory ({error or 'no details'}). {_LESS_MEMORY}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _say_refused(command, f"{place}{error.strerror or error}. The checkpoint and its files are as they were")
    except Exception as error:
        if _is_out_of_memory(error):
            _say_refused(command, f"out of memory ({_short(error)}). {_LESS_MEMORY}")
        else:
            _say_refused(
                command,
                f"{type(error).__name__}: {_short(error)}. This was not foreseen, or comes from the model's or the "
                "data's own code; the checkpoint and its files are as they were. MUTER_TRACEBACK=1 shows where",
            )
    return REFUSED


_LESS_MEMORY = (
    "Nothing was changed. Use a smaller --batch_size, solver=cg (no dense matrix), or a machine with more memory"
)


def _run_lightning(arguments: list[str]) -> int:
    from lightning_muter.deletion.command_line import run

    return run(arguments)


def _run_files(command: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"muter {command}", description=textwrap.fill(_FILE_HELP[command], 100), epilog=_FILE_EXAMPLES[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--ckpt_path", required=True, help="the checkpoint, <name>.ckpt or <name>.muter.ckpt")
    if command == "audit":
        parser.add_argument(
            "--verify", action="store_true", help="check the chain of receipts, signatures and files too"
        )
        parser.add_argument(
            "--expect", metavar="HEAD",
            help="a head that an earlier audit printed; exit code 1 unless it is this ledger's head or in its history",
        )  # fmt: skip
        parser.add_argument(
            "--public_key", metavar="FILE", help="your own copy of <name>.muter.pub, for the one here may be replaced"
        )
    elif command == "publish":
        parser.add_argument("--out", required=True, help="where the weights with noise are written (a new file)")
        parser.add_argument("--eps", type=float, default=1.0, help="of this release (default: 1)")
        parser.add_argument("--delta", type=float, default=1e-5, help="of this release (default: 1e-5)")
        parser.add_argument(
            "--limit", type=float, default=None, help="refuse where all releases together exceed this eps"
        )
        parser.add_argument("--small", type=int, default=20, help="warn below so many rows since the last release")
        parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for another process")
    else:
        parser.add_argument("--yes", action="store_true", help="delete what is listed (otherwise only list it)")
        parser.add_argument(
            "--root", action="append", default=[], metavar="DIR",
            help="look below this folder too (may be repeated)",
        )  # fmt: skip
        parser.add_argument(
            "--also", action="append", default=[], metavar="PATTERN",
            help="files of your own that hold forgotten samples, e.g. cached adversarial examples: 'cache/*.pt'",
        )  # fmt: skip
        parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for another process")
    options = parser.parse_args(arguments)
    if command == "audit":
        from lightning_muter.deletion.audit import audit_command

        return audit_command(
            options.ckpt_path, verify=options.verify, expect=options.expect, public_key=options.public_key
        )
    if command == "publish":
        from lightning_muter.deletion.publish import publish_command

        return publish_command(
            options.ckpt_path, options.out, eps=options.eps, delta=options.delta, limit=options.limit, small=options.small,
            wait=options.wait,
        )  # fmt: skip
    from lightning_muter.deletion.purge import purge_command

    return purge_command(options.ckpt_path, yes=options.yes, roots=options.root, also=options.also, wait=options.wait)


_FILE_HELP = {
    "audit": "Say in what state a checkpoint is: whether snapshot and ledger match it, what was forgotten, how near to "
    "a minimum it was left, and whether something still holds removed influence. Exit code 1 if anything is wrong.",
    "publish": "Write a copy of the weights with Gaussian noise, such that they can hardly be told from a retrained model's with "
    "the same noise. The last request must have been made with --within. Checkpoint, snapshot and receipts stay private; the "
    "ledger adds up what all releases are worth together.",
    "purge": "Find what still holds the influence of forgotten samples: older checkpoints, optimiser states, earlier "
    "snapshots, leftovers of interrupted writes. Files are unlinked; backups are not reached.",
}

_FILE_EXAMPLES = {
    "audit": """\
examples:
  muter audit --ckpt_path last.ckpt
  muter audit --ckpt_path last.ckpt --verify
  muter audit --ckpt_path last.ckpt --verify --public_key my_copy.pub""",
    "publish": """\
examples:
  muter publish --ckpt_path last.ckpt --out shown.ckpt
  muter publish --ckpt_path last.ckpt --out shown.ckpt --eps 0.5 --delta 1e-6
  muter publish --ckpt_path last.ckpt --out shown.ckpt --limit 3""",
    "purge": """\
examples:
  muter purge --ckpt_path last.ckpt
  muter purge --ckpt_path last.ckpt --root ../backups --also 'cache/*.pt'
  muter purge --ckpt_path last.ckpt --yes""",
}


@contextlib.contextmanager
def _sigterm_stops() -> Iterator[None]:
    """While a request runs, SIGTERM unwinds it like an interrupt, so that it is undone at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: leave signals alone
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _say_refused(command: str, reason: str) -> None:
    if os.environ.get("MUTER_TRACEBACK") == "1":
        traceback.print_exc()
    sys.stderr.write(f"muter {command}: refused: {reason.rstrip('.')}.\n")


def _is_out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


if __name__ == "__main__":
    sys.exit(main())
