"""The attack on batches: inside ball and box, raising the loss, leaving no trace."""

from __future__ import annotations

import functools

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muter.adversarial.adversary import Adversary, divergence
from lightning_muter.adversarial.climb import LossAttack
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError, UnsuitableError
from lightning_muter.model.losses import per_sample


class Net(nn.Module):
    """Images (n, 1, 4, 4); BatchNorm and Dropout, so that a mode left wrong shows."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(12) % 3


def _losses(net: nn.Module, x: Tensor, y: Tensor, loss=F.cross_entropy) -> Tensor:
    modes = [(m, m.training) for m in net.modules()]
    net.eval()
    with torch.no_grad():
        out = per_sample(loss, net(x), y)
    for m, training in modes:
        m.training = training
    return out


def _assert_in_ball_and_box(threat: ThreatModel, x: Tensor, adv: Tensor, atol: float = 1e-6) -> None:
    delta = (adv - x).flatten(1)
    assert (delta.norm(p=2 if threat.norm == "l2" else torch.inf, dim=1) <= threat.eps + atol).all()
    if threat.box is not None:
        assert adv.min() >= threat.box[0]
        assert adv.max() <= threat.box[1]


# -- LossAttack -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("box", [(0.0, 1.0), None])
@pytest.mark.parametrize("random_start", [True, False])
def test_finds_the_exact_maximum_of_a_linear_model(norm, box, random_start) -> None:
    """One logit, linear: the loss is monotone in the margin, so the maximiser is the linear one, in closed form."""
    torch.manual_seed(3)
    x, y = torch.rand(20, 6, dtype=torch.float64), (torch.arange(20) % 2).double()
    w = torch.randn(6, dtype=torch.float64)
    threat = ThreatModel(norm, 0.3, box)
    attack = LossAttack(threat, nn.BCEWithLogitsLoss(), steps=200, alpha=0.02, random_start=random_start)
    adv = attack(lambda v: v @ w, x, y)
    slope = torch.where(y == 1, -1.0, 1.0)[:, None] * w
    want = x + threat.linear_maximiser(slope, x)
    loss = functools.partial(per_sample, F.binary_cross_entropy_with_logits)
    torch.testing.assert_close(loss(adv @ w, y), loss(want @ w, y), rtol=1e-4, atol=0)
    _assert_in_ball_and_box(threat, x, adv, 1e-12)


@pytest.mark.parametrize("shape", [(8, 5), (8, 2, 3), (8, 1, 4, 4), (8, 2, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_any_rank_and_dtype(shape, dtype, norm) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(shape, dtype=dtype), torch.arange(8) % 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2)).to(dtype)
    threat = ThreatModel(norm, 0.2)
    adv = LossAttack(threat)(model, x, y)
    assert adv.shape == x.shape
    assert adv.dtype == dtype
    _assert_in_ball_and_box(threat, x.double(), adv.double(), 0.02 if dtype is torch.bfloat16 else 1e-6)
    assert (_losses(model, adv, y) > _losses(model, x, y)).all()


def test_loss_never_falls_even_with_a_wild_step(net, images, labels) -> None:
    net.eval()
    for norm in ("l2", "linf"):
        adv = LossAttack(ThreatModel(norm, 0.5), alpha=50.0, steps=3)(net, images, labels)
        assert (_losses(net, adv, labels) >= _losses(net, images, labels)).all()


def test_rounding_never_leaves_the_box() -> None:
    """x + (hi - x) may round to just above hi; the next layer or a check of the data would stumble over it."""
    torch.manual_seed(0)
    lo, hi = -2.1179, 2.64
    x = (lo + (hi - lo) * torch.rand(2000, 8)).clamp(lo, hi)
    w = torch.randn(8)
    adv = LossAttack(ThreatModel("linf", 5.0, (lo, hi)), steps=2).maximise(lambda v: v @ w, x, lambda z: z)
    assert (adv <= torch.tensor(hi)).all()
    assert (adv >= torch.tensor(lo)).all()
    torch.testing.assert_close(adv, torch.where(w > 0, hi, lo).expand_as(x), rtol=0, atol=1e-6)


def test_independent_of_the_batch(net, images, labels) -> None:
    net.double().eval()
    x = images.double()
    attack = LossAttack(ThreatModel("l2", 0.3), random_start=False)
    together = attack(net, x, labels)
    apart = torch.cat([attack(net, x[i : i + 1], labels[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_direction_survives_slopes_of_any_size(scale) -> None:
    w = scale * torch.tensor([3.0, -4.0])
    attack = LossAttack(ThreatModel("l2", 0.5, None), steps=1, alpha=0.5, random_start=False)
    adv = attack.maximise(lambda v: v @ w, torch.zeros(1, 2), lambda z: z)
    torch.testing.assert_close(adv, torch.tensor([[0.3, -0.4]]))


def test_reproducible_per_seed_and_zero_radius_stands_still(net, images, labels) -> None:
    net.eval()
    attack = LossAttack(ThreatModel("linf", 0.1))

    def once(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attack(net, images, labels)

    assert torch.equal(once(5), once(5))
    assert not torch.equal(once(5), once(6))
    assert torch.equal(LossAttack(ThreatModel("l2", 0.0))(net, images, labels), images)


def test_bad_settings_and_inputs_outside_the_box() -> None:
    threat = ThreatModel("linf", 0.1)
    for kwargs, name in (({"steps": 0}, "steps"), ({"alpha": 0.0}, "alpha")):
        with pytest.raises(ArgumentError) as caught:
            LossAttack(threat, **kwargs)
        assert caught.value.argument == name
    with pytest.raises(ArgumentError, match=r"box=None"):
        LossAttack(threat)(nn.Linear(3, 2), torch.full((2, 3), 1.5), torch.tensor([0, 1]))


# -- Adversary: who does the work -------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory",
    [
        functools.partial(torchattacks.FGSM, eps=0.1),
        functools.partial(torchattacks.PGD, eps=0.1, alpha=0.03, steps=5),
        functools.partial(torchattacks.PGDL2, eps=0.5, alpha=0.2, steps=5),
        functools.partial(torchattacks.FFGSM, eps=0.1, alpha=0.12),
        functools.partial(torchattacks.APGD, eps=0.1, steps=5, n_restarts=1),
    ],
    ids=["FGSM", "PGD", "PGDL2", "FFGSM", "APGD"],
)
def test_torchattacks_does_the_work_on_images_and_classes(factory, net, images, labels) -> None:
    adversary = Adversary(net, factory)
    adv = adversary(images, labels)
    assert adversary.why_own is None
    assert not torch.equal(adv, images)
    _assert_in_ball_and_box(adversary.threat, images, adv)
    assert _losses(net, adv, labels).mean() > _losses(net, images, labels).mean()


def test_same_result_as_calling_torchattacks_oneself(net, images, labels) -> None:
    torch.manual_seed(9)
    mine = Adversary(net, functools.partial(torchattacks.PGD, eps=0.1))(images, labels)
    torch.manual_seed(9)
    theirs = torchattacks.PGD(net.eval(), eps=0.1)(images, labels)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("attack", [torchattacks.PGD, torchattacks.PGDL2, torchattacks.FGSM])
@pytest.mark.parametrize("shape", [(10, 1, 4, 4), (10, 16)])
def test_one_logit_is_attacked_on_its_true_loss(label, attack, shape) -> None:
    """torchattacks alone leaves label 0 where it is and fails with an IndexError for label 1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    x, y = torch.rand(shape), torch.full((10,), label)
    adversary = Adversary(net, functools.partial(attack, eps=0.1), loss=nn.BCEWithLogitsLoss())
    adv = adversary(x, y)
    assert "not plain cross-entropy" in adversary.why_own
    _assert_in_ball_and_box(adversary.threat, x, adv)
    loss = F.binary_cross_entropy_with_logits
    assert (_losses(net, adv, y, loss) > _losses(net, x, y, loss)).all()


