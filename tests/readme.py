"""What the tests of README and of the documentation share: code blocks of a page, and a folder with a small `my.py`."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
#: Lightning says so where no logger is installed.
NO_LOGGER = pytest.mark.filterwarnings("ignore:Starting from v1.9")
_BLOCK = re.compile(r"(?:<!-- ([\w.-]+) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: the name in the comment above it (if any), its language, its text."""

    name: str
    language: str
    text: str

    def lines(self) -> list[str]:
        """Commands, one a line; continued lines are put together, comments left out."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line for line in joined if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    return [Block(*(part or "" for part in found)) for found in _BLOCK.findall(page.read_text())]


def words(line: str) -> list[str]:
    """A command line as its arguments, without the comment at its end."""
    return shlex.split(line, comments=True)


@contextmanager
def at_work(folder: Path, size: int | None) -> Iterator[Path]:
    """The current folder is a copy of the short examples; `size`: rows of `my.Digits` where not told otherwise."""
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".yaml", ".sh"):
            shutil.copy(path, folder)
    if size is not None:
        text = (folder / "my.py").read_text()
        assert "size: int = 600" in text
        (folder / "my.py").write_text(text.replace("size: int = 600", f"size: int = {size}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        sys.modules.pop("my", None)
        try:
            yield folder
        finally:
            sys.modules.pop("my", None)
