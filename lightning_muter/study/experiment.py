"""The study as one command: ``muter-experiment`` trains, takes snapshots, unlearns by each method, retrains, compares.

``-m`` sweeps; see ``conf/config.yaml`` and the groups beside it for everything that can be changed.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_muter import __version__
from lightning_muter.errors import ArgumentError, MuterError
from lightning_muter.study import compare as protocol
from lightning_muter.study.audit.job import run_audit
from lightning_muter.study.audit.tables import ATTACKS_FILE, summary
from lightning_muter.study.hydra import resolvers
from lightning_muter.study.hydra.progress import Progress
from lightning_muter.study.hydra.sweeps import CombinedTable, FinishedJobs, job_key
from lightning_muter.study.methods.base import Competitor
from lightning_muter.study.report import tables
from lightning_muter.study.report.report import wide_console, write_report
from lightning_muter.study.report.rows import FILE, Row, append_rows, write_rows
from lightning_muter.study.requests import Scenario, Setting
from lightning_muter.study.setup import train as groundwork
from lightning_muter.study.setup.cache import Cache
from lightning_muter.study.setup.problem import World

log = logging.getLogger(__name__)

resolvers.register()


def config_dir() -> str:
    """The configuration groups: beside the package in a source checkout, else inside the installed package."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "setup.cfg").is_file() and (checkout / "conf" / "config.yaml").is_file():
        return str(checkout / "conf")
    spec = importlib.util.find_spec("lightning_muter.conf")
    if spec is None or not spec.submodule_search_locations:
        raise MuterError("The configuration files of lightning_muter are not installed. Reinstall the package.")
    return str(next(iter(spec.submodule_search_locations)))


def methods_of(config: DictConfig) -> list[Competitor]:
    """The methods in the order in which they were named; two with one label are refused."""
    methods = [instantiate(node, _convert_="all") for node in config.method.values()]
    labels = [m.label for m in methods]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ArgumentError("method", twice, "a different label for every method", "Set method.<name>.label.")
    return methods


def build_world(config: DictConfig, cache: Cache, begin: Callable[[str], None] = lambda what: None) -> World:
    """Train the model of a configuration; see :mod:`lightning_muter.study.setup.train`."""
    setting: Setting = instantiate(config.request, _convert_="all")
    L.seed_everything(config.seed, verbose=False)
    data = instantiate(config.dataset.module, _convert_="all")
    attack = None if config.attack.build is None else instantiate(config.attack.build, _convert_="all")
    make_model = instantiate(config.model.module, _convert_="all")
    make_trainer = instantiate(config.trainer, _convert_="all")
    recipe = groundwork.Recipe(
        data,
        make_model,
        attack,
        make_trainer,
        trades_beta=config.attack.trades_beta,
        weight_decay=resolvers.number(config.weight_decay),
        backbone_epochs=config.training.backbone_epochs,
        head_epochs=config.training.head_epochs,
        evaluation=instantiate(config.evaluation, _convert_="all"),
        seed=config.seed,
        key=OmegaConf.to_container(config.model.module, resolve=True),  # how snapshots are taken changes no backbone
        snapshot_options=instantiate(config.model.snapshot, _convert_="all") or {},
        prepare=lambda private: setting.prepare(private, config.forget_seed),
    )
    return groundwork.build(recipe, cache, begin)


def run_job(config: DictConfig, folder: Path, *, sweep: bool = False) -> list[Row]:
    """One job: all rows, written to ``folder/results.csv`` as they come."""
    config = resolvers.with_numbers(config)
    key = job_key(config, __version__)
    finished = FinishedJobs(config.cache_dir)
    taken: list[Row] | None = None
    if config.resume is True or (config.resume == "auto" and sweep):
        taken = finished.rows(key)
        if taken is not None:
            log.info("This job has been run before; its rows are taken over (resume=false runs it again).")
            write_rows(folder / FILE, taken)
            if not config.audit.worlds:
                return taken
    cache = Cache(config.cache_dir)
    methods = methods_of(config)
    setting = instantiate(config.request, _convert_="all")
    with Progress(groundwork.STEPS, shown=config.progress) as progress:
        world = build_world(config, cache, progress.begin)
        scenarios = setting.scenarios(world.data, config.forget_seed)
        rows = taken
        if rows is None:
            rows = _compare(config, world, methods, scenarios, cache, folder, key, progress)
            finished.keep(key, rows)
        if config.audit.worlds:
            found = run_audit(config, world, methods, scenarios, cache, folder, progress)
            log.info("Audit: %s\n%s", folder / ATTACKS_FILE, "\n".join(summary(found)))
    return rows


def _compare(
    config: DictConfig,
    world: World,
    methods: Sequence[Competitor],
    scenarios: Sequence[Scenario],
    cache: Cache,
    folder: Path,
    key: str,
    progress: Progress,
) -> list[Row]:
    """The comparison with retraining, row by row."""
    progress.extend(protocol.steps(methods, scenarios))
    shared = Row(
        dataset=config.dataset.name,
        model=config.model.name,
        attack=config.attack.name,
        setting="",
        method="",
        eps=0.0 if world.threat is None else world.threat.eps,
        seed=config.seed,
        forget_seed=config.forget_seed,
        job=key,
    )
    rows = []
    for row in protocol.run(world, methods, scenarios, cache, shared, progress.begin):
        rows.append(row)
        append_rows(folder / FILE, [row])
    return rows


def show(rows: Sequence[Row], folder: Path) -> None:
    """The tables on the terminal; the report and its pictures in the folder."""
    console = wide_console()
    for same in tables.problems(rows):
        console.print(tables.terminal_table(same))
    for note in dict.fromkeys(f"{r.method}: {r.note}" for r in rows if r.note):
        console.print(note, markup=False, highlight=False)
    console.print(f"Table (CSV, Markdown, HTML) and pictures: {write_report(folder).parent}", highlight=False)


@hydra.main(version_base="1.3", config_path=config_dir(), config_name="config")
def app(config: DictConfig) -> Any:
    """One job of `muter-experiment`; of a sweep also one that fails, whose error is kept."""
    state = HydraConfig.get()
    folder, sweep = Path(state.runtime.output_dir), state.mode == RunMode.MULTIRUN
    try:
        rows = run_job(config, folder, sweep=sweep)
    except Exception as error:
        if not sweep:
            if isinstance(error, MuterError):  # its message is the advice; a traceback would bury it
                sys.exit(f"muter-experiment: {type(error).__name__}: {error}")
            raise
        # the other jobs go on; Hydra itself would raise at the end of the sweep, before its table is written
        log.error("This job failed: %s\n%s", error, traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    if not sweep:
        show(rows, folder)
    return rows


def main() -> None:
    """Entry point; the exit status of a sweep is 1 if a job failed."""
    app()
    if CombinedTable.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
