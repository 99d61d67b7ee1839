"""All benchmarks, a JSON file and a table of ratios:  python -m tests.benchmarks [folder] [-k expression]"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def table(report: dict) -> str:
    """One line per figure: what it is, its ratio, the limit that is aimed at, and what it was computed from."""
    lines = ["| figure | ratio | aim | processor seconds | remarks |", "|---|---|---|---|---|"]
    for bench in report["benchmarks"]:
        info = bench["extra_info"]
        seconds = bench["stats"]["median"]
        rest = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in info.items() if k not in ("ratio", "aim")
        )
        ratio = f"{info['ratio']:.3g}" if "ratio" in info else "-"
        lines.append(f"| {bench['name']} | {ratio} | {info.get('aim', '-')} | {seconds:.3g} | {rest} |")
    return "\n".join(lines)


def main() -> int:
    arguments = sys.argv[1:]
    folder = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else Path("outputs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "benchmarks.json"
    here = str(Path(__file__).parent)
    options = [
        "-m",
        "benchmark",
        f"--benchmark-json={out}",
        "--benchmark-timer=time.process_time",
        "-q",
        "-s",
        "-n0",
        "--dist=no",
    ]
    status = subprocess.call([sys.executable, "-m", "pytest", here, *options, *arguments])
    if out.exists() and out.stat().st_size:
        text = table(json.loads(out.read_text()))
        (folder / "benchmarks.md").write_text(text + "\n")
        print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
