"""Adversarial training under real trainers: what the user's own step receives, what is logged, what is left behind."""

from __future__ import annotations

import copy
import functools
from collections import namedtuple
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_muter.adversarial.adversary import Adversary, divergence
from lightning_muter.adversarial.climb import LossAttack
from lightning_muter.adversarial.steps import STATE, STEPS
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.adversarial.training import AdversarialTraining, AdversarialTrainingMixin, adversary_of
from lightning_muter.errors import ArgumentError, RequestError, UnsuitableError

EPS = 0.1
PGD = functools.partial(torchattacks.PGD, eps=EPS, alpha=0.04, steps=3)
N = 12


class Data(Dataset):
    """Images (1, 4, 4) in [0, 1], three classes; ``shape`` says how a sample is packed."""

    Pair = namedtuple("Pair", "image label")

    def __init__(self, shape: str = "tuple") -> None:
        g = torch.Generator().manual_seed(0)
        self.y = torch.arange(N) % 3
        self.x = (0.25 * self.y[:, None, None, None] + 0.5 * torch.rand(N, 1, 4, 4, generator=g)).clamp(0, 1)
        self.shape = shape

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        x, y = self.x[i], self.y[i]
        return {
            "tuple": (x, y),
            "list": [x, y],
            "dict": {"image": x, "label": y, "index": i},
            "named": self.Pair(x, y),
            "weighted": (x, y, torch.tensor(0.5)),
        }[self.shape]


def loader(data: Dataset | None = None, **kwargs: Any) -> DataLoader:
    return DataLoader(data or Data(), batch_size=kwargs.pop("batch_size", 4), **kwargs)


class Plain(L.LightningModule):
    """Knows nothing of this package. Records the batches that its steps receive."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(16, 3)
        self.seen: list[Any] = []
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        self.modes.append((self.training, self.backbone.training))
        x, y = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch[:2]
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Measured(Plain):
    """With validation and test of its own."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)
        self.log("val/own", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)


class Net(AdversarialTrainingMixin, Plain):
    def configure_attack(self) -> Any:
        return PGD(self)


class MeasuredNet(AdversarialTrainingMixin, Measured):
    def configure_attack(self) -> Any:
        return PGD(self)


def trainer(**kwargs: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return L.Trainer(**{**defaults, **kwargs})


pytestmark = pytest.mark.filterwarnings(
    # a fact of this machine and of tiny data, not of the code under test
    "ignore:The '.*_dataloader' does not have many workers",
)


def assert_attacked(seen: list[Any], clean: Dataset | None = None) -> None:
    """Every batch lies in ball and box, none is the clean one; labels are untouched."""
    data = clean or Data()
    assert seen
    for i, batch in enumerate(seen):
        x, y = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch[:2]
        rows = slice(4 * (i % 3), 4 * (i % 3) + 4)
        delta = x.float() - data.x[rows]
        assert delta.abs().flatten(1).amax(1).min() > EPS / 2
        assert delta.abs().max() <= EPS + (1e-6 if x.dtype is torch.float32 else 0.01)
        assert x.min() >= 0
        assert x.max() <= 1
        assert torch.equal(y, data.y[rows])


def modules_and_callbacks() -> list[Any]:
    return [
        pytest.param(lambda: (Net(), []), id="mixin"),
        pytest.param(lambda: (Plain(), [AdversarialTraining(PGD)]), id="callback"),
    ]


both = pytest.mark.parametrize("make", modules_and_callbacks())
both_measured = pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: (MeasuredNet(), []), id="mixin"),
        pytest.param(lambda: (Measured(), [AdversarialTraining(PGD)]), id="callback"),
    ],
)


# -- the training step ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("shape", ["tuple", "list", "dict", "named", "weighted"])
def test_own_step_receives_the_adversarial_batch_in_its_own_structure(make, shape) -> None:
    model, callbacks = make()
    plain = Plain()
    trainer().fit(plain, loader(Data(shape)))
    trainer(callbacks=callbacks).fit(model, loader(Data(shape)))
    assert_attacked(model.seen)
    for got, clean in zip(model.seen, plain.seen, strict=True):
        assert type(got) is type(clean)
        if isinstance(got, dict):
            assert torch.equal(got["index"], clean["index"])
        if shape == "weighted":
            assert torch.equal(got[2], clean[2])


