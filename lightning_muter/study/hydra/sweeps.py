"""Sweeps: one combined table that grows with every finished job, a list of failed jobs, and the report at the end."""

from __future__ import annotations

import csv
import io
import logging
import os
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_muter.study.report.rows import FILE, Row, append_rows, from_csv, read_rows, write_rows
from lightning_muter.study.setup.cache import digest

log = logging.getLogger(__name__)

FAILURES = "failures.csv"
# what changes where and how a job runs, but none of the figures in its rows
VOLATILE = ("cache_dir", "resume", "progress", "device", "audit")


def job_key(config: DictConfig, version: str) -> str:
    """Hash of the resolved configuration and the package's version: what makes a job the same job."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return digest([version, {k: v for k, v in plain.items() if k not in (*VOLATILE, "hydra")}])


class FinishedJobs:
    """Rows of finished jobs under ``<cache_dir>/jobs/<key>.csv``, written whole when a job has ended."""

    def __init__(self, cache_dir: str | Path) -> None:
        self.folder = Path(cache_dir) / "jobs"

    def rows(self, key: str) -> list[Row] | None:
        path = self.folder / f"{key}.csv"
        return from_csv(path.read_text(encoding="utf-8"), origin=str(path)) if path.is_file() else None

    def keep(self, key: str, rows: list[Row]) -> None:
        write_rows(self.folder / f"{key}.csv", rows)


class CombinedTable(Callback):
    """Hydra callback: appends each job's rows to ``<sweep dir>/results.csv`` the moment it ends, also when later jobs
    fail, and writes the report of the sweep at its end.

    ``failed`` counts the failed jobs of the sweep that ended last in this process.
    """

    failed = 0

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.sweep.dir)
        overrides = " ".join(job_return.overrides or [])
        if job_return.status != JobStatus.COMPLETED:
            add_failure(folder, overrides, repr(job_return._return_value))
        elif isinstance(job_return.return_value, list):
            append_rows(folder / FILE, job_return.return_value)
        else:
            add_failure(folder, overrides, str(job_return.return_value))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from rich.markup import escape

        from lightning_muter.study.report import tables
        from lightning_muter.study.report.report import wide_console, write_report

        folder, console = Path(config.hydra.sweep.dir), wide_console()
        if (folder / FILE).is_file():
            for same in tables.problems(read_rows(folder / FILE)):
                console.print(tables.terminal_table(same))
            console.print(f"Combined table, pictures and report: {write_report(folder / FILE, folder).parent}")
        CombinedTable.failed = len(failures(folder))
        for line in failures(folder):
            console.print(f"[bold red]failed[/]: {escape(line['job'])}: {escape(line['error'])}")


def add_failure(folder: Path, job: str, error: str) -> None:
    """Append one failed job to the list, in one write."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([job, " ".join(error.split())[:1000]])
    descriptor = os.open(folder / FAILURES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, buffer.getvalue().encode())
    finally:
        os.close(descriptor)


def failures(folder: Path) -> list[dict[str, str]]:
    """The failed jobs of a sweep."""
    path = folder / FAILURES
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as lines:
        return [{"job": job, "error": error} for job, error in csv.reader(lines)]
