"""The requests as subcommands of a LightningCLI, for modules of `lightning` and of `pytorch_lightning`."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_muter.deletion.checkpoints import load_checkpoint
from lightning_muter.deletion.help import arranged, asks_for_help
from lightning_muter.deletion.trainer import MuterTrainer
from lightning_muter.lightning_names import MODULES, other

#: Lightning 2.6 takes the model's class from a checkpoint; earlier ones do not.
LIGHTNING_READS_CLASSES = tuple(int(part) for part in lightning.__version__.split(".")[:2]) >= (2, 6)

_REQUESTS = ("check", "snapshot", "unlearn", "refresh")

if TYPE_CHECKING:
    _Base = LightningCLI
else:
    _Base = object


class _Requests(_Base):
    """What both command lines add to Lightning's own."""

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """All subcommands; only the one asked for when the command line begins with it, which is much quicker."""
        every = {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in _REQUESTS}}
        asked = sys.argv[1] if len(sys.argv) > 1 else ""
        return {asked: every[asked]} if asked in every else every

    def add_arguments_to_parser(self, parser: Any) -> None:
        super().add_arguments_to_parser(parser)
        if sys.argv[1:2] and sys.argv[1] not in _REQUESTS and LIGHTNING_READS_CLASSES:
            parser.add_argument(
                "--model_from_checkpoint",
                type=bool,
                default=False,
                help="take class and arguments of the model from the checkpoint, which imports whatever it names",
            )

    def _parse_ckpt_path(self) -> None:
        # Lightning takes the model's class and arguments from the checkpoint here, and imports what it names: only when
        # asked. Without the class in it (trained by a script, not by a LightningCLI) the arguments alone cannot be parsed.
        subcommand = self.config.get("subcommand")
        if subcommand in _REQUESTS or not (subcommand and self.config[subcommand].get("model_from_checkpoint")):
            return
        path = self.config[subcommand].get("ckpt_path")
        if path and Path(path).is_file() and "_class_path" not in load_checkpoint(path).get("hyper_parameters", {}):
            return
        super()._parse_ckpt_path()


class MuterCLI(_Requests, LightningCLI):
    """LightningCLI with the subcommands of :class:`MuterTrainer`, for any module and datamodule by class path."""


def _command_line(arguments: Sequence[str]) -> tuple[type[Any], type[Any]]:
    """The command line and the trainer for the module that these arguments name: Lightning takes no other name's."""
    own, others = MODULES
    asked = [_imported(path) for path in _class_paths(arguments)]
    if own is others or not any(isinstance(c, type) and issubclass(c, others) for c in asked):
        return MuterCLI, MuterTrainer
    cli = importlib.import_module(f"{other.__name__}.cli").LightningCLI
    requests = {name: getattr(MuterTrainer, name) for name in _REQUESTS}
    trainer = type("MuterTrainer", (other.Trainer,), {"__doc__": MuterTrainer.__doc__, **requests})
    return type("MuterCLI", (_Requests, cli), {"__doc__": MuterCLI.__doc__}), trainer


def _class_paths(arguments: Sequence[str]) -> Iterator[str]:
    """The class paths of `--model`, and of `model:` in the files of `--config`."""
    given = [part for argument in arguments for part in argument.split("=", 1)]
    for option, value in itertools.pairwise(given):
        if option in ("--model", "--model.class_path"):
            yield value
        elif option in ("--config", "-c") and Path(value).is_file():
            try:
                found = yaml.safe_load(Path(value).read_text())
            except (OSError, UnicodeError, yaml.YAMLError):  # said by the parser, in its own words
                continue
            for part in [found, *(found.values() if isinstance(found, dict) else ())]:
                model = part.get("model") if isinstance(part, dict) else None
                path = model.get("class_path") if isinstance(model, dict) else model
                if isinstance(path, str):
                    yield path


def _imported(path: str) -> Any:
    """The class of this path, or None: what cannot be imported is said by the parser, in its own words."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except Exception:
        return None


def _print_help(cli: type[Any], options: dict[str, Any], command: str) -> None:
    """The parser's own help, arranged; ends as the parser does, by SystemExit."""
    written = io.StringIO()
    try:
        with contextlib.redirect_stdout(written):
            cli(**options)
    finally:
        if written.getvalue():
            sys.stdout.write(arranged(command, written.getvalue()))


def run(arguments: Sequence[str]) -> int:
    """Run a subcommand with these arguments; returns the exit code, or raises what the command raised."""
    # Between Lightning and jsonargparse; nothing that users of either could act on.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    saved_argv, saved_path = sys.argv, list(sys.path)
    everything = asks_for_help(arguments) and arguments[-1] == "all"
    arguments = arguments[:-1] if everything else arguments
    sys.argv = ["muter", *arguments]
    # An installed command does not look for modules in the current folder, where users have theirs; `python -m` does.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        # A fixed seed unless the configuration has one: the same request gives the same result.
        # A name of our own for the saved configuration: without a logger it lands in the current folder, where
        # users have their config.yaml.
        saved = {"config_filename": "muter-config.yaml", "overwrite": True}
        cli, trainer = _command_line(arguments)
        options: dict[str, Any] = {"save_config_callback": None} if arguments[0] == "check" else {}  # it writes nothing
        options = {"trainer_class": trainer, "save_config_kwargs": saved, "seed_everything_default": 0, **options}
        if asks_for_help(arguments) and not everything:
            _print_help(cli, options, arguments[0])
        cli(**options)
    finally:
        sys.argv, sys.path = saved_argv, saved_path
    return 0
