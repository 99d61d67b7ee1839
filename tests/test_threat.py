"""Geometry of the threat model against brute force, and reading it off attacks."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from lightning_muter.adversarial.climb import LossAttack
from lightning_muter.adversarial.from_torchattacks import attack_note, read_climb
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


# -- geometry -----------------------------------------------------------------------------------------------------


def _bisect_scale(v: Tensor, lo: Tensor, hi: Tensor, eps: float) -> Tensor:
    """clip(v / (1 + nu)) with nu >= 0 found by bisection, one row at a time: slow, obvious, independent."""
    rows = []
    for r in range(len(v)):
        low, high = 0.0, 1.0  # t = 1 / (1 + nu)
        if v[r].clamp(lo[r], hi[r]).norm() <= eps:
            low = 1.0
        else:
            for _ in range(200):
                mid = (low + high) / 2
                low, high = (mid, high) if (mid * v[r]).clamp(lo[r], hi[r]).norm() <= eps else (low, mid)
        rows.append((low * v[r]).clamp(lo[r], hi[r]))
    return torch.stack(rows)


@pytest.mark.parametrize("box", [(0.0, 1.0), None])
def test_l2_projection_against_bisection(box) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(40, 7, dtype=torch.float64, generator=g)
    v = torch.randn(40, 7, dtype=torch.float64, generator=g)
    v[3, 2] = 0.0
    threat = ThreatModel("l2", 0.6, box)
    lo, hi = (torch.zeros_like(x) - x, 1 - x) if box else (torch.full_like(x, -9.0), torch.full_like(x, 9.0))
    torch.testing.assert_close(threat.project(v, x), _bisect_scale(v, lo, hi, 0.6), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("box", [(0.0, 1.0), None])
def test_linear_maximiser_beats_every_random_point_and_is_feasible(norm, box) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.rand(30, 5, dtype=torch.float64, generator=g)
    slope = torch.randn(30, 5, dtype=torch.float64, generator=g)
    slope[0, 0] = 0.0
    threat = ThreatModel(norm, 0.4, box)
    best = threat.linear_maximiser(slope, x)
    assert best[0, 0] == 0
    _assert_inside(threat, x, best)
    for _ in range(300):
        other = threat.project(torch.randn(30, 5, dtype=torch.float64, generator=g), x)
        assert ((slope * best).sum(1) >= (slope * other).sum(1) - 1e-12).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_projection_is_idempotent_and_nearest(norm) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.rand(30, 5, dtype=torch.float64, generator=g)
    v = torch.randn(30, 5, dtype=torch.float64, generator=g)
    threat = ThreatModel(norm, 0.3)
    p = threat.project(v, x)
    _assert_inside(threat, x, p)
    torch.testing.assert_close(threat.project(p, x), p, rtol=0, atol=1e-15)
    for _ in range(200):
        q = threat.project(v + 0.1 * torch.randn(30, 5, dtype=torch.float64, generator=g), x)
        assert ((v - p).norm(dim=1) <= (v - q).norm(dim=1) + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_along_one_axis_reaches_the_sphere(dtype) -> None:
    """The bound of one coordinate is the radius itself: knot and sphere coincide up to rounding."""
    sizes = torch.logspace(-3, 3, 200, dtype=dtype)[:, None]
    v = sizes * torch.tensor([[1.0, 1e-9, -1e-12, 0.0]], dtype=dtype)
    for eps in (0.1, 0.2, 0.3, 1.0):
        threat = ThreatModel("l2", eps, None)
        far = threat.linear_maximiser(v, torch.zeros_like(v)).norm(dim=1)
        torch.testing.assert_close(far, torch.full_like(far, eps), rtol=1e-6, atol=0)
        near = threat.project(v, torch.zeros_like(v)).norm(dim=1)
        torch.testing.assert_close(near, v.norm(dim=1).clamp(max=eps), rtol=1e-6, atol=0)


def _assert_inside(threat: ThreatModel, x: Tensor, delta: Tensor) -> None:
    order = 2 if threat.norm == "l2" else torch.inf
    assert (delta.norm(p=order, dim=1) <= threat.eps + 1e-12).all()
    if threat.box is not None:
        assert (x + delta >= threat.box[0] - 1e-12).all()
        assert (x + delta <= threat.box[1] + 1e-12).all()


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"norm": "l0", "eps": 1.0}, "norm"),
        ({"norm": "l2", "eps": -1.0}, "eps"),
        ({"norm": "l2", "eps": float("nan")}, "eps"),
        ({"norm": "linf", "eps": 1.0, "box": (1.0, 0.0)}, "box"),
    ],
)
def test_impossible_threat_models_name_the_argument(kwargs, argument) -> None:
    with pytest.raises(ArgumentError) as caught:
        ThreatModel(**kwargs)
    assert caught.value.argument == argument


def test_dict_round_trip() -> None:
    for threat in (ThreatModel("l2", 0.5, None), ThreatModel("linf", 8 / 255, (-1.0, 2.0))):
        assert ThreatModel.from_dict(threat.to_dict()) == threat


# -- read off attacks -----------------------------------------------------------------------------------------------

LINF = ["FGSM", "FFGSM", "RFGSM", "BIM", "PGD", "EOTPGD", "TPGD", "MIFGSM", "NIFGSM", "UPGD"]


@pytest.mark.parametrize("name", [*LINF, "PGDL2"])
def test_known_attacks_as_object_partial_class_and_lambda(name, net) -> None:
    cls = getattr(torchattacks, name)
    want = ThreatModel("l2" if name == "PGDL2" else "linf", 0.07)
    assert ThreatModel.from_attack(cls(net, eps=0.07)) == want
    assert ThreatModel.from_attack(functools.partial(cls, eps=0.07)) == want
    assert ThreatModel.from_attack(lambda model: cls(model, eps=0.07)) == want
    default = inspect.signature(cls.__init__).parameters["eps"].default
    assert ThreatModel.from_attack(cls).eps == pytest.approx(default)


@pytest.mark.parametrize(("given", "norm"), [("Linf", "linf"), ("L2", "l2")])
@pytest.mark.parametrize("name", ["APGD", "APGDT", "AutoAttack", "Square", "FAB"])
def test_attacks_that_name_their_norm(name, given, norm, net) -> None:
    assert ThreatModel.from_attack(getattr(torchattacks, name)(net, norm=given, eps=0.1)) == ThreatModel(norm, 0.1)


def test_l1_is_refused(net) -> None:
    with pytest.raises(ArgumentError, match="'Linf' or 'L2'"):
        ThreatModel.from_attack(torchattacks.FAB(net, norm="L1", eps=5.0))


@pytest.mark.parametrize("name", ["CW", "DeepFool", "GN", "OnePixel", "JSMA", "EADL1", "PGDRS", "PGDRSL2", "VANILA"])
def test_ambiguous_attacks_need_an_explicit_threat_model(name, net) -> None:
    with pytest.raises(ArgumentError, match="threat_model=ThreatModel") as caught:
        ThreatModel.from_attack(getattr(torchattacks, name)(net))
    assert "PGDL2" in str(caught.value)


def test_anything_else_is_refused() -> None:
    for thing in (3, "pgd", object(), nn.Linear(2, 2)):
        with pytest.raises(ArgumentError, match="attack: got"):
            ThreatModel.from_attack(thing)
    with pytest.raises(ArgumentError, match="Calling it failed"):
        ThreatModel.from_attack(functools.partial(torchattacks.PGD, epsilon=1))


def test_box_is_the_callers_and_threat_models_pass_through(net) -> None:
    assert ThreatModel.from_attack(torchattacks.PGD(net, eps=0.1), box=None).box is None
    assert ThreatModel.from_attack(torchattacks.PGD(net, eps=0.1), box=(-1, 1)).box == (-1.0, 1.0)
    explicit = ThreatModel("l2", 3.0, None)
    assert ThreatModel.from_attack(explicit) is explicit
    assert ThreatModel.from_attack(LossAttack(explicit)) is explicit


def test_normalisation_and_targets_are_refused_with_advice(net) -> None:
    attack = torchattacks.PGD(net)
    attack.set_normalization_used(mean=[0.5], std=[0.5])
    with pytest.raises(ArgumentError, match=r"Pass normalization=\(mean, std\) to the adversarial training"):
        ThreatModel.from_attack(attack)
    attack = torchattacks.PGD(net)
    attack.set_mode_targeted_random(quiet=True)
    with pytest.raises(ArgumentError, match="untargeted"):
        ThreatModel.from_attack(attack)


def test_subclass_counts_unless_it_attacks_in_its_own_way(net) -> None:
    class Renamed(torchattacks.PGDL2):
        pass

    class Different(torchattacks.PGDL2):
        def forward(self, images, labels):
            return images

    assert ThreatModel.from_attack(Renamed(net, eps=0.3)) == ThreatModel("l2", 0.3)
    with pytest.raises(ArgumentError):
        ThreatModel.from_attack(Different(net, eps=0.3))


def test_hydra_partial() -> None:
    from hydra.utils import instantiate

    factory = instantiate({"_target_": "torchattacks.PGDL2", "_partial_": True, "eps": 0.25})
    assert ThreatModel.from_attack(factory) == ThreatModel("l2", 0.25)


def test_notes_for_attacks_that_do_not_maximise_the_loss(net) -> None:
    assert "linf" in attack_note(torchattacks.FGSM(net, eps=0.1))
    assert "FFGSM" in attack_note(functools.partial(torchattacks.FFGSM, eps=0.1))
    assert "TPGD" in attack_note(torchattacks.TPGD(net))
    for silent in (torchattacks.PGD(net), torchattacks.PGDL2, None, ThreatModel("l2", 1.0)):
        assert attack_note(silent) is None


def test_how_attacks_climb(net) -> None:
    assert read_climb(torchattacks.FGSM(net, eps=0.1)) == (0.1, 1, False)
    assert read_climb(torchattacks.FFGSM(net, eps=0.1, alpha=0.2)) == (0.2, 1, True)
    assert read_climb(torchattacks.RFGSM(net, alpha=0.2, steps=3)) == (0.2, 3, True)
    assert read_climb(torchattacks.PGDL2(net, alpha=0.2, steps=7, random_start=False)) == (0.2, 7, False)
    assert read_climb(torchattacks.BIM(net, alpha=0.1, steps=4)) == (0.1, 4, False)
    assert read_climb(torchattacks.AutoAttack(net)) == (None, None, True)