def test_one_logit_without_a_loss_is_refused(images) -> None:
    net = Net(1)
    with pytest.raises(ArgumentError, match="set `criterion`"):
        Adversary(net, torchattacks.PGD)(images, torch.ones(12))


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (F.mse_loss, torch.linspace(-1, 1, 12).repeat(3, 1).T),
        (nn.CrossEntropyLoss(label_smoothing=0.3), torch.arange(12) % 3),
        (F.cross_entropy, torch.full((12, 3), 1 / 3)),
    ],
    ids=["mse", "smoothing", "soft labels"],
)
def test_other_losses_are_maximised_themselves(loss, y, net, images) -> None:
    adversary = Adversary(net, functools.partial(torchattacks.PGD, eps=0.1), loss=loss)
    adv = adversary(images, y)
    assert adversary.why_own
    before, after = _losses(net, images, y, adversary.loss), _losses(net, adv, y, adversary.loss)
    assert (after >= before).all()
    assert after.mean() > before.mean() + 1e-4


def test_criterion_of_the_module_is_the_loss(net, images, labels) -> None:
    net.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 1.0]))
    adversary = Adversary(net, torchattacks.PGD)
    assert adversary.why_own
    assert adversary.loss(torch.zeros(1, 3), torch.tensor([1]), reduction="none").item() == 0.0


