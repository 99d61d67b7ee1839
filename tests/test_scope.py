"""A further kind of scope is one file: here the bias of the last layer, by every door. And no door tells kinds of scopes apart."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_muter
from lightning_muter import MUterCallback, Snapshot, ThreatModel, refresh, take_snapshot, unlearn
from lightning_muter.curvature.inner.maximiser import InnerSolver, Smoothing
from lightning_muter.curvature.response.choose import as_response
from lightning_muter.errors import ArgumentError, MismatchError
from lightning_muter.model.dataset import SampleSource
from lightning_muter.model.reading import Reading
from lightning_muter.scope import choose
from lightning_muter.scope.asked import Take
from lightning_muter.scope.base import Extent, Proposal, Removal, Retained, Scope
from lightning_muter.scope.head import HeadScope
from lightning_muter.scope.network import NetworkScope
from lightning_muter.snapshot.stored import Stored
from lightning_muter.storage.fingerprint import weight_fingerprint
from lightning_muter.unlearning.result import UnlearnResult
from tests.fits import Plain, loader_of, short_trainer, table
from tests.networks import data, relu_net

ROOT = Path(lightning_muter.__file__).parent
THREAT, LAMBDA = ThreatModel("l2", 0.0), 0.01


@dataclass(kw_only=True, repr=False)
class BiasSnapshot(Stored):
    """Nothing but the rows, their loss and lambda."""

    reads_retained = True
    decay: dict[str, float]

    @property
    def scope(self) -> str:
        return "bias"


@dataclass(frozen=True)
class BiasScope(Scope[BiasSnapshot]):
    """The bias of the last layer: one Newton step on the retained rows, without an adversary."""

    record = BiasSnapshot
    useless = ("budget", "fit", "examples", "tolerance", "like", "resume", "trades_beta")
    refusal = ("None for a bias", "It is solved at once.")
    polishing = (0, "steps")

    @classmethod
    def of(cls, snapshot: BiasSnapshot) -> BiasScope:
        return cls()

    def extent(self, module: nn.Module, reading: Reading | None, cap: int) -> Extent | None:
        return None if reading is None else Extent([f"{reading.head.name}.bias"], damped=True)

    def take(self, asked: Take) -> BiasSnapshot:
        self.check_useful(asked)
        reading = asked.read_all()
        source = asked.rows(reading, THREAT, asked.dataset)
        return BiasSnapshot(
            **asked.identity(source, reading),
            decay={f"{reading.head.name}.bias": LAMBDA},
            response=as_response("auto", THREAT),
            smoothing=Smoothing(),
            inner=InnerSolver(),
            fingerprint=weight_fingerprint(asked.model.state_dict()),
            stationarity=float(slope(asked.model, reading, source, range(source.n))[0].norm()),
            figures={"seconds": 0.0, "passes": 1},
        )

    def refresh(self, left: Retained[BiasSnapshot], polish: str | int, progress: bool) -> BiasSnapshot:
        return replace(left.snapshot, fingerprint=weight_fingerprint(left.model.state_dict()))

    def check(self, asked: Any) -> None:
        if asked.method is not None:
            raise ArgumentError("method", asked.method, *self.refusal)

    def propose(self, removal: Removal[BiasSnapshot]) -> Proposal:
        model, reading, head = removal.model, removal.reading, removal.reading.head
        source = removal.access.source(reading, THREAT, removal.access.retain or removal.data, removal.kept)
        gradient, hessian = slope(model, reading, source, removal.kept)
        step = torch.linalg.solve(hessian, gradient)
        result = UnlearnResult(
            "newton", "none", "bias", removal.positions, len(removal.kept), float(step.norm()), {"status": "converged"},
            fingerprint_before=removal.snapshot.fingerprint, dry_run=removal.access.dry_run,
        )  # fmt: skip
        after = removal.snapshot.without(removal.positions)
        return Proposal(result, after, [head.linear.bias], lambda: shift(head.linear.bias, step), said=[])

    def difference(self, left: Retained[BiasSnapshot]) -> tuple[float, float]:
        return 0.0, 0.0


def shift(bias: Tensor, step: Tensor) -> None:
    with torch.no_grad():
        bias.sub_(step)


def slope(model: nn.Module, reading: Reading, source: SampleSource, rows: Any) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of sum l_i + |rows| (lambda / 2) |b|^2 in the bias b."""
    bias = reading.head.linear.bias.detach()
    with torch.no_grad():
        batches = [(model(batch.x), batch.y) for batch in source.batches(list(rows))]

    def objective(b: Tensor) -> Tensor:
        total = len(rows) * LAMBDA / 2 * (b**2).sum()
        return total + sum(reading.loss(z + b - bias, y, reduction="none").sum() for z, y in batches)

    return torch.func.grad(objective)(bias), torch.func.hessian(objective)(bias)


