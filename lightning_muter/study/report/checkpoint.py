"""The report of a checkpoint that requests have changed: what was removed, how close it is to retraining, what was shown of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_muter.deletion.audit import audit
from lightning_muter.deletion.files import Places, receipt_path
from lightning_muter.deletion.ledger_access import reading
from lightning_muter.errors import RequestError
from lightning_muter.study.report.figures import Figure, figures_markdown, link
from lightning_muter.study.report.tables import markdown_table, number

Receipt = Mapping[str, Any]


def checkpoint_markdown(places: Places) -> str:
    """The page as Markdown.

    Raises:
        RequestError: there is no ledger beside the checkpoint.
    """
    state = audit(places, verify=True)
    if not places.ledger.exists():
        raise RequestError(
            f"{places.ledger}: no ledger here, so nothing is known of requests. `muter snapshot` starts one."
        )
    with reading(places) as ledger:
        assert ledger is not None
        receipts: Sequence[Receipt] = ledger.receipts()
    requests = [r for r in receipts if r["kind"] == "unlearn"]
    releases = [r for r in receipts if r["kind"] == "publish"]
    parts = [
        f"# What was removed from {places.stem}\n",
        "## In short\n",
        _short(requests, releases, state.problems),
        "## What was removed\n",
        _request_table(places, requests),
        "## How close to retraining\n",
        figures_markdown(_closeness(places, requests)),
        "## Accuracy\n",
        figures_markdown(_accuracy(places, requests))
        or "Not measured: `muter unlearn … --gate` measures it with every request.\n",
        "## What was published\n",
        _release_table(places, releases)
        if releases
        else "Nothing, as far as the ledger knows: `muter publish` enters what it writes.\n",
        "## Ledger\n",
        "".join(f"- {name}: {value}\n" for name, value in state.facts.items()),
        "".join(f"- **Problem:** {problem}\n" for problem in state.problems) or "- No problems were found.\n",
        "## What this does not say\n",
        _limits(requests, state.notes),
    ]
    return "\n".join(part for part in parts if part)


def _short(requests: Sequence[Receipt], releases: Sequence[Receipt], problems: Sequence[str]) -> str:
    rows = sum(len(r["forgotten"]) for r in requests)
    text = f"{rows} rows were removed in {len(requests)} request{'s' * (len(requests) != 1)}. "
    if requests:
        bound = requests[-1]["metrics"].get("bound")
        text += (
            f"It is proved that the weights are within {bound:.3g} of those that exact retraining without these rows would give. "
            if isinstance(bound, float)
            else "How far the weights are from retraining is not proved (see the limits). "
        )
    if releases:
        metrics = releases[-1]["metrics"]
        worth = f"eps = {metrics['eps_together']:.3g} at delta = {metrics['delta_together']:g}"
        text += f"{len(releases)} release{'s are together' * (len(releases) != 1) or ' is'} worth {worth}. "
    text += f"**{len(problems)} problems need a look.**" if problems else "Files, receipts and signatures agree."
    return text + "\n"


def _source(places: Places, receipt: Receipt) -> str:
    return link(f"receipt {receipt['number']}", f"{places.receipts.name}/{receipt_path(places, receipt).name}")


def _request_table(places: Places, requests: Sequence[Receipt]) -> str:
    if not requests:
        return "Nothing yet.\n"
    headers = ("request", "time", "rows", "users", "left", "method", "source")
    body = [
        (
            f"`{r['id']}`", r["time"], str(len(r["forgotten"])), str(len(r["users"])), str(r["n_retained"]), r["method"],
            _source(places, r),
        )
        for r in requests
    ]  # fmt: skip
    return markdown_table(headers, body) + "\n"


_MEANINGS = {
    "bound": ("certificate", "proved: the weights are no further than this from exact retraining without the rows"),
    "within": ("distance asked for", "fixed before the request; noise for a release is made for it"),
    "step_norm": ("step", "how far the request moved the weights"),
    "stationarity_before": (
        "stationarity before",
        "of the objective without the rows, at the old weights (0 is its minimum)",
    ),
    "stationarity_after": (
        "stationarity after",
        "the same at the new weights: near 0 means retraining would hardly move them",
    ),
    "seconds": ("seconds", "that the request took"),
}


def _closeness(places: Places, requests: Sequence[Receipt]) -> list[Figure]:
    """Figures of the last request."""
    if not requests:
        return []
    last, found = requests[-1], []
    for name, (shown, meaning) in _MEANINGS.items():
        value = last["metrics"].get(name)
        if isinstance(value, (int, float)):
            found.append(Figure(shown, number(float(value)), meaning, _source(places, last)))
    solver = last["metrics"].get("solver") or {}
    if solver:
        value = f"{solver.get('status')}, residual {number(float(solver.get('residual', float('nan'))), 2)}"
        found.append(
            Figure(
                "solver", value, "how the linear system of the step ended; residual 0 is exact", _source(places, last)
            )
        )
    return found


def _accuracy(places: Places, requests: Sequence[Receipt]) -> list[Figure]:
    """What the gate measured at the last request that had one."""
    gated = [r for r in requests if r["metrics"].get("gate")]
    if not gated:
        return []
    gate, source = gated[-1]["metrics"]["gate"], _source(places, gated[-1])
    names = {"clean": "test rows that are right as they are", "robust": "test rows that are right under attack"}
    found = [
        Figure(
            f"{kind} accuracy", f"{gate[kind]['after']:.1f} % [{gate[kind]['low']:.1f}, {gate[kind]['high']:.1f}]",
            f"{meaning}, {gate[kind]['rows']} of them; {gate[kind]['before']:.1f} % before the request", source,
        )
        for kind, meaning in names.items()
        if kind in gate
    ]  # fmt: skip
    held = "; ".join(gate.get("held", [])) or "nothing"
    return [*found, Figure("held by the gate", held, "what a person had to decide on", source)]


def _release_table(places: Places, releases: Sequence[Receipt]) -> str:
    headers = ("release", "time", "eps", "delta", "noise per entry", "eps of all so far", "source")
    body = [
        (
            r["metrics"]["name"], r["time"], f"{r['metrics']['eps']:g}", f"{r['metrics']['delta']:g}", number(r["metrics"]["sigma"]),
            number(r["metrics"]["eps_together"]), _source(places, r),
        )
        for r in releases
    ]  # fmt: skip
    text = (
        "Each is weights with Gaussian noise. *eps, delta*: nobody tells it from a release of the exactly retrained "
        "model by more than a "
        "factor e^eps in odds, but for probability delta. A release beside the one before it can still show what was "
        "removed between.\n\n"
    )
    return text + markdown_table(headers, body) + "\n"


def _limits(requests: Sequence[Receipt], notes: Sequence[str]) -> str:
    said = [warning for r in requests for warning in r["warnings"]]
    lines = [*dict.fromkeys([*said, *notes])]
    lines.append(
        "Whether strong attacks can tell is not measured on this model: `muter-experiment … audit=full` measures the method."
    )
    return "\n".join(f"- {line}" for line in lines) + "\n"