def test_tabular_l2_and_box_free_data_use_our_own(labels) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(5, 3), 4 * torch.randn(12, 5)
    inside = Adversary(net, functools.partial(torchattacks.PGDL2, eps=0.2))
    with pytest.raises(ArgumentError, match="box=None"):
        inside(x, labels)
    assert "the inputs are 2-dimensional" in inside.why_own
    for norm, cls in (("l2", torchattacks.PGDL2), ("linf", torchattacks.PGD)):
        adversary = Adversary(net, functools.partial(cls, eps=0.2), ThreatModel(norm, 0.2, None))
        adv = adversary(x, labels)
        assert "not the box" in adversary.why_own
        _assert_in_ball_and_box(adversary.threat, x, adv)
        assert (_losses(net, adv, labels) > _losses(net, x, labels)).all()
        assert adv.min() < -1  # nothing was clamped to [0, 1]


def test_attacks_given_in_other_ways(net, images, labels) -> None:
    threat = ThreatModel("l2", 0.3)
    by_threat = Adversary(net, None, threat)
    assert by_threat.why_own == "no torchattacks attack was given"
    for adversary in (by_threat, Adversary(net, threat), Adversary(net, LossAttack(threat, steps=3))):
        assert adversary.threat == threat
        adv = adversary(images, labels)
        _assert_in_ball_and_box(threat, images, adv)
        assert _losses(net, adv, labels).mean() > _losses(net, images, labels).mean()


def test_somebodys_own_attack_is_taken_at_its_word(net, images, labels) -> None:
    class Mine:
        def __call__(self, x: Tensor, y: Tensor) -> Tensor:
            return (x + 0.01).clamp(max=1.0)

    with pytest.raises(ArgumentError, match="attack: got"):
        Adversary(net, Mine())
    adversary = Adversary(net, Mine(), ThreatModel("linf", 0.01))
    assert torch.equal(adversary(images, labels), (images + 0.01).clamp(max=1.0))


def test_disagreement_and_wrong_models_are_refused(net) -> None:
    with pytest.raises(ArgumentError, match=r"'linf' and 0\.1"):
        Adversary(net, functools.partial(torchattacks.PGD, eps=0.1), ThreatModel("linf", 0.2))
    with pytest.raises(ArgumentError, match="built for another model"):
        Adversary(net, torchattacks.PGD(Net(), eps=0.1))
    with pytest.raises(ArgumentError, match="attack: got None"):
        Adversary(net)
    unbound = torchattacks.PGD(net)
    unbound.model = None
    with pytest.raises(ArgumentError, match="an attack with a model"):
        Adversary(net, unbound)
    with pytest.raises(ArgumentError, match="trades_beta"):
        Adversary(net, torchattacks.PGD, trades_beta=0.0)
    normalised = torchattacks.PGD(net, eps=0.1)
    normalised.set_normalization_used([0.5], [0.5])
    with pytest.raises(ArgumentError, match="inside the model"):
        Adversary(net, normalised, ThreatModel("linf", 0.1))
    with pytest.raises(UnsuitableError, match="returns tuple"):
        Adversary(nn.LSTM(4, 3), torchattacks.PGD)(torch.rand(2, 5, 4), torch.tensor([0, 1]))


# -- no trace ---------------------------------------------------------------------------------------


