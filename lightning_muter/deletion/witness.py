"""Telling a witness of every new head, so that a ledger cannot be rolled back behind its back.

The environment variable MUTER_WITNESS holds a command, split as a shell would but not run by one. It gets the head as a line on
its standard input and in place of `{head}`; what it does with it (a git tag elsewhere, an RFC 3161 time stamp, an entry in a
transparency log) is its own affair. It runs after the request is in force, so that its failure undoes nothing: it is said.
"""

from __future__ import annotations

import os
import shlex
import subprocess

VARIABLE = "MUTER_WITNESS"
_SECONDS = 60.0


def tell_witness(head: str) -> str | None:
    """Run the witness's command, if there is one; returns what went wrong."""
    command = os.environ.get(VARIABLE, "").strip()
    if not command:
        return None
    again = f"the request is in force; hand it over later: head {head}"
    try:
        words = [word.replace("{head}", head) for word in shlex.split(command)]
        done = subprocess.run(words, input=f"{head}\n", text=True, capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{VARIABLE}: the witness could not be told ({error}); {again}"
    if done.returncode:
        said = " ".join(done.stderr.split())[:200]
        return f"{VARIABLE}: the witness refused (exit code {done.returncode}: {said}); {again}"
    return None
