"""A whole network unlearns: digits, a CNN trained adversarially end to end, compared with retraining.

    python examples/whole_network/run.py --out examples/results/whole_network          five seeds, about a quarter of an hour
    python examples/whole_network/run.py --seeds 0 --epochs 3 --out /tmp/look          a look at the machinery

For every seed the network is trained, and retrained without 5 % of the samples and without one class. Every method starts from
the trained network. Ours takes a fixed number of Newton-CG steps on the retained samples; the others get the seconds it took.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchattacks
from report import write_report
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

import lightning_muter as lm
from lightning_muter.adversarial.adversary import LossAttack
from lightning_muter.study.attacks import PGD, stacked
from lightning_muter.study.data import DigitsDataModule
from lightning_muter.study.metrics import accuracy, agreement, prediction_kl
from lightning_muter.study.models import SmallCNN
from lightning_muter.study.setup.train import adversarial, fit

THREAT = lm.ThreatModel("l2", 0.3, (0.0, 1.0))
DECAY, BATCH, RATE = 1e-3, 64, 0.1
STEPS = {"5 %": 3, "one class": 8}  # accepted Newton-CG steps


@dataclass
class Row:
    """One method after one request; gaps are to the retrained model of the same seed."""

    seed: int
    removed: str
    method: str
    seconds: float
    agreement: float
    agreement_adversarial: float
    kl: float
    kl_adversarial: float
    forget_accuracy: float
    clean_accuracy: float
    robust_accuracy: float
    clean_gap: float
    robust_gap: float
    membership_auc: float
    membership_gap: float


@dataclass
class Setting:
    """One seed's data and how networks are trained on it."""

    seed: int
    epochs: int
    data: DigitsDataModule

    def train(self, positions: list[int], seed: int) -> tuple[SmallCNN, float]:
        """A network from scratch on these samples, adversarially; and the seconds."""
        L.seed_everything(seed, verbose=False)
        milestones = [int(0.6 * self.epochs), int(0.85 * self.epochs)]
        model = SmallCNN((1, 8, 8), 10, width=8, hidden=32, lr=RATE, weight_decay=DECAY, milestones=milestones)
        attack = functools.partial(torchattacks.PGDL2, eps=THREAT.eps, alpha=THREAT.eps / 4, steps=10)
        part = Subset(self.data.private_dataset, positions)
        trainer = functools.partial(
            L.Trainer, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        )  # fmt: skip
        began = time.perf_counter()
        loader = DataLoader(part, batch_size=BATCH, shuffle=True)
        fit(model, loader, trainer, self.epochs, adversarial(attack, THREAT, None))
        return model.eval(), time.perf_counter() - began


# -- the competitors ---------------------------------------------------------------------------------------------------


def ours(model: SmallCNN, data: Dataset[Any], forget: list[int], steps: int) -> float:
    """Snapshot, then one request: the direct part alone (Gauss-Newton at moving maximisers)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # statuses of truncated solves
        snapshot = lm.take_wide_snapshot(model, data, threat_model=THREAT, response="none", progress=False)
        return lm.unlearn(model, snapshot, forget, data, refine=steps - 1, progress=False).seconds


def with_response(model: SmallCNN, data: Dataset[Any], forget: list[int], steps: int, seconds: float) -> float:
    """The same with the response of the maximisers in every product, for about the same time (the last step is finished)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = lm.unlearn_wide(model, forget, data, threat_model=THREAT, steps=steps, seconds=seconds, progress=False)
    return result.seconds


def descend(model: nn.Module, x: Tensor, y: Tensor, seconds: float, rate: float, sign: float = 1.0) -> float:
    """Adversarial SGD as in training for so many seconds; upwards it stops where the loss is that of guessing."""
    began = time.perf_counter()
    attack = LossAttack(THREAT, F.cross_entropy, steps=10, random_start=False)
    decay = DECAY if sign > 0 else 0.0
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9 if sign > 0 else 0.0, weight_decay=decay)
    generator = torch.Generator().manual_seed(1)
    while True:
        for batch in torch.randperm(len(x), generator=generator).split(BATCH):
            if time.perf_counter() - began > seconds:
                return time.perf_counter() - began
            loss = F.cross_entropy(model(attack(model, x[batch], y[batch])), y[batch])
            if sign < 0 and float(loss) > torch.log(torch.tensor(10.0)):
                return time.perf_counter() - began
            optimiser.zero_grad()
            (sign * loss).backward()
            optimiser.step()


# -- judging -----------------------------------------------------------------------------------------------------------