class Failing(torchattacks.PGD):
    def forward(self, images, labels=None):
        self.get_logits(images).sum().backward()
        raise RuntimeError("in the middle")


class Backward(torchattacks.PGD):
    def forward(self, images, labels=None):
        self.get_logits(images).sum().backward()
        return super().forward(images, labels)


@pytest.mark.parametrize("kind", ["torchattacks", "own", "fails"])
def test_modes_gradients_buffers_and_flags_are_as_they_were(kind, net, images, labels) -> None:
    net.train()
    net.backbone.eval()
    net.backbone[4].train()
    net(images).sum().backward()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [p.grad for p in net.parameters()]
    values = [g.clone() for g in grads]
    modes = {n: m.training for n, m in net.named_modules()}
    threat = ThreatModel("linf", 8 / 255)
    attack = {"torchattacks": Backward(net), "own": threat, "fails": Failing(net)}[kind]
    adversary = Adversary(net, attack, threat)
    if kind == "fails":
        with pytest.raises(RuntimeError, match="in the middle"):
            adversary(images, labels)
    else:
        adversary(images, labels)
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert all(p.grad is g and torch.equal(g, v) for p, g, v in zip(net.parameters(), grads, values, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("attack", [torchattacks.PGD, torchattacks.PGDL2, ThreatModel("linf", 0.03)])
def test_works_under_no_grad_and_inference_mode(around, attack, net, images, labels) -> None:
    net.eval()
    with around():
        x, y = images * 1.0, labels * 1  # tensors of that mode, as a data loader makes them there
        torch.manual_seed(2)
        adv = Adversary(net, attack)(x, y)
        assert torch.is_grad_enabled() is False
        assert torch.is_inference_mode_enabled() is (around is torch.inference_mode)
    torch.manual_seed(2)
    assert torch.equal(adv, Adversary(net, attack)(images, labels))


def test_autocast_under_inference_mode_after_a_cached_forward(net, images, labels) -> None:
    net.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        net(images)  # caches weights cast to bfloat16 as inference tensors
        for attack in (torchattacks.PGD, ThreatModel("l2", 0.3)):
            adversary = Adversary(net, attack)
            adv = adversary(images, labels)
            assert adv.dtype is torch.float32
            _assert_in_ball_and_box(adversary.threat, images, adv)


def test_compiled_nets(net, images, labels) -> None:
    net.eval()
    torch.manual_seed(4)
    want = Adversary(net, torchattacks.PGD)(images, labels)
    net.backbone.compile(backend="eager")
    torch.manual_seed(4)
    torch.testing.assert_close(Adversary(net, torchattacks.PGD)(images, labels), want)


def test_batch_structure_is_kept(net, images, labels) -> None:
    adversary = Adversary(net, torchattacks.PGD)
    weight = torch.ones(12)
    x, y, rebuild = adversary.split({"image": images, "label": labels, "weight": weight})
    out = rebuild(adversary(x, y))
    assert out["label"] is labels
    assert out["weight"] is weight
    assert not torch.equal(out["image"], images)


# -- TRADES -----------------------------------------------------------------------------------------


def test_divergence_is_the_kl_of_the_predictions() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    p, q = a.softmax(1), b.softmax(1)
    torch.testing.assert_close(divergence(a, b), (p * (p / q).log()).sum(1))
    a, b = a[:, :1], b[:, 0]
    p, q = a[:, 0].sigmoid(), b.sigmoid()
    torch.testing.assert_close(divergence(a, b), p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


@pytest.mark.parametrize("attack", [torchattacks.TPGD, torchattacks.PGDL2, ThreatModel("linf", 0.03)])
def test_trades_climbs_the_divergence(attack, net, images, labels) -> None:
    adversary = Adversary(net, attack, trades_beta=6.0)
    assert (adversary.why_own is None) is (attack is torchattacks.TPGD)
    adv = adversary(images, labels)
    _assert_in_ball_and_box(adversary.threat, images, adv)
    net.eval()
    noise = (images + 0.03 * torch.randn(images.shape).sign()).clamp(0, 1)
    assert divergence(net(images), net(adv)).mean() > 3 * divergence(net(images), net(noise)).mean()
