"""Certified publication: the mechanism against closed forms and a library, ``within``, what is refused, the ledger's account."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn
from torch.utils.data import TensorDataset

from lightning_muter import Publication, Snapshot, ThreatModel, publish, take_snapshot, unlearn
from lightning_muter.cli import main
from lightning_muter.deletion.ledger import Ledger
from lightning_muter.errors import ArgumentError, MismatchError, RequestError, SolveError, UnsuitableError
from lightning_muter.evidence.laws import empirical_epsilon
from lightning_muter.publication.gaussian import composed_epsilon, delta_of, gaussian_sigma
from lightning_muter.publication.leak import leak, rebuild
from lightning_muter.publication.publish import with_noise
from tests.cases import equal_maxima
from tests.world import command, plain_checkpoint

PAIRS = [(1.0, 1e-5), (0.1, 1e-3), (3.0, 0.05), (8.0, 1e-9)]


@pytest.mark.parametrize(("eps", "delta"), PAIRS)
def test_sigma_is_the_least_that_keeps_the_promise(eps: float, delta: float) -> None:
    sigma = gaussian_sigma(2.0, eps, delta)
    mu = 2.0 / sigma

    def excess(x: float) -> float:  # of the two densities, whose integral is delta by definition
        return max(norm.pdf(x - mu) - math.exp(eps) * norm.pdf(x), 0.0)

    cut = eps / mu + mu / 2
    exact, _ = quad(excess, cut, cut + 40, epsabs=1e-14, epsrel=1e-9)
    assert exact == pytest.approx(delta, rel=1e-4)
    assert delta_of(mu, eps) <= delta < delta_of(mu * 1.0001, eps)
    assert composed_epsilon([(2.0, sigma)], delta) == pytest.approx(eps, rel=1e-6)


@pytest.mark.parametrize(("eps", "delta"), PAIRS[:3])
def test_the_mechanism_and_its_composition_agree_with_dp_accounting(eps: float, delta: float) -> None:
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    sigma = gaussian_sigma(1.0, eps, delta)
    one = pld.from_gaussian_mechanism(sigma, value_discretization_interval=1e-4)
    assert one.get_epsilon_for_delta(delta) == pytest.approx(eps, rel=2e-3)
    assert one.self_compose(3).get_epsilon_for_delta(delta) == pytest.approx(
        composed_epsilon([(1.0, sigma)] * 3, delta), rel=2e-3
    )


def test_less_is_spent_together_than_by_adding() -> None:
    release = (1.0, gaussian_sigma(1.0, 1.0, 1e-5))
    assert 1 < composed_epsilon([release] * 2, 1e-5) < 2
    assert composed_epsilon([], 1e-5) == 0


@pytest.mark.parametrize(("within", "eps", "delta"), [(0.0, 1, 0.1), (1.0, 0, 0.1), (1.0, 1, 0.0), (math.inf, 1, 0.1)])
def test_senseless_promises_are_refused(within: float, eps: float, delta: float) -> None:
    with pytest.raises(ArgumentError):
        gaussian_sigma(within, eps, delta)


def test_an_empirical_test_finds_the_promise_kept_and_a_third_of_the_noise_broken() -> None:
    """Worst case: retraining and unlearning differ by exactly Delta; the statistic is the best one, along the difference."""
    eps, delta, size = 1.0, 0.05, 40_000
    sigma = gaussian_sigma(1.0, eps, delta)
    zero = {"w": torch.zeros(size, dtype=torch.float64)}
    one = {"w": torch.ones(size, dtype=torch.float64)}
    value, low = empirical_epsilon(with_noise(one, ["w"], sigma)["w"], with_noise(zero, ["w"], sigma)["w"], delta)
    assert low <= eps
    assert value >= 0.8 * eps
    _, caught = empirical_epsilon(
        with_noise(one, ["w"], sigma / 3)["w"], with_noise(zero, ["w"], sigma / 3)["w"], delta
    )
    assert caught > eps


# -- within and publish ------------------------------------------------------------------------------------------------


def softmax(frozen: bool = True) -> tuple[nn.Sequential, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 3
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64) + 1.5 * torch.eye(4, dtype=torch.float64)[y]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 3).double())
    net[0].requires_grad_(not frozen)
    return net, TensorDataset(x, y)


def taken(net: nn.Sequential, data: TensorDataset) -> Snapshot:
    return take_snapshot(net, data, threat_model=ThreatModel("l2", 0.1, None), weight_decay=1e-2, progress=False)


def test_requests_are_refined_until_they_are_within(recwarn: pytest.WarningsRecorder) -> None:
    net, data = softmax()
    snapshot = taken(net, data)
    rough = unlearn(copy.deepcopy(net), copy.deepcopy(snapshot), range(8), data, retain=data, progress=False)
    assert rough.bound is not None
    within = rough.bound / 1000
    result = unlearn(net, snapshot, range(8), data, retain=data, within=within, progress=False)
    assert result.bound is not None
    assert result.bound <= within == result.within
    assert result.refine
    assert result.parameters == ["1.weight", "1.bias"]
    before = copy.deepcopy(net.state_dict())
    shown = publish(net, result, eps=1.0, delta=1e-5)
    assert isinstance(shown, Publication)
    assert (shown.eps, shown.delta, shown.within) == (1.0, 1e-5, within)
    assert shown.sigma == pytest.approx(3.73 * within, rel=1e-3)
    noise = [shown.module.state_dict()[name] - before[name] for name in before]
    assert [bool(n.any()) for n in noise] == [False, False, True, True]
    again = publish(net, result)
    assert not torch.equal(again.module.state_dict()["1.weight"], shown.module.state_dict()["1.weight"])
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)


def test_a_distance_is_reached_where_maxima_are_equal_too() -> None:
    """Steps in the stored metric, which holds the kinks as they were at the trained weights, end at 0.03."""
    net, data, options = equal_maxima()
    snapshot = take_snapshot(net, data, progress=False, **options)
    forget = [7, 8, 9, 11, 12]
    result = unlearn(net, snapshot, forget, data, retain=data, within=1e-2, progress=False)
    assert result.bound is not None
    assert result.bound <= 1e-2
    assert len(result.refine) > 4  # more than the first look


def test_what_cannot_be_reached_is_refused_and_leaves_no_trace() -> None:
    net, data = softmax()
    snapshot = taken(net, data)
    before, forgotten = copy.deepcopy(net.state_dict()), list(snapshot.forgotten)
    with pytest.raises(SolveError, match="certified distance came to"):
        unlearn(net, snapshot, [1], data, retain=data, within=1e-300, progress=False)
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)
    assert snapshot.forgotten == forgotten
    with pytest.raises(ArgumentError, match="retain=train_dataset"):
        unlearn(net, snapshot, [1], data, within=1e-3, progress=False)
    with pytest.raises(ArgumentError, match="a distance above 0"):
        unlearn(net, snapshot, [1], data, retain=data, within=-1.0, progress=False)


def test_publishing_needs_a_distance_fixed_beforehand_and_the_very_weights() -> None:
    net, data = softmax()
    snapshot = taken(net, data)
    unbound = unlearn(net, snapshot, [1], data, retain=data, refine=2, progress=False)
    with pytest.raises(ArgumentError, match="within=1e-3"):
        publish(net, unbound)
    dry = unlearn(net, snapshot, [2], data, retain=data, within=1.0, dry_run=True, progress=False)
    with pytest.raises(ArgumentError, match="dry run"):
        publish(net, dry)
    result = unlearn(net, snapshot, [2], data, retain=data, within=1.0, progress=False)
    with torch.no_grad():
        net[1].bias += 1
    with pytest.raises(MismatchError, match="as it was left"):
        publish(net, result)


def test_what_was_trained_beside_the_head_is_not_published() -> None:
    net, data = softmax()
    snapshot = taken(net, data)
    result = unlearn(net, snapshot, [2], data, retain=data, within=1.0, progress=False)
    net[0].requires_grad_(True)
    with pytest.raises(UnsuitableError, match=r"0\.weight"):
        publish(net, result)


# -- the command and the ledger ------------------------------------------------------------------------------------------


def test_releases_are_accounted_for_and_small_steps_between_them_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, one, two = tmp_path / "last.ckpt", tmp_path / "shown" / "one.ckpt", tmp_path / "shown" / "two.ckpt"
    plain_checkpoint(path)
    command("snapshot", path)
    assert main(["publish", "--ckpt_path", str(path), "--out", str(one)]) == 1
    assert "--within" in capsys.readouterr().err
    command("unlearn", path, forget=[1, 5], within=1e-3)
    assert main(["publish", "--ckpt_path", str(path), "--out", str(one)]) == 0
    assert "forgotten since" not in capsys.readouterr().out
    command("unlearn", path, forget=[2], within=1e-3)
    assert main(["publish", "--ckpt_path", str(path), "--out", str(one)]) == 1  # a release is never replaced
    assert main(["publish", "--ckpt_path", str(path), "--out", str(two), "--limit", "1.2"]) == 1
    assert "2 releases together" in capsys.readouterr().err
    assert not two.exists()
    assert main(["publish", "--ckpt_path", str(path), "--out", str(two)]) == 0
    assert "only 1 row was forgotten since" in capsys.readouterr().out
    private = torch.load(tmp_path / "last.muter.ckpt", weights_only=True)["state_dict"]
    shown = torch.load(two, weights_only=True)
    assert set(shown) == {"state_dict", "pytorch-lightning_version"}
    sigma = gaussian_sigma(1e-3, 1.0, 1e-5)
    noise = torch.cat([(shown["state_dict"][k] - private[k]).flatten() for k in private])
    assert 0.4 * sigma < float(noise.std()) < 2 * sigma
    with Ledger.open(tmp_path / "last.muter.ledger") as ledger:
        last = ledger.last("publish")
        assert ledger.verify(None) == []
    assert last is not None
    assert last["metrics"]["eps_together"] == pytest.approx(composed_epsilon([(1e-3, sigma)] * 2, 1e-5))
    assert last["metrics"]["sigma"] == sigma
    assert main(["audit", "--ckpt_path", str(path), "--verify"]) == 0


def test_a_release_that_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    plain_checkpoint(path)
    command("snapshot", path)
    command("unlearn", path, forget=[1], within=1e-3)
    import lightning_muter.deletion.publish as module

    def full(*args: object, **kwargs: object) -> None:
        raise RequestError("disk full")

    monkeypatch.setattr(module, "commit_request", full)
    assert main(["publish", "--ckpt_path", str(path), "--out", str(tmp_path / "x.ckpt")]) == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(("x", ".x"))]


# -- what the difference of two releases shows -----------------------------------------------------------------------------


def test_a_removed_row_is_rebuilt_from_two_heads_and_noise_hides_it() -> None:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(240) % 4
    x = torch.rand(240, 6, generator=generator, dtype=torch.float64) + torch.eye(6, dtype=torch.float64)[y]
    data = TensorDataset(x, y)
    public = torch.rand(400, 6, generator=generator, dtype=torch.float64)
    public += torch.eye(6, dtype=torch.float64)[torch.arange(400) % 4]
    net = nn.Sequential(nn.Identity(), nn.Linear(6, 4).double())
    snapshot = take_snapshot(net, data, threat_model=ThreatModel("l2", 0.05, None), weight_decay=1e-2, progress=False)

    def head(module: nn.Sequential) -> torch.Tensor:
        return torch.cat([module[1].weight, module[1].bias[:, None]], 1).detach()

    removed, found, hidden, floor = list(range(12)), [], [], []
    for at in removed:
        after = copy.deepcopy(net)
        unlearn(after, copy.deepcopy(snapshot), [at], data, progress=False)
        found.append(rebuild(head(net), head(after), public, 240, 1e-2))
        noisy = [h + 0.05 * torch.randn(h.shape, generator=generator) for h in (head(net), head(after), head(net))]
        hidden.append(rebuild(noisy[0], noisy[1], public, 240, 1e-2))
        floor.append(rebuild(noisy[0], noisy[2], public, 240, 1e-2))
    open_, noised, nothing = (leak(f, removed, x, y) for f in (found, hidden, floor))
    assert open_.label_rate == 1
    assert open_.cosine > 0.95
    assert open_.median_rank < 20
    assert noised.label_rate < 0.7
    assert noised.median_rank > 30
    assert noised.cosine < open_.cosine - 0.05
    assert nothing.median_rank > 30
    with pytest.raises(ArgumentError, match="public"):
        rebuild(head(net), head(net), public[:, :3], 240, 1e-2)
    assert np.isfinite(open_.cosine)
