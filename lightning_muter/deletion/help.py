"""What `muter COMMAND --help` prints: the command's own options and examples first, Lightning's when asked for."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

_LIGHTNINGS = ("trainer", "model", "data", "optimizer", "lr_scheduler")
_SHOWN = 4  # names of a list of known subclasses
_WITH = "--config config.yaml --ckpt_path last.ckpt"

EXAMPLES = {
    "fit": (
        "fit --config config.yaml",
        "fit --config config.yaml --trainer.max_epochs 20",
        "fit --config config.yaml --trainer.callbacks+=lightning_muter.MUterCallback --trainer.callbacks.dirpath run",
    ),
    "validate": (
        f"validate {_WITH}",
        "validate --config config.yaml --ckpt_path last.muter.ckpt",
        f"validate {_WITH} --trainer.devices 1",
    ),
    "test": (
        f"test {_WITH}",
        "test --config config.yaml --ckpt_path last.muter.ckpt",
        f"test {_WITH} --trainer.devices 1",
    ),
    "predict": (
        f"predict {_WITH}",
        "predict --config config.yaml --ckpt_path last.muter.ckpt",
        f"predict {_WITH} --trainer.devices 1",
    ),
    "check": (
        "check --config config.yaml",
        "check --config config.yaml --trainer.precision bf16-mixed",
        "check --config config.yaml --trainer.max_epochs 20",
    ),
    "snapshot": (
        f"snapshot {_WITH} --threat_model.norm l2 --threat_model.eps 0.3",
        f"snapshot {_WITH} --config threat.yaml",
        f"snapshot {_WITH} --config threat.yaml --scope all",
    ),
    "unlearn": (
        f"unlearn {_WITH} --forget.indices '[3,17]' --dry_run true",
        f"unlearn {_WITH} --forget.indices '[3,17]' --refine 2",
        f"unlearn {_WITH} --forget.ids users.txt --forget.table ids.csv",
    ),
    "refresh": (
        f"refresh {_WITH}",
        f"refresh {_WITH} --wait 60",
        f"refresh {_WITH} --recover_key true",
    ),
}


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(argument in ("-h", "--help") for argument in arguments)


def arranged(command: str, text: str) -> str:
    """The help of a parser (its groups parted by empty lines) with the command's own groups first.

    Of Lightning's options only the number of lines is said, and how to see them.
    """
    groups = [_cut(_wrapped(group)) for group in re.split(r"\n\n(?=\S)", text.strip())]
    own: list[str] = []
    general: list[str] = []
    others: list[str] = []
    for group in groups:
        roots = set(re.findall(r"^  (?:-\w.*, )?--(\w+)", group, re.MULTILINE))
        if group.startswith("usage:") or not roots:  # a description without options is a group's heading again
            continue
        (others if roots & set(_LIGHTNINGS) else general if roots & {"help", "config"} else own).append(group)
    hidden = sum(group.count("\n") + 2 for group in others)
    examples = "\n".join(f"  muter {line}" for line in EXAMPLES[command])
    parts = [
        f"usage: muter {command} [--config FILE] [options]",
        *own,
        f"examples:\n{examples}",
        *general,
        f"Options of {', '.join(_LIGHTNINGS)} are Lightning's:\n{hidden} more lines, by `muter {command} --help all`.",
    ]
    return "\n\n".join(parts) + "\n"


def _wrapped(group: str) -> str:
    """A group whose heading is the first sentence of a method: on a terminal's lines."""
    heading, _, rest = group.partition("\n")
    return "\n".join([textwrap.fill(heading, 98), *([rest] if rest else [])])


def _cut(text: str) -> str:
    """Long lists of known subclasses say how many more there are."""

    def shorter(found: re.Match[str]) -> str:
        names = list(re.finditer(r"[\w.]+", found[1]))
        if len(names) <= _SHOWN + 1:
            return found[0]
        return f"known subclasses:{found[1][: names[_SHOWN - 1].end()]} and {len(names) - _SHOWN} more)"

    return re.sub(r"known subclasses:((?:\s+[\w.]+,?)+)\)", shorter, text)
