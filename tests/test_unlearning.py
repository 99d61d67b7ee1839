"""Unlearning: what the formula says, any order of requests, every wrong input, and failures that leave no trace."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.response.choose import Unconstrained
from lightning_muter.errors import ArgumentError, MismatchError, MuterError, RequestError, SolveError, UnsuitableError
from lightning_muter.snapshot.refreshing import refresh
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.take import take_snapshot
from lightning_muter.solvers.cg import CG
from lightning_muter.solvers.dense import Schur
from lightning_muter.solvers.neumann import Neumann
from lightning_muter.unlearning.unlearn import unlearn
from tests.cases import THREATS, Case, case, make
from tests.heads import forget_from, head_of, snapshot_of, state

NONE = ThreatModel("l2", 0.0)


# -- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_ridge_without_an_adversary_is_retraining(bias):
    """A quadratic objective: one Newton step ends exactly at the retained minimiser."""
    one = make("affine", "square", bias=bias)
    snapshot = snapshot_of(one, NONE)
    assert snapshot.stationarity < 1e-6
    forget = [2, 9, 5]
    result = forget_from(one, snapshot, forget, retain=one.dataset)
    kept = [i for i in range(len(one.x)) if i not in forget]
    phi = one.backbone(one.x[kept])
    a = torch.cat([phi, torch.ones(len(kept), 1, dtype=torch.float64)], 1) if bias else phi
    system = 2 * a.T @ a + one.decay * len(kept) * torch.eye(a.shape[1], dtype=torch.float64)
    exact = torch.linalg.solve(system, 2 * a.T @ one.y[kept])
    torch.testing.assert_close(head_of(one), exact, rtol=1e-8, atol=1e-10)
    assert result.stationarity_after is not None
    assert result.stationarity_after < 1e-10
    assert result.bound is not None
    assert result.bound < 1e-8
    assert result.n_retained == snapshot.n_retained == len(kept)


def test_one_step_is_newton_on_the_retained_objective():
    """w_u = w - H_R^-1 grad F_R(w), with H_R and grad F_R summed over the retained samples themselves."""
    one = case("affine-softmax-weighted")
    snapshot = snapshot_of(one)
    before = snapshot.theta_ref.clone()
    kept = [i for i in range(len(one.x)) if i not in (4, 1)]
    objective = one.objective(THREATS["l2-box"])
    objective.positions = kept
    sums, delta = objective.sums(before, response=snapshot.response)
    assert sums.hessian is not None
    h = sums.hessian.dense() + len(kept) * one.decay * torch.eye(before.numel(), dtype=torch.float64)
    gradient = objective.evaluation(before, sums, delta).gradient
    expected = before - torch.linalg.solve(h, gradient.flatten()).reshape(before.shape)
    result = forget_from(one, snapshot, [4, 1])
    torch.testing.assert_close(one.head.weight.detach(), expected, rtol=1e-8, atol=1e-10)
    assert result.step_norm == pytest.approx(float((expected - before).norm()), rel=1e-6)


@pytest.mark.parametrize("solver", ["auto", "cg", Neumann(30_000, tolerance=1e-12), "schur"], ids=str)
@pytest.mark.parametrize("key", ["l2-box", "linf-box"])
@pytest.mark.parametrize("name", ["linear-softmax-bias", "affine-softmax-weighted", "smooth-softmax-bias"])
def test_every_solver_gives_the_same_weights(name, key, solver):
    one = case(name)
    snapshot = snapshot_of(one, THREATS[key], tolerance=0.05)
    other, copied = copy.deepcopy(one), copy.deepcopy(snapshot)
    forget_from(one, snapshot, [7, 3], solver=solver)
    forget_from(other, copied, [7, 3], solver="cholesky")
    torch.testing.assert_close(head_of(one), head_of(other), rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:The inner maximiser converged")  # kinks of the ReLU
@pytest.mark.parametrize("key", ["l2-box", "linf-box"])
@pytest.mark.parametrize(
    "name", ["linear-softmax-bias", "affine-softmax-weighted", "smooth-softmax-bias", "relu-softmax"]
)
def test_successive_requests_are_their_union_in_any_order_and_batch(name, key):
    one = case(name)
    snapshot = snapshot_of(one, THREATS[key], tolerance=0.05)
    ways = [([[2, 8, 11, 5]], 1024), ([[8, 2], [5, 11]], 3), ([[11], [5], [8], [2]], 1)]
    ends, statistics = [], []
    for requests, batch_size in ways:
        mine, taken = copy.deepcopy(one), copy.deepcopy(snapshot)
        for forget in requests:
            forget_from(mine, taken, forget, batch_size=batch_size)
        ends.append(head_of(mine))
        statistics.append((taken.hessian.blocks, taken.gradient))
        assert sorted(taken.forgotten) == [2, 5, 8, 11]
        assert not taken.digests[[2, 5, 8, 11]].any()
    for end, (blocks, gradient) in zip(ends[1:], statistics[1:], strict=True):
        assert (end - ends[0]).norm() < 1e-10 * ends[0].norm()
        assert (blocks - statistics[0][0]).norm() < 1e-10 * blocks.norm()
        assert (gradient - statistics[0][1]).norm() < 1e-10 * snapshot.theta_ref.norm() * len(one.x)


def test_requests_after_a_refinement_step_from_the_refined_weights():
    one = case("linear-softmax-bias")
    snapshot = snapshot_of(one, THREATS["l2"])
    forget_from(one, snapshot, [1, 2], retain=one.dataset, refine=6)
    assert not torch.equal(snapshot.theta_base, snapshot.theta_ref)
    before = head_of(one)
    result = forget_from(one, snapshot, [3], retain=one.dataset, refine=6)
    # beside a model that forgot all three at once, both being refined: the same minimiser
    other = case("linear-softmax-bias")
    taken = snapshot_of(other, THREATS["l2"])
    forget_from(other, taken, [3, 1, 2], retain=other.dataset, refine=12)
    assert (head_of(one) - head_of(other)).norm() < 1e-3 * (head_of(one) - before).norm()
    assert result.stationarity_after is not None
    assert result.stationarity_before is not None
    assert result.stationarity_after < 1e-2 * result.stationarity_before


def test_refresh_forgets_the_old_weights_and_keeps_positions():
    one = case("linear-softmax-bias")
    snapshot = snapshot_of(one, THREATS["l2"])
    forget_from(one, snapshot, [0, 6])
    fresh = refresh(one.net, snapshot, one.dataset, loss=one.loss, progress=False)
    assert fresh.forgotten == [0, 6]
    assert fresh.n_total == len(one.x)
    assert not fresh.digests[[0, 6]].any()
    assert fresh.stationarity < 1e-6
    fresh.check_model(one.net)
    with pytest.raises(RequestError, match="forgotten before"):
        forget_from(one, fresh, [6])
    forget_from(one, fresh, [15])
    direct = case("linear-softmax-bias")
    taken = snapshot_of(direct, THREATS["l2"])
    forget_from(direct, taken, [0, 6, 15], retain=direct.dataset, refine=8)
    assert (head_of(one) - head_of(direct)).norm() < 0.05 * head_of(one).norm()


# -- accuracy ---------------------------------------------------------------------------------------------------------


def _digits(n: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(np.ascontiguousarray(x[:n] / 16.0)), torch.from_numpy(y[:n])


def _relative_distances(threat: ThreatModel, runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """|w_u - w_retrained| / |w - w_retrained| on digits, softmax regression."""
    x, y = _digits(300)
    torch.manual_seed(0)
    net = nn.Linear(64, 10, dtype=torch.float64)
    base: dict[str, Any] = {"threat_model": threat, "weight_decay": 1e-2, "progress": False}
    snapshot = take_snapshot(net, TensorDataset(x, y), **base)
    direct = take_snapshot(net, TensorDataset(x, y), response="none", polish=0, like=snapshot, **base)
    forget = list(range(0, 300, 20))
    kept = [i for i in range(300) if i not in forget]
    retrained = nn.Linear(64, 10, dtype=torch.float64)
    nn.init.zeros_(retrained.weight)
    nn.init.zeros_(retrained.bias)
    smoothing = snapshot.smoothing
    end = take_snapshot(
        retrained,
        TensorDataset(x[kept], y[kept]),
        smoothing=smoothing if smoothing.anchor is not None else None,
        tolerance=1e-7,
        **base,
    )
    scale = (snapshot.theta_ref - end.theta_ref).norm()
    found = {}
    for name, kwargs in runs.items():
        options = dict(kwargs)
        taken = copy.deepcopy(direct if options.pop("direct", False) else snapshot)
        mine = copy.deepcopy(net)
        unlearn(mine, taken, forget, TensorDataset(x, y), progress=False, **options)
        theta = torch.cat([mine.weight, mine.bias[:, None]], 1).detach()
        found[name] = float((theta - end.theta_ref).norm() / scale)
    return found


def test_softmax_on_digits_comes_close_to_retraining():
    x, y = _digits(300)
    found = _relative_distances(
        ThreatModel("l2", 0.25),
        {"one": {}, "two": {"refine": 2, "retain": TensorDataset(x, y)}, "direct": {"direct": True}},
    )
    assert found["one"] < 0.12, found
    assert found["two"] < 0.01, found
    assert found["direct"] > 4 * found["one"], found


def test_softmax_on_digits_against_the_other_norm():
    x, y = _digits(300)
    found = _relative_distances(
        ThreatModel("linf", 0.05),
        {"one": {}, "two": {"refine": 2, "retain": TensorDataset(x, y)}, "direct": {"direct": True}},
    )
    assert found["one"] < 0.3, found
    assert found["two"] < 0.1, found
    assert found["direct"] > 2 * found["one"], found


# -- wrong inputs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared() -> tuple[Case, Snapshot]:
    one = case("linear-softmax-bias")
    snapshot = snapshot_of(one, THREATS["l2"])
    forget_from(one, snapshot, [15])
    return one, snapshot


class Plain(Dataset[Any]):
    """A dataset of lists, some rows of which cannot be read."""

    def __init__(self, x: Tensor, y: Tensor, gone: tuple[int, ...] = ()) -> None:
        self.x, self.y, self.gone = x, y, gone

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        if i in self.gone:
            raise OSError(f"row {i} was deleted")
        return self.x[i], self.y[i]


def _changed(one: Case, row: int, value: float = 0.123) -> TensorDataset:
    x = one.x.clone()
    x[row, 0] = value
    return TensorDataset(x, one.y)


WRONG: list[tuple[str, dict[str, Any], type[MuterError], list[str]]] = [
    ("empty", {"forget": []}, ArgumentError, ["forget", "[]", "at least one"]),
    ("out of range", {"forget": [3, 16]}, ArgumentError, ["forget", "16", "0 to 15"]),
    ("negative", {"forget": [-1]}, ArgumentError, ["forget", "-1", "0 to 15"]),
    ("twice", {"forget": [3, 4, 3]}, ArgumentError, ["forget", "3", "once"]),
    ("forgotten", {"forget": [3, 15]}, RequestError, ["forget", "15", "before"]),
    ("everything", {"forget": range(15)}, RequestError, ["forget", "15", "fewer"]),
    ("a fraction", {"forget": [1.5]}, ArgumentError, ["forget", "1.5", "whole"]),
    ("a truth value", {"forget": [True]}, ArgumentError, ["forget", "True", "whole"]),
    ("a number", {"forget": 3}, ArgumentError, ["forget", "3", "positions"]),
    ("a 0-d tensor", {"forget": torch.tensor(3)}, ArgumentError, ["forget", "3", "positions"]),
    ("a name", {"forget": "3"}, ArgumentError, ["forget", "3", "positions"]),
    ("negative refine", {"forget": [3], "refine": -1}, ArgumentError, ["refine", "-1", "0 or larger"]),
    ("refine alone", {"forget": [3], "refine": 2}, ArgumentError, ["refine", "2", "retain"]),
    ("unknown solver", {"forget": [3], "solver": "gauss"}, ArgumentError, ["solver", "gauss", "cholesky"]),
    ("another loss", {"forget": [3], "loss": F.multi_margin_loss}, MismatchError, ["loss", "cross_entropy"]),
]


@pytest.mark.parametrize(("kwargs", "error", "words"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_requests_are_refused_and_leave_no_trace(prepared, kwargs, error, words):
    one, snapshot = prepared
    before = state(one.net, snapshot)
    with pytest.raises(error) as caught:
        forget_from(one, snapshot, **kwargs)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert state(one.net, snapshot) == before


def test_data_that_was_not_trained_on_is_refused(prepared):
    one, snapshot = prepared
    before = state(one.net, snapshot)
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"data": _changed(one, 3)}, ["data", "[3]"]),
        ({"data": _changed(one, 3, torch.nan)}, ["data", "[3]"]),
        ({"data": _changed(one, 3, torch.inf)}, ["data", "[3]"]),
        ({"data": TensorDataset(one.x, (one.y + 1) % 3)}, ["data", "[3]"]),
        ({"data": TensorDataset(one.x[:9], one.y[:9])}, ["data", "9", "16"]),
        ({"data": TensorDataset(one.x.float(), one.y)}, ["data", "[3]"]),
        ({"retain": _changed(one, 8)}, ["retain", "[8]"]),
        ({"retain": TensorDataset(one.x.flip(0), one.y.flip(0))}, ["retain"]),
        ({"retain": TensorDataset(one.x[:9], one.y[:9])}, ["retain", "9", "16"]),
    ]
    for kwargs, words in cases:
        with pytest.raises(MismatchError) as caught:
            forget_from(one, snapshot, [3], **kwargs)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert state(one.net, snapshot) == before


def test_another_models_snapshot_is_refused(prepared):
    one, snapshot = prepared
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-9
    before = state(other.net, snapshot)
    with pytest.raises(MismatchError, match=r"model: .*fingerprint.*\.muter\.ckpt"):
        forget_from(other, snapshot, [3])
    assert state(other.net, snapshot) == before


def test_a_lost_key_is_said(prepared):
    one, snapshot = prepared
    blind = copy.deepcopy(snapshot)
    blind.key = None
    with pytest.raises(MismatchError, match=r"key .* not at hand"):
        forget_from(one, blind, [3])


def test_rows_forgotten_now_or_before_are_not_read_in_retained_data(prepared):
    one, snapshot = copy.deepcopy(prepared)
    other, taken = copy.deepcopy(prepared)
    full = forget_from(one, snapshot, [3, 0], retain=one.dataset, refine=1)
    gone = Plain(one.x, one.y, gone=(0, 3, 15))
    data = Plain(one.x, one.y, gone=(15,))
    part = forget_from(other, taken, [3, 0], data=data, retain=gone, refine=1)
    assert torch.equal(head_of(one), head_of(other))
    assert part.bound == full.bound
    refresh(other.net, taken, gone, loss=one.loss, progress=False)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_data_that_are_not_finite_give_no_snapshot(bad):
    one = case("linear-softmax-bias")
    one.x[5, 2] = bad
    before = head_of(one)
    with pytest.raises(ArgumentError, match=r"sample 5.*Clean"):
        snapshot_of(one)
    assert torch.equal(head_of(one), before)


def test_inputs_outside_the_box_give_no_snapshot():
    one = case("linear-softmax-bias")
    one.x[5, 2] = 1.5
    with pytest.raises(ArgumentError, match=r"box.*sample 5"):
        snapshot_of(one)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"weight_decay": 0.0}, UnsuitableError, ["Weight decay is 0", "weight_decay"]),
        ({"weight_decay": -1.0}, ArgumentError, ["weight_decay", "-1.0", "0 or larger"]),
        ({"weight_decay": "auto"}, ArgumentError, ["weight_decay", "configure_optimizers"]),
        ({"threat_model": None}, ArgumentError, ["threat_model", "ThreatModel('l2', 0.0)"]),
        ({"scope": "body"}, ArgumentError, ["scope", "body", "patterns of trainable parameters"]),
        ({"polish": -1}, ArgumentError, ["polish", "-1", "auto"]),
        ({"curvature": "kfac"}, ArgumentError, ["curvature", "kfac", "ggn"]),
        ({"response": "linf"}, ArgumentError, ["response", "linf", "l2"]),
        ({"sample_weight": torch.ones(3)}, ArgumentError, ["sample_weight", "(3,)", "16"]),
        ({"loss": lambda z, y: z}, ArgumentError, ["loss", "reduction"]),
    ],
)
def test_snapshots_that_cannot_be_taken_leave_the_model_alone(kwargs, error, words):
    one = case("linear-softmax-bias")
    before = head_of(one)
    with pytest.raises(error) as caught:
        snapshot_of(one, **kwargs)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert torch.equal(head_of(one), before)


def test_the_published_response_on_a_head_is_refused_with_the_reason():
    """Its matrix is indefinite: nothing is written, and the way out is named; on request it goes through, marked."""
    one = case("linear-softmax-bias")
    snapshot = snapshot_of(one, THREATS["l2"], response=Unconstrained(3))
    before = state(one.net, snapshot)
    with pytest.raises(SolveError, match=r"negative curvature.*Nothing was changed.*constraint-aware"):
        forget_from(one, snapshot, [3])
    assert state(one.net, snapshot) == before
    result = forget_from(one, snapshot, [3], solver=Schur(accept_indefinite=True))
    assert result.solver["status"] == "negative curvature"
    assert any("negative curvature" in w for w in result.warnings)


def test_an_undecayed_bias_is_fine_or_refused_but_never_wrong():
    """A softmax bias shift is then a null vector of H_R."""
    one = case("linear-softmax-bias")
    decay = {"2.weight": 1e-2, "2.bias": 0.0, "1.weight": 1e-2, "1.bias": 0.0}
    snapshot = snapshot_of(one, THREATS["l2"], weight_decay=decay)
    before = state(one.net, snapshot)
    with contextlib.suppress(SolveError):
        forget_from(one, snapshot, [3], retain=one.dataset)
    if not snapshot.forgotten:
        assert state(one.net, snapshot) == before
        return
    other = case("linear-softmax-bias")
    kept = [i for i in range(len(one.x)) if i != 3]
    other.x, other.y = other.x[kept], other.y[kept]
    snapshot_of(other, THREATS["l2"], weight_decay=decay)
    assert float(one.head.bias.detach().abs().max()) < 10
    moved = one.head.weight.detach() - snapshot.theta_ref[:, :-1]
    rest = one.head.weight.detach() - other.head.weight.detach()
    assert rest.norm() < 0.3 * moved.norm()


# -- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [
        "lightning_muter.scope.head._downdated",
        "lightning_muter.scope.head._warnings",
        "lightning_muter.scope.head.with_retained",
        "lightning_muter.unlearning.commit.weight_fingerprint",
        "lightning_muter.unlearning.with_retained.certified_from_nearby",
        "lightning_muter.unlearning.with_retained.refined",
        "lightning_muter.snapshot.snapshot.Snapshot.adopt",
        "lightning_muter.curvature.problem.head.HeadProblem.write_theta",
        "lightning_muter.scope.head_methods.MUter.step",
    ],
)
@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_failures_after_the_solve_leave_no_trace(prepared, monkeypatch, where, error):
    one, snapshot = prepared
    one.net.train()
    before = state(one.net, snapshot)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(type(error)):
        forget_from(one, snapshot, [3], retain=one.dataset, refine=1)
    assert state(one.net, snapshot) == before
    monkeypatch.undo()
    other, taken = copy.deepcopy(one), copy.deepcopy(snapshot)
    forget_from(other, taken, [3])  # and the same request still works


def test_a_failure_after_half_of_the_weights_are_written_leaves_no_trace(prepared, monkeypatch):
    one, snapshot = prepared
    before = state(one.net, snapshot)

    def half(self: Any, theta: Tensor) -> None:
        with torch.no_grad():
            self.head.linear.weight.copy_(theta[:, :-1])
        raise OSError("injected between the writes")

    monkeypatch.setattr("lightning_muter.curvature.problem.head.HeadProblem.write_theta", half)
    with pytest.raises(OSError, match="between the writes"):
        forget_from(one, snapshot, [3])
    assert state(one.net, snapshot) == before


def test_a_dry_run_says_all_and_changes_nothing(prepared):
    one, snapshot = prepared
    before = state(one.net, snapshot)
    dry = forget_from(one, snapshot, [3], retain=one.dataset, refine=2, dry_run=True)
    assert state(one.net, snapshot) == before
    other, taken = copy.deepcopy(one), copy.deepcopy(snapshot)
    real = forget_from(other, taken, [3], retain=one.dataset, refine=2)
    told, done = dry.to_dict(), real.to_dict()
    assert told.pop("dry_run") is True
    assert done.pop("dry_run") is False
    assert told.pop("seconds") > 0
    assert done.pop("seconds") > 0
    assert told == done
    assert done["fingerprint_after"] == taken.fingerprint != done["fingerprint_before"]
    taken.check_model(other.net)


def test_an_unfrozen_backbone_is_said_loudly():
    one = case("smooth-softmax-bias")
    one.net[0].weight.requires_grad_(True)
    before = head_of(one)
    # a warning that is an error comes before anything is changed
    with pytest.raises(UserWarning, match=r"1 trainable parameters.*0\.weight.*Freeze"):
        snapshot_of(one, tolerance=0.05)
    assert torch.equal(head_of(one), before)
    with pytest.warns(UserWarning, match="trainable parameters"):
        snapshot = snapshot_of(one, tolerance=0.05)
    assert any("Freeze" in w for w in snapshot.warnings)
    before_all = state(one.net, snapshot)
    with pytest.raises(UserWarning, match="trainable parameters"):
        forget_from(one, snapshot, [3])
    assert state(one.net, snapshot) == before_all
    with pytest.warns(UserWarning, match="trainable parameters"):
        result = forget_from(one, snapshot, [3])
    assert any("Freeze" in w for w in result.warnings)
    assert snapshot.forgotten == [3]


def test_inference_mode_and_no_grad_make_no_difference(prepared):
    ends = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        one = case("smooth-softmax-bias")
        with mode():
            snapshot = snapshot_of(one, tolerance=0.05)
            forget_from(one, snapshot, [3], retain=one.dataset, refine=1)
        ends.append(head_of(one))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_float32_modules():
    torch.manual_seed(0)
    one = case("linear-softmax-bias")
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    data = TensorDataset(one.x.float(), one.y)
    options: dict[str, Any] = {"threat_model": THREATS["l2"], "weight_decay": 1e-2, "progress": False}
    snapshot = take_snapshot(net, data, **options)
    result = unlearn(net, snapshot, [3, 8], data, retain=data, refine=8, progress=False)
    assert net[1].weight.dtype == torch.float32
    assert result.stationarity_after is not None
    assert result.stationarity_after < 1e-4
    exact = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    wide = TensorDataset(data.tensors[0].double(), one.y)
    taken = take_snapshot(exact, wide, **options)
    unlearn(exact, taken, [3, 8], wide, retain=wide, refine=8, progress=False)
    torch.testing.assert_close(net[1].weight.double(), exact[1].weight, rtol=0, atol=2e-3)


def test_solver_objects_and_reports(prepared):
    one, snapshot = copy.deepcopy(prepared)
    with pytest.raises(SolveError, match=r"CG\(max_iter=1.*capped.*max_iter"):
        forget_from(one, snapshot, [3], solver=CG(max_iter=1))
    result = forget_from(one, snapshot, torch.tensor([3, 4]), solver=CG(max_iter=1, accept_early=True))
    assert result.solver["status"] == "capped"
    assert result.solver["iterations"] == 1
    assert any("capped" in w for w in result.warnings)
    assert result.bound is None
    assert any("retain" in w for w in result.warnings)
    assert forget_from(one, snapshot, np.array([5])).forgotten == [5]