@both
def test_the_loss_of_the_attacked_batch_is_higher(make) -> None:
    model, callbacks = make()

    class Frozen(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            x, y = pl_module.seen[-1]
            pl_module.eval()
            with torch.no_grad():
                raised = F.cross_entropy(pl_module(x), y) - F.cross_entropy(pl_module(batch[0]), batch[1])
            pl_module.train()
            assert raised > 0.01

    for p in model.parameters():
        p.requires_grad_(p is model.head.bias)
    model.configure_optimizers = lambda: torch.optim.SGD([model.head.bias], lr=1e-6)
    trainer(callbacks=[*callbacks, Frozen()]).fit(model, loader())


@both
def test_frozen_backbone_in_eval_stays_in_eval(make) -> None:
    model, callbacks = make()

    class Freeze(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.backbone.eval()

    trainer(callbacks=[*callbacks, Freeze()]).fit(model, loader())
    assert model.modes == [(True, False)] * 3


@both
def test_reproducible_per_seed(make) -> None:
    def weights(seed: int) -> Tensor:
        model, callbacks = make()
        L.seed_everything(seed, verbose=False)
        trainer(callbacks=callbacks).fit(model, loader())
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_mixin_and_callback_train_to_the_same_weights() -> None:
    results = []
    for model, callbacks in ((MeasuredNet(), []), (Measured(), [AdversarialTraining(PGD)])):
        L.seed_everything(3, verbose=False)
        trainer(callbacks=callbacks).fit(model, loader(), loader())
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


@both
def test_gradients_are_those_of_the_attacked_batch_alone(make) -> None:
    """Accumulation over three batches: the attack must neither add to nor reset the gradients."""
    model, callbacks = make()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    found: list[Tensor] = []

    class Grab(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.backbone[1].eval()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            found.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))

    trainer(callbacks=[*callbacks, Grab()], accumulate_grad_batches=3).fit(model, loader())
    assert_attacked(model.seen)
    loss = sum(F.cross_entropy(model(x), y) for x, y in model.seen) / 3
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert len(found) == 1
    torch.testing.assert_close(found[0], want)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@both_measured
def test_precision(make, precision) -> None:
    model, callbacks = make()
    run = trainer(callbacks=callbacks, precision=precision, num_sanity_val_steps=0)
    run.fit(model, loader(), loader())
    trained = model.seen[:3]
    assert_attacked(trained)
    dtypes = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert trained[0][0].dtype is dtypes[precision]
    assert 0 <= run.callback_metrics["val/robust_acc"] <= run.callback_metrics["val/clean_acc"]


@pytest.mark.filterwarnings("ignore:The attack raises torch.nn.functional.cross_entropy")
@both
def test_manual_optimisation(make) -> None:
    model, callbacks = make()
    model.automatic_optimization = False
    step = type(model).training_step

    def manual(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.seen.append(batch)
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()

    Manual = type("Manual", (type(model),), {"training_step": manual})
    model.__class__ = Manual
    before = model.head.weight.clone()
    trainer(callbacks=callbacks).fit(model, loader())
    assert_attacked(model.seen)
    assert not torch.equal(before, model.head.weight)
    assert step is not manual


@both
def test_lbfgs_attacks_at_every_closure(make) -> None:
    model, callbacks = make()
    model.configure_optimizers = lambda: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    trainer(callbacks=callbacks).fit(model, loader(batch_size=4))
    assert len(model.seen) > 3
    assert all((b[0] - Data().x[4 * 0 : 4 * 0 + 4]).abs().max() > 0 for b in model.seen)


@both
def test_compiled_in_place(make) -> None:
    model, callbacks = make()
    model.backbone.compile(backend="eager")
    trainer(callbacks=callbacks).fit(model, loader())
    assert_attacked(model.seen)


def test_module_compiled_as_a_whole() -> None:
    for model, callbacks in ((Net(), []), (Plain(), [AdversarialTraining(PGD)])):
        trainer(callbacks=callbacks).fit(torch.compile(model, backend="eager"), loader())
        assert_attacked(model.seen)


# -- every way to write the class -------------------------------------------------------------------


class Attack(AdversarialTrainingMixin):
    def configure_attack(self) -> Any:
        self.asked = getattr(self, "asked", 0) + 1
        return PGD(self)


class Silent(Plain):
    """Own step without ``batch_idx``."""

    def training_step(self, batch: Any) -> Tensor:
        return super().training_step(batch, 0)


class First(Attack, Plain): ...


class Last(Plain, Attack): ...


class OwnStepFirst(Attack, Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)


class OwnStepLast(Plain, Attack):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch=batch, batch_idx=batch_idx)


class Deep(OwnStepFirst):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)


