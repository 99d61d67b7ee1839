"""`check` and `muter check`: findings with their levels and fixes, a trial of the end of the fit, and its time."""

from __future__ import annotations

import copy
import re
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_muter
from lightning_muter import AdversarialTraining, MUterCallback, Snapshot, ThreatModel, check, cli, take_snapshot
from lightning_muter.errors import UnsuitableError
from lightning_muter.preflight import findings as findings_module
from lightning_muter.preflight.findings import Finding, as_table, enforce

X = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, (X[:, 0] > 0.5).long())
THREAT = ThreatModel("l2", 0.03, None)


class Net(L.LightningModule):
    def __init__(self, decay: float = 1e-2, dropout: bool = False):
        super().__init__()
        self.decay = decay
        self.net = nn.Sequential(nn.Dropout(0.5) if dropout else nn.Identity(), nn.Linear(4, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, weight_decay=self.decay)


class Rows(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(DATA, 50, shuffle=True)


def levels(found):
    return [f.title for f in found.findings if f.level != "note"]


def test_nothing_stands_against_it_and_nothing_changes():
    net = Net()
    before, state = copy.deepcopy(net.state_dict()), torch.random.get_rng_state()
    began = time.perf_counter()
    found = check(
        net, DataLoader(DATA, 50), callbacks=[AdversarialTraining(attack=THREAT), MUterCallback(verbose=False)]
    )
    assert found.ok
    assert levels(found) == []
    assert 0 < found.seconds < 30
    assert time.perf_counter() - began < 10
    assert "End of the fit: about" in str(found)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert net._trainer is None
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("net", "options", "level", "words"),
    [
        (Net(), {}, "blocks", "Nothing tells the threat model"),
        (Net(0.0), {"threat_model": THREAT}, "no snapshot", "Weight decay is 0"),
        (Net(), {"threat_model": ThreatModel("linf", 8, None), "weight_decay": 0.1}, None, ""),
        (Net(), {"threat_model": ThreatModel("linf", 8)}, "weaker", "eps=8/255"),
        (Net(), {"threat_model": THREAT, "scope": ["nothing.*"]}, "blocks", "scope"),
        (Net(dropout=True), {"threat_model": THREAT}, None, ""),
    ],
)
def test_levels(net, options, level, words):
    found = check(net, DataLoader(DATA, 50), **options)
    assert levels(found) == ([level] if level else [])
    assert words in " ".join(map(str, found.findings))
    assert found.ok == (level not in ("blocks", "no snapshot"))
    assert (found.seconds is not None) == found.ok


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_a_wider_scope_and_a_trainer_at_hand(tmp_path):
    muter = MUterCallback("all", threat_model=THREAT, verbose=False)
    trainer = L.Trainer(callbacks=[muter], default_root_dir=tmp_path, accelerator="cpu", max_epochs=1)
    before = list(trainer.callbacks)
    found = check(Net(), datamodule_of := Rows(), trainer=trainer)
    assert found.ok
    assert found.passes == 1
    assert trainer.callbacks == before
    assert list(tmp_path.iterdir()) == []
    assert datamodule_of.trainer is not None
    with pytest.raises(TypeError, match="allowed: scope"):
        check(Net(), Rows(), norm="l2")


def test_what_fails_at_the_end_of_a_fit_fails_here_in_the_same_words(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no double backward")

    monkeypatch.setattr("lightning_muter.snapshot.part.take_snapshot", fail)
    found = check(Net(), Rows(), threat_model=THREAT)
    assert levels(found) == ["blocks"]
    assert "A trial on 16 rows failed: RuntimeError: no double backward" in str(found.findings[-1])


def test_a_fit_that_does_not_begin_is_a_finding():
    class Broken(Net):
        def configure_optimizers(self):
            raise ValueError("no such optimiser")

    found = check(Broken(), Rows(), threat_model=THREAT)
    assert levels(found) == ["blocks"]
    assert "ValueError: no such optimiser" in str(found)


def test_the_estimate_is_of_the_right_size():
    found = check(Net(), Rows(), threat_model=THREAT)
    began = time.perf_counter()
    take_snapshot(Net(), DATA, threat_model=THREAT, weight_decay=1e-2, progress=False)
    spent = time.perf_counter() - began
    assert found.seconds < 20 * spent + 2
    assert found.seconds > spent / 50


def test_findings_as_a_table_on_a_terminal_and_as_a_list_elsewhere(monkeypatch, capsys):
    some = [
        Finding("note", "good to know"),
        Finding("warning", "less meaning", "do this", "--trainer.precision 32-true"),
        Finding("skip", "no decay"),
    ]
    with pytest.warns(UserWarning, match=r"- weaker: less meaning do this Command line: --trainer.precision 32-true"):
        assert "no decay" in enforce(some, show=True)
    real = findings_module.Console
    monkeypatch.setattr(findings_module, "Console", lambda **kw: real(force_terminal=True, width=100, **kw))
    assert "no decay" in enforce(some, show=True)  # no warning: it was shown
    said = capsys.readouterr().err
    assert said.index("no snapshot") < said.index("weaker") < said.index("note")
    assert "--trainer.precision 32-true" in said
    assert as_table(some).row_count == 3
    with pytest.raises(UnsuitableError, match="- blocks: impossible"):
        enforce([Finding("error", "impossible")])


CALLBACKS = [
    "--trainer.callbacks+=lightning_muter.MUterCallback",
    "--trainer.callbacks.threat_model",
    "{norm: l2, eps: 0.03}",
]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "2"]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--model", f"{__name__}.Net", "--data", f"{__name__}.Rows", *QUIET, "--trainer.logger", "false"]
    assert cli.main(["check", *common, *CALLBACKS]) == 0
    assert "End of the fit: about" in capsys.readouterr().out
    assert cli.main(["check", *common, *CALLBACKS, "--model.decay", "0"]) == 1
    out = capsys.readouterr()
    assert "no snapshot" in out.out
    assert "--trainer.callbacks.weight_decay 0.001" in out.out
    assert "would end without a snapshot" in out.err
    assert list(tmp_path.iterdir()) == []
    # and the fix that the table names works as it stands
    assert (
        cli.main(["check", *common, *CALLBACKS, "--trainer.callbacks.weight_decay", "0.001", "--model.decay", "0"]) == 0
    )


@pytest.mark.filterwarnings("ignore")
def test_lines_of_callbacks_work_as_the_readme_has_them(tmp_path, monkeypatch):
    """Each `--trainer.callbacks...` of the README and of the findings, literally, on a small project."""
    monkeypatch.chdir(tmp_path)
    common = [
        "--model",
        f"{__name__}.Net",
        "--data",
        f"{__name__}.Rows",
        *QUIET,
        "--trainer.enable_model_summary",
        "false",
    ]
    readme = (Path(lightning_muter.__file__).parents[1] / "docs" / "recipes" / "command_line.md").read_text()
    (line,) = re.findall(r"^muter fit --model .*$(?:\n +--.*$)*", readme, re.MULTILINE)
    words = line.replace("\\\n", " ").split("#")[0].split()[2:]
    options = [w for w in words if w.startswith("--trainer.callbacks")]
    assert len(options) == 4
    assert cli.main(["fit", *common, *options, "--trainer.default_root_dir", "a"]) == 0
    (path,) = (tmp_path / "a").rglob("*.muter.snapshot")
    assert Snapshot.load(path).threat_model == ThreatModel("linf", 8 / 255)
    assert f"`{options[-1]}`" in readme  # alone, for a module with the mixin
    threat = ["--trainer.callbacks+=lightning_muter.MUterCallback", "--trainer.callbacks.threat_model"]
    assert cli.main(["check", *common, *threat, "{norm: l2, eps: 8/255}", "--trainer.callbacks.scope", "all"]) == 0


def test_representations_fit_on_a_screen():
    net = Net()
    muter = MUterCallback(threat_model=THREAT, verbose=False)
    trainer = L.Trainer(
        max_epochs=1, callbacks=[muter], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(net, Rows())
    polish = muter.snapshot.figures["polish"]
    assert polish["objective_after"] < polish["objective_before"]
    assert polish["head_norm"] > 0
    assert 0 <= polish["robust_accuracy_after"] <= polish["accuracy_after"] <= 1
    result = muter.unlearn(net, range(50), retain=DATA, refine=2)
    result.warnings += ["a long warning " * 40] * 9
    muter.snapshot.warnings += ["another " * 60] * 9
    for thing in (result, muter.snapshot):
        lines = repr(thing).splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 120
    shown = repr(muter.snapshot)
    for words in (
        "150 of 200 (50 forgotten)",
        "weight decay 0.01",
        "l2, eps=0.03",
        "cross_entropy",
        "accuracy",
        "objective",
    ):
        assert words in shown
    assert "50 (0, 1, 2, 3, 4, 5, 6, 7 and 42 more); 150 are retained" in repr(result)


def test_the_name_is_public():
    assert "check" in lightning_muter.__all__