@pytest.fixture(autouse=True)
def _exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "KINDS", (*choose.KINDS, BiasScope))


@pytest.mark.filterwarnings("ignore:(The weights are not stationary|The scope leaves)")
def test_what_is_asked_for_and_what_was_stored_mean_a_scope() -> None:
    assert choose.as_scope("head") == HeadScope()
    assert choose.as_scope(["0.*"]) == NetworkScope(["0.*"])
    assert choose.as_scope(BiasScope()) == BiasScope()
    snapshot = take_snapshot(
        relu_net(), data(20, 6), scope=["0.*"], threat_model=THREAT, weight_decay=1.0, progress=False
    )
    assert choose.scope_of(snapshot) == NetworkScope(["0.*"])


def test_a_further_kind_goes_through_every_door(tmp_path: Path) -> None:
    model, rows = relu_net(), data(40, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taken = take_snapshot(model, rows, scope=BiasScope(), threat_model=THREAT, progress=False)
    taken.save(tmp_path / "a.muter.snapshot")
    snapshot = Snapshot.load(tmp_path / "a.muter.snapshot")
    assert (type(snapshot), snapshot.fingerprint) == (BiasSnapshot, taken.fingerprint)
    assert "BiasSnapshot of bias" in str(snapshot)
    assert unlearn(model, snapshot, [3, 7], rows, dry_run=True, progress=False).dry_run
    result = unlearn(model, snapshot, [3, 7], rows, progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"2.bias"}
    assert (snapshot.forgotten, result.n_retained, result.scope) == ([3, 7], 38, "bias")
    again = unlearn(model, snapshot, [5], rows, progress=False)
    assert again.step_norm < result.step_norm  # the first step solved for the rest
    assert refresh(model, snapshot, rows, progress=False).forgotten == [3, 7, 5]
    with pytest.raises(ArgumentError, match="None for a bias"):
        take_snapshot(model, rows, scope=BiasScope(), threat_model=THREAT, budget=1.0, progress=False)
    with pytest.raises(MismatchError, match="samples are not what was trained on"):
        unlearn(model, snapshot, [0], TensorDataset(*(t.flip(0) for t in rows.tensors)), progress=False)


def test_a_direct_part_that_is_known_of_a_head_alone_is_refused_beyond_it() -> None:
    with pytest.raises(ArgumentError, match="'ggn' or 'hessian' beyond the head"):
        take_snapshot(relu_net(), data(20, 6), scope="all", curvature="fisher", threat_model=THREAT, weight_decay=0.1)


def test_a_callback_takes_it_at_the_end_of_a_fit(tmp_path: Path) -> None:
    rows, muter = table(), MUterCallback(BiasScope(), threat_model=THREAT, verbose=False)  # type: ignore[arg-type]
    module = Plain(kind="tanh").double()
    with pytest.warns(UserWarning, match="3 parameters outside the scope"):
        short_trainer(tmp_path, muter, epochs=1).fit(module, loader_of(rows))
    assert isinstance(muter.snapshot, BiasSnapshot)
    assert muter.unlearn(module, [3, 17]).n_retained == len(rows) - 2


def told_apart(tree: ast.AST) -> list[int]:
    """Lines that ask which kind a scope or its snapshot is."""
    kinds = {"Snapshot", "WideSnapshot", "HeadScope", "NetworkScope"}
    found = []
    for node in ast.walk(tree):
        inside = list(ast.walk(node))
        asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        compares = isinstance(node, ast.Compare) and "scope" in ast.unparse(node.left)
        if (asks and kinds & {n.id for n in inside if isinstance(n, ast.Name)}) or (
            compares and any(isinstance(n, ast.Constant) and n.value == "head" for n in inside)
        ):
            found.append(node.lineno)
    return found


def test_no_door_tells_kinds_of_scopes_apart() -> None:
    assert told_apart(ast.parse("isinstance(a, (int, Snapshot))\nscope == 'head'\nf(scope) != 3")) == [1, 2]
    #: what a constructor takes, what old files say, and whether a command was told a scope
    allowed = {"callback.py", "snapshot/format_1.py", "deletion/trainer.py"}
    found = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if told_apart(ast.parse(path.read_text()))}
    assert {name for name in found - allowed if not name.startswith("scope/")} == set()
