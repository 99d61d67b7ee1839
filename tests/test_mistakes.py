"""The likeliest mistakes of a new user, each made at its door: the message says the fix, and docs/faq.md has its text."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import (
    AdversarialTraining,
    MUterCallback,
    Snapshot,
    ThreatModel,
    check,
    cli,
    take_snapshot,
    unlearn,
)
from lightning_muter.errors import MuterError

from .readme import ROOT

BALL = ThreatModel("l2", 0.05, None)
X = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
ROWS = TensorDataset(X, (X[:, 0] > 0.5).long())


class Net(L.LightningModule):
    """Softmax regression with the optimiser that the mistake is about."""

    def __init__(self, optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, decay: float = 1e-2) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.optimiser, self.decay = optimiser, decay

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimiser(self.parameters(), lr=0.2, weight_decay=self.decay)


def fit(*callbacks: L.Callback, model: L.LightningModule | None = None, rows: TensorDataset = ROWS) -> None:
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(model or Net(), DataLoader(rows, batch_size=30, shuffle=True))


@pytest.fixture(scope="module")
def trained() -> tuple[Net, Snapshot]:
    torch.manual_seed(0)
    model = Net()
    return model, take_snapshot(model, ROWS, threat_model=BALL, weight_decay=1e-2)


def robust() -> AdversarialTraining:
    return AdversarialTraining(BALL)


def fitted(rows: Any = ROWS, **options: Any) -> Callable[..., object]:
    return lambda model, snapshot: take_snapshot(model, rows, **options)


def asked(forget: Any, *data: Any, **options: Any) -> Callable[..., object]:
    return lambda model, snapshot: unlearn(model, snapshot, forget, ROWS, *data, **options)


def again(model: Net, snapshot: Snapshot) -> None:
    for _ in range(2):
        unlearn(model, snapshot, [1], ROWS)


MISTAKES: dict[str, Callable[[Net, Snapshot], object]] = {
    "AdamW as optimiser": lambda m, s: fit(robust(), MUterCallback(), model=Net(torch.optim.AdamW)),
    "no weight decay": lambda m, s: fit(robust(), MUterCallback(), model=Net(decay=0.0)),
    "no adversarial training": lambda m, s: fit(MUterCallback()),
    "data outside the box": lambda m, s: fit(
        AdversarialTraining(ThreatModel("l2", 0.1)), MUterCallback(), rows=TensorDataset(3 * X - 1, ROWS.tensors[1])
    ),
    "a request before the fit": lambda m, s: MUterCallback().unlearn(Net(), forget=[1]),
    "no threat model": fitted(weight_decay=1e-2),
    "a loader for a dataset": fitted(DataLoader(ROWS), threat_model=BALL, weight_decay=1e-2),
    "an unknown norm": lambda m, s: ThreatModel("l1", 0.1),
    "a scope that no parameter has": fitted(threat_model=BALL, weight_decay=1e-2, scope="body"),
    "a norm in capitals": lambda m, s: ThreatModel("Linf", 8 / 255),
    "refine without the rows": asked([1], refine=1),
    "a request without the data": lambda m, s: unlearn(m, s, [1]),
    "the path of a snapshot": lambda m, s: unlearn(m, "run/model.muter.snapshot", [1], ROWS),  # type: ignore[arg-type]
    "the name of a norm as threat model": fitted(threat_model="l2", weight_decay=1e-2),
    "check of a plain module": lambda m, s: check(nn.Linear(4, 2), DataLoader(ROWS)),  # type: ignore[arg-type]
    "a position beyond the data": asked([30]),
    "a mask for positions": asked(torch.zeros(30).bool()),
    "a row that was forgotten": again,
    "weights of another fit": lambda m, s: unlearn(Net(), s, [1], ROWS),
    "the name of a method": asked([1], method="newton"),
}
OTHERS = ("an activation behind the head", "an unknown command", "an unknown model of the study")
PAGE = (ROOT / "docs" / "faq.md").read_text()
LISTED = dict(re.findall(r"^\| ([^|]+?) \| `([^`]+)` \|$", PAGE, re.MULTILINE))


def test_the_page_lists_these_mistakes() -> None:
    assert set(LISTED) == {*MISTAKES, *OTHERS}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore:The head is not stationary")
def test_the_message_says_the_fix(mistake: str, trained: tuple[Net, Snapshot]) -> None:
    model, snapshot = copy.deepcopy(trained)
    fix = re.escape(LISTED[mistake])
    if mistake in ("AdamW as optimiser", "no weight decay"):  # the fit is worth having without a snapshot too
        with pytest.warns(UserWarning, match=fix):
            MISTAKES[mistake](model, snapshot)
    else:
        with pytest.raises(MuterError, match=fix):
            MISTAKES[mistake](model, snapshot)


def test_a_door_called_without_its_arguments_says_how_it_is_called() -> None:
    with pytest.raises(TypeError, match=r"It is called as take_snapshot\(model, dataset, "):
        take_snapshot(nn.Linear(4, 2))  # type: ignore[call-arg]


@pytest.mark.filterwarnings("ignore:The head is not stationary")
def test_an_activation_behind_the_head_is_named() -> None:
    model = Net()
    model.net = nn.Sequential(nn.Linear(4, 2), nn.ReLU())  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=LISTED["an activation behind the head"]) as warned:
        fit(robust(), MUterCallback(), model=model)
    said = "".join(str(w.message) for w in warned)
    assert "goes through relu first" in said
    assert "traced:" not in said


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["unlern"]) == 2
    assert LISTED["an unknown command"] in capsys.readouterr().err


def test_an_unknown_model_of_the_study(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_muter.study.experiment", "model=resnet", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert LISTED["an unknown model of the study"] in done.stderr
