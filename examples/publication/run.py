"""What a certified publication costs, and what two releases give away: digits, softmax regression, wrong labels asked for.

    python examples/publication/run.py --out examples/results/publication          five seeds, about ten minutes of one core
    python examples/publication/run.py --seeds 0 --singles 2 --draws 2             a look at the machinery

Cost: 5 % of the training rows have a wrong label and are removed within a distance fixed beforehand; accuracy of the releases, and
processor time beside retraining from the old weights. Leak: one row is removed at a time; who has the weights before and after, and
public data, rebuilds it (`lightning_muter.publication.leak`), once without noise and once from two releases.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

import lightning_muter as lm
from lightning_muter.publication.gaussian import gaussian_sigma
from lightning_muter.publication.leak import Leak, Rebuilt, leak, rebuild
from lightning_muter.publication.publish import with_noise
from lightning_muter.study.attacks import PGD, stacked
from lightning_muter.study.data import DigitsDataModule
from lightning_muter.study.hard_requests import Mislabelled
from lightning_muter.study.metrics import accuracy
from lightning_muter.study.models import SoftmaxRegression

THREAT, DECAY = lm.ThreatModel("l2", 0.3, (0.0, 1.0)), 1e-3
EPS, DELTA = 1.0, 1e-5
HEAD = ["head.weight", "head.bias"]
ROWS = 720  # trained on where single rows are removed
Table = list[dict[str, Any]]


def digits(seed: int) -> DigitsDataModule:
    data = DigitsDataModule(seed=seed, public_fraction=0.4, val_fraction=0.05, test_fraction=0.2)
    data.prepare_data()
    data.setup()
    return data


def snapshot_of(model: SoftmaxRegression, data: Dataset[Any]) -> lm.Snapshot:
    """Trained until the robust objective is stationary, from where the head stands."""
    return lm.take_snapshot(model, data, threat_model=THREAT, weight_decay=DECAY, polish=60, progress=False)


def trained(data: Any) -> tuple[SoftmaxRegression, lm.Snapshot]:
    model = SoftmaxRegression((1, 8, 8), 10).double()
    model.reset_head()
    return model, snapshot_of(model, data)


def on_processor(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    found = call()
    return found, time.process_time() - began


# -- what it costs -----------------------------------------------------------------------------------------------------


def accuracies(model: SoftmaxRegression, test: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Clean and robust (PGD-20), in per cent."""
    judge, (x, y) = PGD(20), test
    attacked = judge.adversarial(model, x, y, THREAT, model.criterion)
    clean, robust = (100 * float(accuracy(judge.logits(model, inputs), y)) for inputs in (x, attacked))
    return clean, robust


def cost(seed: int, withins: list[float], draws: int) -> Table:
    setting, data = Mislabelled(0.05), digits(seed)
    private = setting.prepare(data.private_dataset, seed)
    forget = list(setting.scenarios(private, seed)[0].requests[0])
    kept = Subset(private, [i for i in range(len(private)) if i not in set(forget)])
    model, snapshot = trained(private)
    test = stacked(data.test_dataset, torch.float64)
    reference, before = copy.deepcopy(model), accuracies(model, test)
    _, warm = on_processor(lambda: snapshot_of(reference, kept))
    after = accuracies(reference, test)
    found = []
    for within in withins:
        own, stored = copy.deepcopy(model), copy.deepcopy(snapshot)

        def answered(own: SoftmaxRegression = own, stored: lm.Snapshot = stored, within: float = within) -> Any:
            result = lm.unlearn(own, stored, forget, private, retain=private, within=within, progress=False)
            return result, lm.publish(own, result, eps=EPS, delta=DELTA)

        (result, shown), seconds = on_processor(answered)
        plain = accuracies(own, test)
        noisy = [accuracies(lm.publish(own, result, eps=EPS, delta=DELTA).module, test) for _ in range(draws)]
        clean, robust = ([pair[i] for pair in noisy] for i in (0, 1))
        found.append({
            "seed": seed, "within": within, "sigma": shown.sigma, "bound": result.bound,
            "clean_before": before[0], "clean_retrained": after[0], "clean_unlearned": plain[0],
            "clean_published": statistics.mean(clean), "clean_published_worst": min(clean),
            "robust_before": before[1], "robust_retrained": after[1], "robust_unlearned": plain[1],
            "robust_published": statistics.mean(robust), "robust_published_worst": min(robust),
            "cpu_seconds": seconds, "cpu_seconds_warm_retraining": warm, "cpu_ratio": seconds / warm,
        })  # fmt: skip
        print({name: round(value, 5) for name, value in found[-1].items()}, flush=True)
    return found


# -- what it gives away ------------------------------------------------------------------------------------------------


def heads(model: SoftmaxRegression, sigma: float = 0.0) -> Tensor:
    state = with_noise(model.state_dict(), HEAD, sigma) if sigma else model.state_dict()
    return torch.cat([state[HEAD[0]], state[HEAD[1]][:, None]], 1)


def leaks(seed: int, withins: list[float], singles: int) -> Table:
    data = digits(seed)
    private = Subset(data.private_dataset, range(ROWS))
    x, y = stacked(private, torch.float64)
    public = stacked(data.public_dataset, torch.float64)[0].flatten(1)
    model, snapshot = trained(private)
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:singles].tolist()
    without: list[Rebuilt] = []
    noised: dict[float, list[Rebuilt]] = {within: [] for within in withins}
    floor: dict[float, list[Rebuilt]] = {within: [] for within in withins}
    for row in rows:
        after = copy.deepcopy(model)
        least = min(withins)  # the same removal for all: noise is what differs
        lm.unlearn(after, copy.deepcopy(snapshot), [row], private, retain=private, within=least, progress=False)
        without.append(rebuild(heads(model), heads(after), public, ROWS, DECAY))
        for within in withins:
            sigma = gaussian_sigma(within, EPS, DELTA)
            first, second, again = (heads(m, sigma) for m in (model, after, model))
            noised[within].append(rebuild(first, second, public, ROWS, DECAY))
            floor[within].append(rebuild(first, again, public, ROWS, DECAY))
    candidates = x.flatten(1)

    def line(releases: str, sigma: float, found: list[Rebuilt]) -> dict[str, Any]:
        said: Leak = leak(found, rows, candidates, y)
        return {
            "seed": seed, "releases": releases, "sigma": sigma, "cosine": said.cosine, "median_rank": said.median_rank,
            "candidates": ROWS, "label_rate": said.label_rate, "trials": said.trials,
        }  # fmt: skip

    table = [line("before and after, no noise", 0.0, without)]
    for within in withins:
        sigma = gaussian_sigma(within, EPS, DELTA)
        table.append(line("before and after, both with noise", sigma, noised[within]))
        table.append(line("floor: twice the same state", sigma, floor[within]))
    for found in table:
        print(found, flush=True)
    return table


# -- files -------------------------------------------------------------------------------------------------------------


def write(path: Path, rows: Table) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--within", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--draws", type=int, default=20, help="releases of each unlearned model")
    parser.add_argument("--singles", type=int, default=80, help="rows removed one at a time, with the first seed")
    parser.add_argument("--out", type=Path, default=Path("outputs/publication"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    write(options.out / "leak.csv", leaks(options.seeds[0], options.within, options.singles))
    write(
        options.out / "cost.csv", [row for seed in options.seeds for row in cost(seed, options.within, options.draws)]
    )


if __name__ == "__main__":
    main()