def auc(members: Tensor, others: Tensor) -> float:
    """P(a member's loss is lower than another sample's): 1/2 where the two cannot be told apart."""
    less = (members[:, None] < others).double() + 0.5 * (members[:, None] == others)
    return float(less.mean())


class Judge:
    """Compares with one retrained network on its forgotten samples and on the test set."""

    def __init__(self, setting: Setting, reference: nn.Module, forget: list[int]) -> None:
        self.pgd, self.reference = PGD(20), reference
        self.x, self.y = stacked(setting.data.private_dataset, torch.float32, forget)
        self.test = stacked(setting.data.test_dataset, torch.float32)
        self.attacked = self.pgd.adversarial(reference, self.x, self.y, THREAT)
        self.clean, self.robust, self.auc = self.figures(reference)

    def figures(self, model: nn.Module) -> tuple[float, float, float]:
        """Clean and robust test accuracy, and the AUC of the membership test by loss."""
        x, y = self.test
        logits = self.pgd.logits(model, x)
        robust = self.pgd.logits(model, self.pgd.adversarial(model, x, y, THREAT))
        losses = F.cross_entropy(logits, y, reduction="none")
        same = torch.isin(y, self.y.unique())  # of a removed class: against unseen samples of that class
        mine = F.cross_entropy(self.pgd.logits(model, self.x), self.y, reduction="none")
        return float(accuracy(logits, y)), float(accuracy(robust, y)), auc(mine, losses[same])

    def row(self, seed: int, removed: str, method: str, model: nn.Module, seconds: float) -> Row:
        model.eval()
        clean, robust, guess = self.figures(model)
        pairs = [(self.pgd.logits(model, x), self.pgd.logits(self.reference, x)) for x in (self.x, self.attacked)]
        return Row(
            seed, removed, method, seconds,
            *(float(agreement(*p)) for p in pairs), *(float(prediction_kl(*p)) for p in pairs),
            float(accuracy(pairs[0][0], self.y)), clean, robust,
            abs(clean - self.clean), abs(robust - self.robust), guess, abs(guess - self.auc),
        )  # fmt: skip


def answers(
    setting: Setting, model: SmallCNN, forget: list[int], steps: int, say: Callable[[str, nn.Module, float], None]
) -> None:
    """Every method's network, from copies of ``model``."""
    data = setting.data.private_dataset
    kept = [i for i in range(len(data)) if i not in set(forget)]
    retained, gone = (stacked(data, torch.float32, p) for p in (kept, forget))
    say("doing nothing", model, 0.0)
    own = copy.deepcopy(model)
    budget = ours(own, data, forget, steps)
    say("ours", own, budget)
    own = copy.deepcopy(model)
    say("ours, with response", own, with_response(own, data, forget, steps, budget))
    for rate in (0.1, 0.05):
        own = copy.deepcopy(model)
        say(f"fine-tuning, rate {rate}", own, descend(own, *retained, budget, rate))
    own = copy.deepcopy(model)
    say("negative gradient", own, descend(own, *gone, budget, 0.001, -1.0))


def study(seed: int, epochs: int, write: Callable[[Row], None]) -> None:
    data = DigitsDataModule(seed=seed, public_fraction=0.0, val_fraction=0.0, test_fraction=0.2, batch_size=BATCH)
    data.prepare_data()
    data.setup()
    setting = Setting(seed, epochs, data)
    everything = list(range(len(data.private_dataset)))
    model, _ = setting.train(everything, seed)
    drawn = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    requests = {
        "5 %": drawn[: len(everything) // 20].tolist(),
        "one class": (data.private_dataset.targets == 3).nonzero()[:, 0].tolist(),
    }
    for removed, forget in requests.items():
        kept = [i for i in everything if i not in set(forget)]
        reference, seconds = setting.train(kept, seed)
        judge = Judge(setting, reference, forget)

        def say(method: str, found: nn.Module, took: float, judge: Judge = judge, removed: str = removed) -> None:
            write(judge.row(seed, removed, method, found, took))

        say("retraining", reference, seconds)
        again, seconds = setting.train(kept, seed + 1000)
        say("retraining, other seed", again, seconds)
        answers(setting, model, forget, STEPS[removed], say)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("outputs/whole_network"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    with open(options.out / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(Row.__dataclass_fields__))
        table.writeheader()

        def write(row: Row) -> None:
            rows.append(asdict(row))
            table.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in rows[-1].items()})
            file.flush()
            print(
                f"{row.seed} {row.removed:10} {row.method:24} {row.seconds:6.1f} s  kl {row.kl_adversarial:.3f}",
                flush=True,
            )

        for seed in options.seeds:
            study(seed, options.epochs, write)
    write_report(options.out)


if __name__ == "__main__":
    main()
