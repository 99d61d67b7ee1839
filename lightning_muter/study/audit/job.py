"""The audit of one job of a study, from its configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_muter.errors import ArgumentError
from lightning_muter.study.audit.runner import make_worlds
from lightning_muter.study.audit.tables import Results, gather
from lightning_muter.study.audit.worlds import Plan
from lightning_muter.study.hydra.progress import Progress
from lightning_muter.study.methods.base import Competitor
from lightning_muter.study.methods.retrain import Nothing
from lightning_muter.study.requests import Scenario
from lightning_muter.study.setup.cache import Cache, digest
from lightning_muter.study.setup.problem import World

FEWEST = 6  # candidates and worlds below which a third of them is nobody


def run_audit(
    config: DictConfig,
    world: World,
    methods: Sequence[Competitor],
    scenarios: Sequence[Scenario],
    cache: Cache,
    folder: Path,
    progress: Progress,
) -> Results:
    """Make the worlds that are missing, attack all of them, write the tables to ``folder``.

    Args:
        methods: in the order of ``config.method``.
    """
    options = config.audit
    candidates = tuple(sorted({i for scenario in scenarios for request in scenario.requests for i in request}))
    if len(candidates) < FEWEST:
        raise ArgumentError(
            "request", f"{len(candidates)} samples", f"at least {FEWEST} to audit", "Use request=mislabelled, say."
        )
    if options.worlds < FEWEST:
        raise ArgumentError(
            "audit.worlds", options.worlds, f"0 (no audit), or {FEWEST} or more", "32 for figures to quote."
        )
    if cache.folder is None:
        raise ArgumentError(
            "cache_dir", None, "a folder", "Worlds are kept there, shared by methods and taken up again."
        )
    keyed = {
        digest(OmegaConf.to_container(node, resolve=True)): method
        for node, method in zip(config.method.values(), methods, strict=True)
        if not isinstance(method, Nothing)  # the models before the request are audited in any case
    }
    plan = Plan(
        world, candidates, keyed, options.worlds, config.forget_seed, options.pool, options.population, options.points
    )
    workers = os.cpu_count() or 1 if options.workers == "auto" else options.workers
    progress.extend(plan.worlds + 1)
    make_worlds(plan, cache, workers, progress.begin)
    progress.begin("attacks")
    problem = f"{config.dataset.name}, {config.model.name}, {config.attack.name}, {scenarios[0].labels[0]}"
    attacks = instantiate(options.attacks, _convert_="all")
    results = gather(plan, cache, attacks, splits=options.splits, draws=options.draws, problem=problem)
    results.write(folder)
    return results
