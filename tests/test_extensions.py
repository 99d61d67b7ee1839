"""A user's Response, Solver, Method and Ball through every door: fit, save, load, unlearn, the command `muter`."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_muter import AdversarialTraining, MUterCallback, Snapshot, ThreatModel, unlearn
from lightning_muter.adversarial.climb import LossAttack
from lightning_muter.cli import main
from lightning_muter.curvature.response.choose import L2Response, NoResponse, Response
from lightning_muter.errors import ArgumentError, CorruptFileError, UnsuitableError
from lightning_muter.snapshot.stored import KIND
from lightning_muter.storage.container import read_container, write_container

HERE = Path(__file__).parent
CONFIG = """\
model: {class_path: userextensions.OwnNet}
data: {class_path: userproject.UserData}
trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}
"""
#: Threat model, response, and the response that is stored.
CHOICES = {
    "response": ("l2", {"class_path": "userextensions.Share", "init_args": {"share": 0.25}}, "share"),
    "ball": ("l1", "auto", "none"),
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The user's module, imported as users import theirs: from the folder they work in."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("userproject.py", "userextensions.py"):
        shutil.copy(HERE / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.chdir(folder)
        yield importlib.import_module("userextensions")
    for name in ("userproject", "userextensions"):
        sys.modules.pop(name, None)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", logger=False, max_epochs=2, callbacks=list(callbacks), **quiet, **options)


def fit(own: Any, folder: Path, norm: str, response: Any) -> tuple[Any, Any, MUterCallback]:
    torch.manual_seed(0)
    data, module = sys.modules["userproject"].UserData(), own.OwnNet()
    threat = ThreatModel(norm, 0.1, None)
    muter = MUterCallback(response=response, solver=own.Eigen(), dirpath=folder, verbose=False)
    trainer(AdversarialTraining(LossAttack(threat, steps=2)), muter).fit(module, datamodule=data)
    return module, data.rows, muter


@pytest.mark.parametrize("choice", CHOICES)
def test_through_the_callback_and_files(own: Any, tmp_path: Path, choice: str) -> None:
    norm, response, stored = CHOICES[choice]
    module, data, muter = fit(own, tmp_path, norm, own.Share(0.25) if choice == "response" else response)
    loaded = Snapshot.load(muter.paths["snapshot"])
    assert loaded.threat_model == ThreatModel(norm, 0.1, None)
    assert loaded.response.name == stored
    assert vars(loaded.response).keys() == vars(muter.snapshot.response).keys()
    again = own.OwnNet()
    again.load_state_dict(module.state_dict())
    first = muter.unlearn(module, [3, 17], retain=data, refine=1, method=own.Cautious(0.5))
    second = unlearn(again, loaded, [3, 17], data, retain=data, refine=1, method=own.Cautious(0.5), solver=own.Eigen())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    for result in (first, second):
        assert (result.method, result.response, result.solver["status"]) == ("cautious", stored, "converged")
        assert result.stationarity_after < result.stationarity_before  # type: ignore[operator]
    assert (first.bound is None) == (norm == "l1")
    assert any("norm 'l1'" in note for note in first.warnings) == (norm == "l1")


@pytest.mark.parametrize("choice", CHOICES)
def test_through_the_command_line(own: Any, tmp_path: Path, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, response, stored = CHOICES[choice]
    monkeypatch.chdir(tmp_path)
    module = own.OwnNet()
    runner = trainer()
    runner.fit(module, datamodule=sys.modules["userproject"].UserData())
    runner.save_checkpoint("last.ckpt", weights_only=False)
    Path("config.yaml").write_text(CONFIG)
    threat = {"norm": norm, "eps": 0.1, "box": None}
    Path("snapshot.yaml").write_text(json.dumps({"threat_model": threat, "response": response}))
    common = ["--config", "config.yaml", "--ckpt_path", "last.ckpt"]
    assert main(["snapshot", *common, "--config", "snapshot.yaml"]) == 0
    snapshot = Snapshot.load("last.muter.snapshot")
    assert (snapshot.threat_model, snapshot.response.name) == (ThreatModel(norm, 0.1, None), stored)
    asked = {"method": {"class_path": "userextensions.Cautious", "init_args": {"part": 0.5}}, "solver": "eigen"}
    Path("request.yaml").write_text(json.dumps(asked))
    assert main(["unlearn", *common, "--config", "request.yaml", "--forget.indices", "[3,17]"]) == 0
    receipt = json.loads(next(Path("last.muter.receipts").glob("000002-*.json")).read_text())
    assert receipt["method"] == "cautious"
    assert Snapshot.load("last.muter.snapshot").forgotten == [3, 17]


def test_what_no_file_could_restore_is_refused_before_the_fit(own: Any, tmp_path: Path) -> None:
    class Nameless(NoResponse):
        pass

    class Forgetful(NoResponse):
        name = "forgetful"

        def __init__(self, power: float) -> None:
            pass

    data = sys.modules["userproject"].UserData()
    attack = AdversarialTraining(LossAttack(ThreatModel("l2", 0.1, None), steps=1))
    cases = {"name of its own": Nameless(), "attributes.*power": Forgetful(2.0), "a Response of": "mine"}
    for why, response in cases.items():
        module, runner = own.OwnNet(), trainer(attack, MUterCallback(response=response, verbose=False))
        before = module.layer.weight.clone()
        with pytest.raises(UnsuitableError, match=why):
            runner.fit(module, datamodule=data)
        assert torch.equal(module.layer.weight, before)


def test_two_classes_cannot_share_a_name() -> None:
    with pytest.raises(ArgumentError, match=r"name: got 'l2'.*L2Response has it.*choose another"):

        class Mine(Response):
            name = "l2"

    class Better(L2Response):
        """Inherits a name, which stands for the other class."""

    assert Response.named("l2") is L2Response


def test_a_ball_that_was_not_imported_is_named(own: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"norm: got 'l7'.*'l2', 'linf'.*import it"):
        ThreatModel("l7", 0.1)
    _, _, muter = fit(own, tmp_path, "l2", "none")
    meta, tensors = read_container(muter.paths["snapshot"], KIND)
    meta["fields"]["threat_model"]["norm"] = "l7"
    write_container(tmp_path / "a.muter.snapshot", KIND, meta, tensors)
    with pytest.raises(CorruptFileError, match=r"norm: got 'l7'.*import it"):
        Snapshot.load(tmp_path / "a.muter.snapshot")
