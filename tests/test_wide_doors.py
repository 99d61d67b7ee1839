"""Scopes beyond the head through every door: callback, `unlearn`, files, the command `muter`, preflight."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_muter import (
    AdversarialTraining,
    MUterCallback,
    Snapshot,
    ThreatModel,
    WideSnapshot,
    refresh,
    take_snapshot,
    take_wide_snapshot,
    unlearn,
    unlearn_wide,
)
from lightning_muter.adversarial.climb import LossAttack
from lightning_muter.errors import ArgumentError, CorruptFileError, MismatchError, RequestError, UnsuitableError
from lightning_muter.snapshot.stored import KIND
from lightning_muter.solvers.cg import CG
from lightning_muter.storage.container import read_container, write_container
from lightning_muter.storage.fingerprint import weight_fingerprint
from lightning_muter.study.methods.newton_cg import NewtonCG
from tests.commands import muter, weights
from tests.commands import unlearn as unlearn_by_command
from tests.fits import Plain, l2_attack, loader_of, short_trainer, table
from tests.networks import data, relu_net
from tests.worlds import answer, distance, world_of

THREAT = ThreatModel("l2", 0.05)


@pytest.fixture(autouse=True)
def _notes_are_tested_elsewhere() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="(The weights are not stationary|The last system ended|The scope leaves)"
        )
        yield


def stored(scope: Any = "all", **options: Any) -> tuple[Any, TensorDataset, WideSnapshot]:
    model, dataset = relu_net(), data(30, 6)
    options = {"threat_model": THREAT, "weight_decay": 0.01, "progress": False} | options
    return model, dataset, take_wide_snapshot(model, dataset, scope=scope, **options)


def flat(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_stored_request_is_the_direct_one() -> None:
    model, dataset, snapshot = stored()
    result = unlearn(model, snapshot, [3, 7], dataset, refine=1, progress=False)
    other = relu_net()
    direct = unlearn_wide(
        other, [3, 7], dataset, threat_model=THREAT, weight_decay=0.01, steps=2, inner=snapshot.inner, progress=False
    )
    assert torch.equal(flat(model), flat(other))
    assert (result.bound, result.scope, result.method) == (None, "all", direct.method)
    assert result.stationarity_after == direct.stationarity_after
    assert snapshot.forgotten == [3, 7]
    assert snapshot.fingerprint == result.fingerprint_after == weight_fingerprint(model.state_dict())
    assert not bool(snapshot.digests[[3, 7]].any())


def test_the_next_request_leaves_out_the_former_rows(tmp_path: Path) -> None:
    model, dataset, snapshot = stored()
    unlearn(model, snapshot, [3], dataset, progress=False)
    snapshot.save(tmp_path / "a.muter.snapshot")
    again = Snapshot.load(tmp_path / "a.muter.snapshot")
    blank = TensorDataset(dataset.tensors[0].clone(), dataset.tensors[1])
    blank.tensors[0][3] = float("nan")  # gone from the disk
    result = unlearn(model, again, [5], blank, progress=False)
    assert result.n_retained == 28
    assert again.forgotten == [3, 5]
    with pytest.raises(RequestError, match="forgotten before"):
        unlearn(model, again, [5], blank, progress=False)


def test_files_keep_everything(tmp_path: Path) -> None:
    _, _, snapshot = stored(["0.*"], trades_beta=2.0, sample_weight=torch.linspace(1, 2, 30))
    path = tmp_path / "a.muter.snapshot"
    snapshot.save(path)
    loaded = Snapshot.load(path)
    assert isinstance(loaded, WideSnapshot)
    (fields, tensors), (others, more) = snapshot.encoded(), loaded.encoded()
    assert fields == others
    assert all(torch.equal(tensor, more.pop(name)) for name, tensor in tensors.items())
    assert not more
    assert loaded.key is not None
    assert loaded.scope == "0.*"
    assert loaded.decay == {"0.weight": 0.01, "0.bias": 0.01}
    assert loaded.nbytes < 1500  # nothing that grows with the square, or even the number, of the parameters
    meta, tensors = read_container(path, KIND)
    for change in ({"decay": {"0.weight": 0.01}}, {"curvature": "fisher"}, {"patterns": []}, {"n_total": 29}):
        write_container(path, KIND, meta | {"fields": meta["fields"] | change}, tensors)
        with pytest.raises(CorruptFileError):
            Snapshot.load(path)


def test_one_door_takes_every_scope() -> None:
    options: dict[str, Any] = {"threat_model": THREAT, "weight_decay": 0.01, "progress": False}
    model, dataset, wide = stored(["0.*"], polish=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        one = take_snapshot(relu_net(), dataset, scope=["0.*"], polish=1, **options)
        stored(["0.*"])
    assert (one.patterns, one.fingerprint, one.curvature) == (wide.patterns, wide.fingerprint, "ggn")
    assert {w.filename for w in said if "The scope leaves" in str(w.message)} == {__file__}
    with pytest.raises(ArgumentError, match=r"tolerance: got 1\.0; allowed: None beyond the head"):
        take_snapshot(model, dataset, scope="all", tolerance=1.0, **options)
    with pytest.raises(ArgumentError, match=r"trades_beta: got 2\.0; allowed: None for a head"):
        take_snapshot(model, dataset, trades_beta=2.0, **options)


def test_other_weights_data_scopes_and_losses_are_refused_and_nothing_changes() -> None:
    model, dataset, snapshot = stored()
    before = flat(model)
    moved = TensorDataset(dataset.tensors[0] * 0.9, dataset.tensors[1])

    def refused(error: type[Exception], match: str, *, changed: Any = None, **options: Any) -> None:
        with pytest.raises(error, match=match):
            unlearn(model, snapshot, [1], changed or dataset, progress=False, **options)

    refused(MismatchError, "samples are not what was trained on", changed=moved)
    refused(MismatchError, "retain", retain=moved)
    refused(MismatchError, "loss: got", loss=torch.nn.MultiMarginLoss())
    refused(ArgumentError, "beyond the head", solver="cholesky")
    refused(ArgumentError, "refine", refine=-1)
    refused(ArgumentError, "method", method=object())
    model[0].bias.requires_grad_(False)
    refused(MismatchError, "covers 3 trainable parameters")
    model[0].bias.requires_grad_(True)
    with warnings.catch_warnings():  # a warning that is an error comes before anything is written
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="last system"):
            unlearn(model, snapshot, [1], dataset, solver=CG(max_iter=1), progress=False)
    assert torch.equal(flat(model), before)
    assert snapshot.forgotten == []
    with torch.no_grad():
        model[0].bias.add_(1)
    refused(MismatchError, "fingerprint")


def test_polish_and_refresh() -> None:
    model, dataset, snapshot = stored(polish=6)
    assert snapshot.stationarity < 0.3 * snapshot.figures["stationarity_before"]
    unlearn(model, snapshot, [1], dataset, progress=False)
    new = refresh(model, snapshot, dataset, progress=False)
    assert new.forgotten == [1]
    assert new.fingerprint == snapshot.fingerprint
    assert new.stationarity == pytest.approx(snapshot.stationarity, rel=0.2)


@pytest.mark.parametrize("beta", [None, 2.0])
def test_the_callback_takes_wide_scopes(tmp_path: Path, beta: float | None) -> None:
    torch.manual_seed(0)
    dataset, module = table(), Plain(2, "hidden").double()
    attack = AdversarialTraining(LossAttack(ThreatModel("l2", 0.05), steps=2), trades_beta=beta)
    muter_callback = MUterCallback(scope="all", dirpath=tmp_path, verbose=False)
    short_trainer(tmp_path, attack, muter_callback).fit(module, loader_of(dataset))
    snapshot = muter_callback.snapshot
    assert isinstance(snapshot, WideSnapshot)
    assert snapshot.trades_beta == beta
    assert snapshot.parameters == [n for n, _ in module.named_parameters()]
    before = flat(module)
    result = muter_callback.unlearn(module, [3, 17], refine=1)
    assert not torch.equal(flat(module), before)
    assert len(result.refine) <= 2
    assert Snapshot.load(muter_callback.paths["snapshot"]).forgotten == []
    muter_callback.save()
    assert Snapshot.load(muter_callback.paths["snapshot"]).forgotten == [3, 17]
    assert len(muter_callback.retained(dataset)) == 158


def test_bad_scopes_fail_at_fit_start(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="A pattern goes in a list"):
        MUterCallback(scope="net.*")
    module = Plain(2, "hidden").double()
    with pytest.raises(UnsuitableError, match="encoder"):
        short_trainer(tmp_path, l2_attack(), MUterCallback(scope=["encoder.*"], verbose=False)).fit(
            module, loader_of(table())
        )


def test_without_decay_damping_carries_a_wide_scope(tmp_path: Path) -> None:
    module, callback = Plain(2, "hidden", decay=0.0).double(), MUterCallback(scope=["net.2.*"], verbose=False)
    with pytest.warns(UserWarning, match="Weight decay is 0 for net.2.weight"):
        short_trainer(tmp_path, l2_attack(0.05), callback).fit(module, loader_of(table()))
    assert callback.snapshot is not None


def test_the_command_line_unlearns_a_wide_scope(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in folder.glob("last.muter*"):
        path.unlink() if path.is_file() else [p.unlink() for p in path.iterdir()]
    assert muter("snapshot", "--config", "threat.yaml", "--scope", "all") == 0
    before = weights()
    assert unlearn_by_command("--forget.indices", "[3,17]", "--refine", "2") == 0
    assert not torch.equal(weights()["layer.weight"], before["layer.weight"])
    snapshot = Snapshot.load("last.muter.snapshot")
    assert isinstance(snapshot, WideSnapshot)
    assert snapshot.forgotten == [3, 17]
    receipt = json.loads(next(Path("last.muter.receipts").glob("000002-*.json")).read_text())
    assert (receipt["scope"], receipt["method"]) == ("all", "newton-cg")
    assert muter("refresh") == 0
    assert muter("audit", "--verify") == 0
    assert "scope all" in capsys.readouterr().out


def test_it_competes_in_a_study_and_comes_as_near_as_refinement() -> None:
    world = world_of("l2", 0.2)
    outcome = answer(world, NewtonCG(steps=6))
    assert outcome.parameters is not None
    assert outcome.status in ("converged", "flat")
    assert distance(world, outcome) < 0.05
    partly = answer(world, NewtonCG(scope=["head.weight"], steps=1))
    assert distance(world, partly) < 1.0