class Doubling(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 2 * super().training_step(batch, batch_idx)


class OverrideOnTop(Doubling, OwnStepFirst): ...


class OverrideBelow(First, Doubling): ...


class NoBatchIdx(Attack, Silent): ...


class SetupWithoutSuper(Plain, Attack):
    def setup(self, stage: str) -> None:
        self.was_set_up = True

    def on_fit_start(self) -> None:
        self.was_started = True


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


class Decorated(Attack, Plain):
    @decorated
    def training_step(self, batch: Any) -> Tensor:
        return super().training_step(batch, 0)


@pytest.mark.parametrize(
    "cls",
    [
        First,
        Last,
        OwnStepFirst,
        OwnStepLast,
        Deep,
        OverrideOnTop,
        OverrideBelow,
        NoBatchIdx,
        SetupWithoutSuper,
        Decorated,
    ],
)
def test_mixin_in_every_order_attacks_exactly_once(cls, monkeypatch) -> None:
    attacked = []
    forward = torchattacks.PGD.forward
    monkeypatch.setattr(torchattacks.PGD, "forward", lambda s, *a: attacked.append(1) or forward(s, *a))
    model = cls()
    trainer().fit(model, loader())
    assert_attacked(model.seen)
    assert len(attacked) == 3
    assert model.asked == 1
    if cls is SetupWithoutSuper:
        assert model.was_set_up
        assert model.was_started


def test_cooperative_override_below_the_mixin_still_runs() -> None:
    model = OverrideBelow()
    x, y = Data().x[:4], Data().y[:4]
    model.eval()
    torch.testing.assert_close(model.training_step((x, y), 0), 2 * F.cross_entropy(model(model.seen[-1][0]), y))


@pytest.mark.parametrize("base", [Silent, Plain])
def test_callback_on_steps_with_and_without_batch_idx(base) -> None:
    model = base()
    trainer(callbacks=[AdversarialTraining(PGD)]).fit(model, loader())
    assert_attacked(model.seen)


def test_step_called_by_hand_is_attacked_too() -> None:
    model, (x, y) = MeasuredNet(), (Data().x[:4], Data().y[:4])
    model.training_step((x, y), 0)
    model.training_step(batch=(x, y), batch_idx=1)
    for batch in model.seen:
        assert 0 < (batch[0] - x).abs().max() <= EPS + 1e-6
    model.log = lambda *args, **kwargs: None
    model.validation_step((x, y), 0)  # without a trainer there is nothing to log to
    assert model.seen[-1][0] is x


def test_attack_is_asked_for_anew_at_every_fit_and_none_trains_plainly() -> None:
    class Switch(AdversarialTrainingMixin, Measured):
        eps: ClassVar[float] = 0.0

        def configure_attack(self) -> Any:
            return torchattacks.PGD(self, eps=self.eps) if self.eps else None

    model = Switch()
    run = trainer()
    run.fit(model, loader(), loader())
    assert all(torch.equal(b[0], Data().x[4 * i : 4 * i + 4]) for i, b in enumerate(model.seen[2:5]))
    assert "val/robust_acc" not in run.callback_metrics
    assert adversary_of(model) is None
    Switch.eps = 0.02
    model.seen.clear()
    trainer(num_sanity_val_steps=0).fit(model, loader(), loader())
    assert model.seen[2][0].sub(Data().x[8:]).abs().max() == pytest.approx(0.02, abs=1e-6)
    assert adversary_of(model).threat == ThreatModel("linf", 0.02)


# -- validation and test ----------------------------------------------------------------------------


@both_measured
def test_clean_and_robust_accuracy_are_logged_and_exact(make) -> None:
    """Unequal last batch: the mean over samples, not over batches."""
    model, callbacks = make()
    run = trainer(callbacks=callbacks, max_epochs=6, num_sanity_val_steps=0, check_val_every_n_epoch=6)
    run.fit(model, loader(), loader(batch_size=5))
    model.eval()
    data = Data()
    clean = (model(data.x).argmax(1) == data.y).float().mean()
    assert run.callback_metrics["val/clean_acc"].item() == pytest.approx(clean.item())
    assert run.callback_metrics["val/robust_acc"] < run.callback_metrics["val/clean_acc"]
    assert "val/own" in run.callback_metrics
    (logged,) = run.test(model, loader(batch_size=5), verbose=False)
    assert logged["test/clean_acc"] == pytest.approx(clean.item())
    assert logged["test/robust_acc"] <= logged["test/clean_acc"]
    (logged,) = run.validate(model, loader(batch_size=5), verbose=False)
    assert {"val/clean_acc", "val/robust_acc"} <= set(logged)


@both_measured
def test_robust_accuracy_is_that_of_the_attack(make) -> None:
    """Deterministic attack (FGSM): the logged number is reproduced by hand."""
    model, callbacks = make()
    data = Data()
    if callbacks:
        callbacks = [AdversarialTraining(functools.partial(torchattacks.FGSM, eps=EPS))]
    else:
        model.configure_attack = lambda: torchattacks.FGSM(model, eps=EPS)
    (logged,) = trainer(callbacks=callbacks).test(model, loader(batch_size=5), verbose=False)
    model.eval()
    adv = torchattacks.FGSM(model, eps=EPS)(data.x, data.y)
    robust = (model(adv).argmax(1) == data.y).float().mean()
    assert logged["test/robust_acc"] == pytest.approx(robust.item())


@both_measured
def test_own_validation_step_sees_the_clean_batch(make) -> None:
    model, callbacks = make()
    trainer(callbacks=callbacks).validate(model, loader(), verbose=False)
    assert torch.equal(torch.cat([b[0] for b in model.seen]), Data().x)


def test_switches() -> None:
    off = {"adversarial_validation": False, "adversarial_test": False}
    mixin = MeasuredNet()
    mixin.adversarial_validation = mixin.adversarial_test = False
    for model, callbacks in ((mixin, []), (Measured(), [AdversarialTraining(PGD, **off)])):
        run = trainer(callbacks=callbacks)
        run.fit(model, loader(), loader())
        assert set(run.callback_metrics) == {"val/own"}
        assert run.test(model, loader(), verbose=False) == [{}]


def test_barebones_trainer_logs_nothing() -> None:
    model = Measured()
    model.validation_step = lambda batch, batch_idx: None
    run = L.Trainer(accelerator="cpu", barebones=True, max_epochs=1, callbacks=[AdversarialTraining(PGD)])
    run.fit(model, loader(), loader())
    assert_attacked(model.seen)


# -- one logit, regression, tables ------------------------------------------------------------------


class Table(L.LightningModule):
    """(N, D) inputs without bounds, one logit, nothing known of this package."""

    def __init__(self, criterion: nn.Module, squeeze: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.criterion, self.squeeze = nn.Linear(5, 1), criterion, squeeze
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1) if self.squeeze else self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.criterion(self(batch[0]).reshape(-1), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.03, weight_decay=1e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("squeeze", [True, False])
@pytest.mark.parametrize("criterion", [nn.BCEWithLogitsLoss(), nn.MSELoss()], ids=["bce", "mse"])
def test_one_logit_on_tables(norm, squeeze, criterion) -> None:
    g = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(30, 5, generator=g)
    y = (x[:, 0] > 0).float() if isinstance(criterion, nn.BCEWithLogitsLoss) else x[:, 0]
    data = torch.utils.data.TensorDataset(x, y)
    attack = functools.partial(torchattacks.PGDL2 if norm == "l2" else torchattacks.PGD, eps=0.2, alpha=0.1)
    model = Table(criterion, squeeze)
    run = trainer(
        callbacks=[AdversarialTraining(attack, ThreatModel(norm, 0.2, None))], max_epochs=60, check_val_every_n_epoch=60
    )
    run.fit(model, loader(data, batch_size=30), loader(data, batch_size=30))
    order = 2 if norm == "l2" else torch.inf
    for adv, _ in model.seen:
        size = (adv - x).norm(p=order, dim=1)
        # the whole radius is used: for a linear model every maximiser lies on the sphere
        torch.testing.assert_close(size, torch.full_like(size, 0.2), rtol=0, atol=0.02)
    w = model.net.weight.detach().flatten()
    margin = 0.2 * w.norm(p=2 if norm == "l2" else 1)
    z = model(x).detach().reshape(-1)
    logged = run.callback_metrics
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        robust = ((z * (2 * y - 1)) > margin).float().mean()
        assert logged["val/robust_acc"].item() == pytest.approx(robust.item(), abs=0.04)
        assert logged["val/clean_acc"] > 0.9
    else:
        robust = ((z - y).abs() + margin).square().mean()
        # squared errors have two local maxima, (r + margin)^2 and (r - margin)^2: climbing may end in the lower one
        assert 0.9 * robust < logged["val/robust_loss"] < 1.0001 * robust
        assert logged["val/clean_loss"].item() == pytest.approx((z - y).square().mean().item(), rel=1e-4)


def test_table_outside_the_box_is_refused_with_the_way_out() -> None:
    data = torch.utils.data.TensorDataset(5 * torch.randn(8, 5), torch.ones(8))
    with pytest.raises(ArgumentError, match="box=None"):
        trainer(callbacks=[AdversarialTraining(PGD)]).fit(
            Table(nn.BCEWithLogitsLoss(), True), loader(data), loader(data)
        )


# -- TRADES -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [functools.partial(torchattacks.TPGD, eps=EPS, alpha=0.04, steps=3), PGD])
@pytest.mark.parametrize("output", ["tensor", "dict"])
def test_trades_adds_the_divergence_to_the_clean_loss(attack, output, monkeypatch) -> None:
    """One full-batch step with BatchNorm in eval: the gradient is that of CE(clean) + beta KL(clean || adversarial)."""
    beta, found, attacked = 2.0, [], []

    class Module(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {"tensor": loss, "dict": {"loss": loss, "kept": 3}}[output]

    class Grab(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.backbone.eval()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            found.append([p.grad.clone() for p in pl_module.parameters()])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if output == "dict":
                assert outputs["kept"] == 3

    call = Adversary.__call__
    monkeypatch.setattr(Adversary, "__call__", lambda *args: attacked.append(call(*args)) or attacked[-1])
    model = Module()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    callbacks = [AdversarialTraining(attack, trades_beta=beta), Grab()]
    trainer(callbacks=callbacks).fit(model, loader(batch_size=N))
    data, adv = Data(), attacked[0]
    assert torch.equal(model.seen[0][0], data.x)  # the step saw the clean batch
    assert (adv - data.x).abs().max() <= EPS + 1e-6
    model.eval()
    term = divergence(model(data.x), model(adv)).mean()
    assert term > 1e-4
    loss = F.cross_entropy(model(data.x), data.y) + beta * term
    for got, want in zip(found[0], torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_trades_leaves_a_skipped_batch_skipped() -> None:
    class Skips(Net):
        trades_beta = 3.0

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(batch)

    model, batch = Skips(), (Data().x, Data().y)
    assert model.training_step(batch, 0) is None
    assert model.seen[0][0] is batch[0]


# -- refusals and clean-up --------------------------------------------------------------------------


def test_both_on_one_module_and_two_callbacks_are_refused() -> None:
    with pytest.raises(UnsuitableError, match="attacked twice"):
        trainer(callbacks=[AdversarialTraining(PGD)]).fit(Net(), loader())
    model = Plain()
    with pytest.raises(UnsuitableError, match="Two AdversarialTraining"):
        trainer(callbacks=[AdversarialTraining(PGD), AdversarialTraining(PGD)]).fit(model, loader())
    assert not {*STEPS, STATE} & set(vars(model))


def test_steps_that_fetch_their_own_batches_are_refused() -> None:
    class Fetching(Plain):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            raise AssertionError("never reached")

    callback = AdversarialTraining(PGD)
    with pytest.raises(UnsuitableError, match="dataloader_iter"):
        callback.setup(trainer(), Fetching(), "fit")
    with pytest.raises(UnsuitableError, match="dataloader_iter"):
        type("Both", (AdversarialTrainingMixin, Fetching), {})


def test_steps_that_are_no_methods_are_refused() -> None:
    with pytest.raises(UnsuitableError, match="staticmethod"):
        type("Bad", (AdversarialTrainingMixin, Plain), {"training_step": staticmethod(lambda batch: None)})
    model = Net()
    model.training_step = lambda batch, batch_idx: None
    with pytest.raises(UnsuitableError, match="replaced after the class was made"):
        trainer().fit(model, loader())


def test_missing_pieces_are_named_at_fit_start() -> None:
    class NoAttack(AdversarialTrainingMixin, Plain): ...

    with pytest.raises(UnsuitableError, match="configure_attack"):
        trainer().fit(NoAttack(), loader())

    class NoForward(Plain):
        forward = L.LightningModule.forward

    started: list[int] = []

    class Watch(L.Callback):
        def on_train_start(self, trainer, pl_module):
            started.append(1)

    with pytest.raises(UnsuitableError, match="no forward"):  # the first batch tells
        trainer(callbacks=[AdversarialTraining(PGD)]).fit(NoForward(), loader())
    for model, callback, words in (
        (Plain(), AdversarialTraining(), "attack: got None"),
        (Plain(), AdversarialTraining(torchattacks.CW), "threat_model=ThreatModel"),
        (Plain(), AdversarialTraining(PGD, ThreatModel("l2", 1.0)), "threat_model: got"),
    ):
        with pytest.raises((UnsuitableError, ArgumentError), match=words):
            trainer(callbacks=[callback, Watch()]).fit(model, loader())
    assert not started


def test_trades_with_manual_optimisation_is_refused() -> None:
    model = Plain()
    model.automatic_optimization = False
    with pytest.raises(UnsuitableError, match="TRADES"):
        trainer(callbacks=[AdversarialTraining(PGD, trades_beta=1.0)]).fit(model, loader())


def test_callback_leaves_nothing_behind() -> None:
    model = Measured()
    attributes = dict(vars(model))
    run = trainer(callbacks=[AdversarialTraining(PGD)])
    run.fit(model, loader(), loader())
    run.test(model, loader(), verbose=False)
    assert not {*STEPS, STATE} & set(vars(model))
    assert set(vars(model)) - set(attributes) <= {"_hparams"}  # Lightning's own
    assert list(model.state_dict()) == list(Plain().state_dict())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(error) -> None:
    class Breaks(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise error
            return super().training_step(batch, batch_idx)

    model = Breaks()
    with pytest.raises((RuntimeError, SystemExit)):
        trainer(callbacks=[AdversarialTraining(PGD)]).fit(model, loader())
    assert len(model.seen) == 1
    assert not {*STEPS, STATE} & set(vars(model))
    assert all(m.training for m in model.modules())


def test_failing_attack_restores_modes_and_the_guard() -> None:
    class Failing(torchattacks.PGD):
        def forward(self, images, labels=None):
            if len(model.seen) == 1:
                raise RuntimeError("attack failed")
            return super().forward(images, labels)

    class Own(AdversarialTrainingMixin, Plain):
        threat_model = ThreatModel("linf", EPS)

        def configure_attack(self) -> Any:
            return Failing(self, eps=EPS)

    model = Own()
    batch = (Data().x[:4], Data().y[:4])
    model.backbone.eval()
    model.training_step(batch, 0)
    with pytest.raises(RuntimeError, match="attack failed"):
        model.training_step(batch, 0)
    assert (model.training, model.backbone.training) == (True, False)
    model.seen.append(batch)
    model.training_step(batch, 0)  # attacked again: the guard was released
    assert not torch.equal(model.seen[-1][0], batch[0])


def test_previous_instance_step_comes_back() -> None:
    model = Plain()

    def own(batch: Any, batch_idx: int) -> Tensor:
        model.seen.append(batch)
        return F.cross_entropy(model(batch[0]), batch[1])

    model.training_step = own
    trainer(callbacks=[AdversarialTraining(PGD)]).fit(model, loader())
    assert_attacked(model.seen)
    assert vars(model)["training_step"] is own


def test_deep_copy_during_a_run_runs_its_own_step() -> None:
    class Copy(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            self.copy = copy.deepcopy(pl_module)

    grabbed = Copy()
    model = Plain()
    trainer(callbacks=[AdversarialTraining(PGD), grabbed]).fit(model, loader())
    grabbed.copy.seen.clear()
    grabbed.copy._trainer = None
    grabbed.copy.training_step((Data().x[:4], Data().y[:4]), 0)
    assert len(grabbed.copy.seen) == 1
    assert len(model.seen) == 3


@both
@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "WeightAveraging"])
@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_copies_the_module_in_any_order(make, name, first) -> None:
    model, callbacks = make()
    averaging: Any = L.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    if name == "WeightAveraging":
        averaging = pytest.importorskip("lightning.pytorch.callbacks").WeightAveraging()
    order = [averaging, *callbacks] if first else [*callbacks, averaging]
    trainer(callbacks=order, max_epochs=3).fit(model, loader())
    assert_attacked(model.seen[:9])
    assert not {*STEPS, STATE} & set(vars(model))


class Evaluated(L.LightningModule):
    """Nothing but a test."""

    forward = Plain.forward
    test_step = Measured.test_step

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head, self.seen = Plain().backbone, Plain().head, []


class EvaluatedNet(Attack, Evaluated):
    pass


def test_module_without_a_training_step_is_tested_all_the_same() -> None:
    for model, callbacks in ((EvaluatedNet(), []), (Evaluated(), [AdversarialTraining(PGD)])):
        (logged,) = trainer(callbacks=callbacks).test(model, loader(), verbose=False)
        assert set(logged) == {"test/clean_acc", "test/robust_acc"}


def test_checkpoints_are_ordinary(tmp_path) -> None:
    model = Net()
    run = trainer()
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "m.ckpt")
    loaded = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert list(loaded["state_dict"]) == list(Plain().state_dict())
    assert torch.equal(Net.load_from_checkpoint(tmp_path / "m.ckpt").head.weight, model.head.weight)


# -- module.unlearn ---------------------------------------------------------------------------------


def test_unlearn_calls_the_attached_callback() -> None:
    class Fake(L.Callback):
        calls: ClassVar[list[Any]] = []

        @property
        def snapshot(self) -> Any:
            raise RuntimeError("not to be evaluated")

        def unlearn(self, model: Any, forget: Any, **kwargs: Any) -> str:
            self.calls.append((model, forget, kwargs))
            return "result"

    model = Net()
    with pytest.raises(RequestError, match="found 0"):
        model.unlearn([1])
    trainer().fit(model, loader())
    with pytest.raises(RequestError, match="found 0"):
        model.unlearn([1])
    trainer(callbacks=[Fake()]).fit(model, loader())
    assert model.unlearn([1, 2], refine=2) == "result"
    assert Fake.calls == [(model, [1, 2], {"refine": 2})]


@pytest.mark.parametrize(
    ("attack", "threat"),
    [
        ({"class_path": "torchattacks.PGDL2", "init_args": {"eps": 0.2}}, ThreatModel("l2", 0.2)),
        (
            {
                "class_path": "lightning_muter.adversarial.threat_model.ThreatModel",
                "init_args": {"norm": "linf", "eps": 0.3},
            },
            ThreatModel("linf", 0.3),
        ),
    ],
)
def test_attack_in_a_config_file(attack, threat) -> None:
    """As LightningCLI reads it: an attack becomes a factory that waits for the model."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AdversarialTraining, "callback")
    settings = {"attack": attack, "loss": "torch.nn.functional.cross_entropy", "trades_beta": 2.0}
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name
    callback = build(parser.parse_object({"callback": settings})).callback
    assert ThreatModel.from_attack(callback.attack) == threat
    assert callback.loss is F.cross_entropy
    assert callback.trades_beta == 2.0


def test_other_ways_to_name_the_attack() -> None:
    for attack in (ThreatModel("linf", EPS), LossAttack(ThreatModel("linf", EPS), steps=4)):
        model = Plain()
        trainer(callbacks=[AdversarialTraining(attack)]).fit(model, loader())
        assert_attacked(model.seen)
