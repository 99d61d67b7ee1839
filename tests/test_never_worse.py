"""Polish and requests keep the best point; what would make the robust objective worse is refused, and said."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_muter import Snapshot, ThreatModel, take_snapshot, unlearn
from lightning_muter.errors import ArgumentError, SolveError

DECAY, N = 0.01, 40
QUIET = pytest.mark.filterwarnings("ignore:The head is not stationary", "ignore:The inner maximiser converged for")
SWAMPED = pytest.mark.filterwarnings("ignore:The robust optimum is a constant predictor")


@functools.cache
def _data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(N) % 3 % 2
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64) + 1.5 * y[:, None]
    return TensorDataset(x, y)


def _head(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2)).double()


def _objective(net: nn.Sequential, keep: list[int], eps: float) -> float:
    """The robust objective of two logits on L2 balls, in closed form."""
    x, y = (t[keep] for t in _data().tensors)
    weight, bias = net[0].weight.detach(), net[0].bias.detach()
    margin = (x @ (weight[1] - weight[0]) + bias[1] - bias[0]) * (2 * y - 1)
    robust = F.softplus(eps * (weight[1] - weight[0]).norm() - margin).sum()
    return float(robust + len(keep) / 2 * DECAY * (weight.square().sum() + bias.square().sum()))


def _taken(net: nn.Sequential, eps: float, **options: object) -> Snapshot:
    found = take_snapshot(
        net, _data(), threat_model=ThreatModel("l2", eps, None), weight_decay=DECAY, progress=False, **options
    )
    assert isinstance(found, Snapshot)
    return found


def _state(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


@QUIET
@SWAMPED
@pytest.mark.parametrize("eps", [0.3, 2.0, 6.0, 20.0, 50.0])
def test_polish_never_raises_the_objective(eps: float) -> None:
    net = _head()
    everything = list(range(N))
    before = _objective(net, everything, eps)
    snapshot = _taken(net, eps)
    told = snapshot.figures["polish"]
    after = _objective(net, everything, eps)
    assert after <= before
    assert told["objective_before"] == pytest.approx(before, rel=1e-9)
    assert told["objective_after"] == pytest.approx(after, rel=1e-6)
    share = float(_data().tensors[1].double().mean())  # of class 1: the best constant answer, by hand
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([bias], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def constant() -> Tensor:
        log = bias.log_softmax(0)
        return -N * (share * log[1] + (1 - share) * log[0]) + N / 2 * DECAY * bias.square().sum()

    def closure() -> float:
        search.zero_grad()
        value = constant()
        value.backward()
        return float(value.detach())

    search.step(closure)
    assert told["objective_constant"] == pytest.approx(constant().item(), rel=1e-8)
    assert after <= constant().item() * (1 + 1e-9)
    assert told["constant"] == (eps > 1)


@QUIET
def test_a_constant_predictor_is_said() -> None:
    with pytest.warns(UserWarning, match="robust optimum is a constant predictor"):
        snapshot = _taken(_head(), 20.0)
    assert snapshot.figures["polish"]["kept"] == "constant"


@QUIET
@SWAMPED
@pytest.mark.parametrize("eps", [2.0, 6.0, 20.0])
def test_a_request_never_raises_the_objective(eps: float) -> None:
    gone = [1, 2, 5]
    keep = [i for i in range(N) if i not in gone]
    net = _head()
    snapshot = _taken(net, eps)
    before, state = _objective(net, keep, eps), _state(net)
    for options in ({}, {"retain": _data()}):
        with pytest.raises(SolveError, match="accept='worse'"):
            unlearn(net, snapshot, gone, _data(), progress=False, **options)
    assert all(torch.equal(a, b) for a, b in zip(state, _state(net), strict=True))
    assert snapshot.forgotten == []
    result = unlearn(net, snapshot, gone, _data(), retain=_data(), refine=2, progress=False)
    assert result.quality["objective_after"] <= result.quality["objective_before"]
    assert _objective(net, keep, eps) <= before
    assert result.quality["objective_after"] == pytest.approx(_objective(net, keep, eps), rel=1e-6)


@QUIET
@SWAMPED
def test_worse_is_possible_on_request() -> None:
    net = _head()
    snapshot = _taken(net, 6.0)
    result = unlearn(net, snapshot, [1], _data(), retain=_data(), accept="worse", progress=False)
    assert result.quality["objective_after"] > result.quality["objective_before"]
    assert any("owed to the snapshot" in w for w in result.warnings)
    with pytest.raises(ArgumentError, match="accept"):
        unlearn(net, snapshot, [2], _data(), accept="better", progress=False)


@QUIET
def test_what_a_snapshot_that_is_not_stationary_costs() -> None:
    shares = []
    for polish in (0, "auto"):
        net = _head()
        snapshot = _taken(net, 0.3, polish=polish)
        result = unlearn(net, snapshot, [1], _data(), progress=False)
        shares.append(result.quality["owed_share"])
        assert result.quality["maximisers_converged"] == 1.0
        assert any("owed to the snapshot" in w for w in result.warnings) == (polish == 0)
        owed = result.quality["owed_step"]
        assert unlearn(net, snapshot, [2], _data(), progress=False).quality["owed_step"] == owed
    assert shares[0] > 0.9
    assert shares[1] < 1e-3


def test_the_predicted_fall_is_the_fall() -> None:
    net = _head()
    snapshot = _taken(net, 0.3)
    quality = unlearn(net, snapshot, [1], _data(), retain=_data(), progress=False).quality
    fall = quality["objective_before"] - quality["objective_after"]
    assert fall == pytest.approx(quality["predicted_fall"], rel=0.1)


@QUIET
@SWAMPED
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_dead_network_stays_finite(norm: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    net[0].requires_grad_(False)
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    snapshot = take_snapshot(
        net, _data(), threat_model=ThreatModel(norm, 0.3, None), weight_decay=DECAY, progress=False
    )
    result = unlearn(net, snapshot, [1], _data(), retain=_data(), progress=False)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    assert result.quality["objective_after"] <= result.quality["objective_before"]


def test_a_certificate_is_of_the_weights_as_they_are_held() -> None:
    net = _head().float()
    data = TensorDataset(_data().tensors[0].float(), _data().tensors[1])
    snapshot = take_snapshot(net, data, threat_model=ThreatModel("l2", 0.3, None), weight_decay=DECAY, progress=False)
    held = torch.cat([net[0].weight, net[0].bias[:, None]], 1).double()
    assert torch.equal(snapshot.theta_base, held)


@QUIET
def test_an_end_of_the_budget_is_no_constant_optimum() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    with torch.no_grad():
        net[2].weight *= 20  # far worse than a constant
    data = TensorDataset(_data().tensors[0].float(), _data().tensors[1])
    threat = ThreatModel("l2", 0.1, None)
    snapshot = take_snapshot(net, data, threat_model=threat, weight_decay=DECAY, budget=0.01, progress=False)
    told = snapshot.figures["polish"]
    assert told["status"] == "budget"
    assert told["objective_after"] > told["objective_constant"]
    assert (told["kept"], told["constant"]) == ("polished", False)
    assert unlearn(net, snapshot, [1], data, progress=False).solver["status"] == "converged"
