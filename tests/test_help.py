"""`muter COMMAND --help`: the command's own options first, three examples whose options exist, what is cut is counted."""

from __future__ import annotations

import re

import pytest

from lightning_muter import cli
from lightning_muter.deletion.help import arranged

OWN = {
    "fit": "--ckpt_path",
    "check": "",  # all that it takes are Lightning's own
    "snapshot": "--scope",
    "unlearn": "--forget.indices",
    "refresh": "--recover_key",
    "audit": "--verify",
    "publish": "--eps",
    "purge": "--also",
}


def _shown(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code = cli.main([*arguments])
    except SystemExit as stop:
        code = stop.code
    assert not code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", OWN)
def test_own_options_come_first_with_three_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = _shown(command, "--help", capsys=capsys)
    assert "Show the help for the given subclass of Accelerator" not in shown
    assert OWN[command] in shown
    lines = re.findall(rf"^  muter ({command} .*)$", shown, re.MULTILINE)
    assert len(lines) == 3
    everything = shown if "--help all" not in shown else _shown(command, "--help", "all", capsys=capsys)
    for option in re.findall(r"--[\w.]+(?=\+?=| |$)", " ".join(lines)):
        known = option.replace("--trainer.callbacks.dirpath", "--trainer.callbacks")
        assert re.search(rf"{re.escape(known)}\b|{re.escape(known.rsplit('.', 1)[0])} ", everything), option
    if everything is not shown:
        hidden = int(re.search(r"(\d+) more lines", shown)[1])  # type: ignore[index]
        assert len(everything.splitlines()) > hidden > 100
        assert shown.index(OWN[command]) < shown.index("examples:")


@pytest.mark.parametrize("command", [[], *([name] for name in OWN)], ids=str)
def test_help_fits_a_hundred_columns(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Command lines to be copied aside."""
    lines = _shown(*command, "--help", capsys=capsys).splitlines()
    assert [line for line in lines if len(line.rstrip()) > 100 and not line.startswith("  muter ")] == []


def test_lists_that_are_cut_say_how_many_more() -> None:
    """As parsers write them: which lists there are depends on Python and on what is installed."""
    names = ", ".join(f"my.loss.L{i}" for i in range(9))
    text = f"usage: muter unlearn\n\nThe request:\n  --loss LOSS  the loss. (type: Loss, known subclasses: {names})"
    shown = arranged("unlearn", text)
    assert "known subclasses: my.loss.L0, my.loss.L1, my.loss.L2, my.loss.L3 and 5 more)" in shown
    assert "my.loss.L4" not in shown
