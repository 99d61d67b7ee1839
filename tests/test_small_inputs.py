"""Small inputs that once failed, each under its number: it works with the right value, or is refused with a way out.

Numbers 05 (hyperparameters), 12 (odd fits) and 15 (odd numbers) have files of their own as well: test_plain, test_rows, test_scalars.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as other
import torch
import torchattacks
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_muter import (
    AdversarialTraining,
    AdversarialTrainingMixin,
    MUterCallback,
    ThreatModel,
    take_snapshot,
    unlearn,
)
from lightning_muter.errors import ArgumentError, MismatchError, RequestError, SolveError, UnsuitableError
from lightning_muter.study.models import SmallCNN

BALL = ThreatModel("l2", 0.05, None)
X = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0.5).long()
ROWS = TensorDataset(X, Y)
unsettled = pytest.mark.filterwarnings(
    "ignore:The head is not stationary",
    "ignore:The weights are not stationary",
    "ignore:The inner maximiser converged for",
    "ignore:Head scope",
    "ignore:Unlearning, before the fit",
)


class Net(L.LightningModule):
    """A network whose step is ``of(net, batch)``."""

    def __init__(self, net: nn.Module, of: Callable[[Any, Any], Tensor], lr: float = 0.2, decay: float = 1e-2) -> None:
        super().__init__()
        self.net, self.of, self.lr, self.decay = net, of, lr, decay

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.of(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.decay)


def plain(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def linear(k: int = 2, d: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(d, k))


def fit(net: L.LightningModule, loader: Any, *callbacks: L.Callback, trainer: Any = L.Trainer, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False} | options
    run = trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks],
        **settings,
    )  # fmt: skip
    run.fit(net, loader)
    return run


def muter(**options: Any) -> MUterCallback:
    return MUterCallback(**({"threat_model": BALL, "verbose": False, "budget": None} | options))


TARGETS = torch.randn(60, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 3 + X[:, :3]
SEVERAL: dict[str, tuple[nn.Module, Tensor]] = {
    "MSE": (nn.MSELoss(), TARGETS),
    "Huber": (nn.HuberLoss(), TARGETS),
    "BCE": (nn.BCEWithLogitsLoss(), (TARGETS > 0.5).double()),
    "multi-label soft margin": (nn.MultiLabelSoftMarginLoss(), (TARGETS > 0.5).double()),
    "soft labels": (nn.CrossEntropyLoss(), TARGETS.softmax(1)),
}


@unsettled
@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("name", SEVERAL)
def test_01_28_several_outputs_have_torchs_denominator(name: str, scope: str) -> None:
    criterion, targets = SEVERAL[name]
    torch.manual_seed(1)
    net = Net(nn.Linear(4, 3).double(), lambda m, b: criterion(m(b[0]), b[1]), decay=0.1)
    callback = muter(scope=scope, threat_model=ThreatModel("l2", 0.0, None), polish="auto" if scope == "head" else 3)
    fit(net, DataLoader(TensorDataset(X.double(), targets), 60), callback)
    loss = criterion(net(X.double()), targets) + 0.05 * sum(p.square().sum() for p in net.parameters())
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]).norm()
    assert callback.snapshot is not None
    assert float(slope) <= 10 * callback.snapshot.stationarity + 1e-9
    assert scope == "all" or float(slope) < 1e-5


def test_03_weights_in_the_batch_are_read() -> None:
    weight = torch.where(Y == 1, 3.0, 1.0)
    net = Net(linear(), lambda m, b: (b[2] * F.cross_entropy(m(b[0]), b[1], reduction="none")).mean())
    callback = muter()
    fit(net, DataLoader(TensorDataset(X, Y, weight), 60), callback)
    assert callback.snapshot is not None
    assert torch.equal(callback.snapshot.sample_weight, weight.double())


LABELS = {
    "int32": Y.int(),
    "uint8": Y.byte(),
    "float32": Y.float(),
    "float64": Y.double(),
    "(n, 1)": Y[:, None],
    "one-hot": F.one_hot(Y, 2),
    "soft": F.one_hot(Y, 2).double() * 0.9 + 0.05,
}


@unsettled
@pytest.mark.parametrize("name", LABELS)
def test_04_labels_that_the_step_casts(name: str) -> None:
    def cast(m: Any, batch: Any) -> Tensor:
        t = batch[1].float() if batch[1].dim() == 2 and batch[1].shape[1] == 2 else batch[1].reshape(-1).long()
        return F.cross_entropy(m(batch[0]), t)

    net, callback = Net(linear(), cast), muter(threat_model=None)
    attack = AdversarialTraining(functools.partial(torchattacks.PGD, eps=0.03, steps=2))
    fit(net, DataLoader(TensorDataset(X.reshape(60, 1, 2, 2), LABELS[name]), 20), attack, callback)
    assert callback.unlearn(net, [1, 2]).forgotten == [1, 2]


def test_06_reloaded_loaders_of_other_rows_are_refused() -> None:
    class Reloaded(L.LightningDataModule):
        epoch = -1

        def train_dataloader(self) -> Any:
            self.epoch += 1
            return DataLoader(Subset(ROWS, range(20 * self.epoch, 20 * self.epoch + 20)), 10)

    net, callback = Net(linear(), plain), muter()
    with (
        pytest.warns(UserWarning, match="made anew every 1 epochs"),  # before the first epoch
        pytest.warns(UserWarning, match="No snapshot was taken.*not in the last training loader"),
    ):
        fit(net, Reloaded(), callback, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(UnsuitableError, match="take_snapshot"):
        callback.unlearn(net, [0])


PAIRS: dict[str, tuple[Any, Any, int]] = {
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), nn.CrossEntropyLoss(), 2),
    "class weights": (nn.CrossEntropyLoss(torch.tensor([1.0, 9.0]), reduction="none"), nn.CrossEntropyLoss(), 2),
    "pos_weight": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(9.0)), nn.BCEWithLogitsLoss(), 1),
    "delta": (nn.HuberLoss(delta=0.1), nn.HuberLoss(delta=5.0), 1),
}


def _weighing(weight: float) -> Any:
    return lambda z, y, reduction="mean": F.cross_entropy(z, y, torch.tensor([1.0, weight]), reduction=reduction)


PAIRS |= {"a function's own constant": (_weighing(3.0), _weighing(5.0), 2)}


@pytest.mark.parametrize("name", PAIRS)
def test_07_another_loss_than_the_snapshots_is_refused(name: str) -> None:
    one, two, k = PAIRS[name]
    data, net = TensorDataset(X, Y if k > 1 else Y.float()), linear(k)
    snapshot = take_snapshot(net, data, threat_model=BALL, loss=one, weight_decay=0.01, progress=False)
    before = net[1].weight.clone()
    with pytest.raises(MismatchError, match="loss"):
        unlearn(net, snapshot, [1], data, loss=two, progress=False)
    assert torch.equal(net[1].weight, before)


class Keyed(Dataset[Any]):
    def __init__(self, x: str, y: str, **more: Any) -> None:
        self.x, self.y, self.more = x, y, more

    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> Any:
        return {self.x: X[i], self.y: int(Y[i]), **self.more}


class Batched(Keyed):
    def __getitems__(self, positions: list[int]) -> list[Any]:
        return [self[i] for i in positions]


@pytest.mark.parametrize(
    "data",
    [
        Keyed("pixel_values", "labels"),
        Keyed("img", "fine_label", coarse_label=0),
        Keyed("x", "y", label="a name", input="file.png"),
        Batched("image", "label"),
    ],
    ids=["processor", "two labels", "words", "batched"],
)
def test_08_any_keys(data: Keyed) -> None:
    net, callback = Net(linear(), lambda m, b: F.cross_entropy(m(b[data.x]), b[data.y])), muter()
    fit(net, DataLoader(data, 20), callback)
    assert callback.unlearn(net, [3]).forgotten == [3]


def test_09_other_weights_than_the_snapshots_are_refused_with_the_way_out(tmp_path: Path) -> None:
    class Saved(Net):
        def __init__(self) -> None:
            super().__init__(linear(), plain)

    net, callback = Saved(), muter()
    trainer = fit(net, DataLoader(ROWS, 20), callback, enable_checkpointing=True, default_root_dir=tmp_path)
    load = functools.partial(Saved.load_from_checkpoint, weights_only=True)
    earlier = load(trainer.checkpoint_callback.best_model_path)
    with pytest.raises(MismatchError, match=r"\.muter\.ckpt"):
        callback.unlearn(earlier, [0])
    assert callback.unlearn(load(callback.paths["checkpoint"]), [0], dry_run=True).forgotten == [0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory")
        trainer.fit(net, DataLoader(ROWS, 20))  # nothing left to train: the snapshot stays
    assert callback.unlearn(net, [0]).forgotten == [0]


class Half(Sampler[list[int]]):
    def __iter__(self) -> Any:
        return iter([[i, i + 1] for i in range(0, 30, 2)])

    def __len__(self) -> int:
        return 15


@pytest.mark.filterwarnings("ignore:Unlearning, before the fit starts.\n- weaker")
@pytest.mark.parametrize(
    ("loader", "reached"),
    [
        (lambda: DataLoader(ROWS, batch_sampler=Half()), 30),
        (lambda: DataLoader(ROWS, 20, sampler=SubsetRandomSampler(range(40))), 40),
        (lambda: DataLoader(ROWS, 20, sampler=list(range(40))), 40),
        (lambda: DataLoader(ROWS, 20, sampler=WeightedRandomSampler([1.0] * 50 + [0.0] * 10, 60)), 50),
    ],
    ids=["batch sampler", "subset", "list", "weighted"],
)
def test_11_rows_that_are_never_reached_are_not_of_the_snapshot(loader: Any, reached: int) -> None:
    net, callback = Net(linear(), plain), muter()
    fit(net, loader(), callback)
    with pytest.raises(RequestError, match="never trained on"):
        callback.unlearn(net, [reached])
    assert callback.unlearn(net, [reached - 1]).forgotten == [reached - 1]


@pytest.mark.filterwarnings("ignore:Unlearning, before the fit starts.\n- weaker")
def test_12_a_run_of_one_batch_costs_nothing_and_overfitting_is_of_its_rows() -> None:
    net, callback = Net(linear(), plain), muter()
    with pytest.warns(UserWarning, match="fast_dev_run is a trial"):
        fit(net, DataLoader(ROWS, 20), callback, fast_dev_run=True)
    assert callback.snapshot is None
    net, callback = Net(linear(), plain), muter()
    fit(net, DataLoader(ROWS, 10), callback, overfit_batches=2)
    with pytest.raises(RequestError, match="never trained on"):
        callback.unlearn(net, [20])


def test_15_an_attack_that_fails_is_named() -> None:
    net = Net(linear(), plain)
    attack = AdversarialTraining(functools.partial(torchattacks.AutoAttack, eps=0.03, n_classes=2))
    with pytest.raises(
        UnsuitableError, match=r"AutoAttack cannot attack this batch.*nine other classes.*threat_model="
    ):
        fit(net, DataLoader(TensorDataset(X.reshape(60, 1, 2, 2), Y), 20), attack)


@pytest.mark.parametrize("eps", [-0.03, float("nan")])
def test_15_an_eps_that_is_none_is_refused(eps: float) -> None:
    with pytest.raises(ArgumentError, match="eps: got"):
        fit(
            Net(linear(), plain),
            DataLoader(ROWS, 20),
            AdversarialTraining(functools.partial(torchattacks.PGD, eps=eps)),
        )


@unsettled
@pytest.mark.parametrize("extra", ["group", "index"])
def test_16_the_step_says_which_column_is_the_label(extra: str) -> None:
    column = {"group": torch.arange(60) % 2, "index": torch.arange(60)}[extra]
    net, callback = (
        Net(linear(), lambda m, b: F.cross_entropy(m(b[0]), b[2]), lr=0.5, decay=1e-3),
        muter(threat_model=None),
    )
    attack = AdversarialTraining(ThreatModel("linf", 0.02))
    fit(net, DataLoader(TensorDataset(X, column, Y), 20), attack, callback)
    assert float((net(X).argmax(1) == Y).float().mean()) > 0.9


@unsettled
@pytest.mark.parametrize("act", [nn.Tanh, nn.GELU, nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_22_smooth_networks_of_many_inputs_in_float32(act: type[nn.Module], norm: Any) -> None:
    torch.manual_seed(0)
    x = torch.rand(20, 64)
    data, net = TensorDataset(x, x[:, :3].argmax(1)), nn.Sequential(nn.Linear(64, 6), act(), nn.Linear(6, 3))
    threat = ThreatModel(norm, 0.05 if norm == "l2" else 0.01)
    snapshot = take_snapshot(net, data, threat_model=threat, weight_decay=1e-2, polish=5, progress=False)
    assert unlearn(net, snapshot, [1], data, progress=False).solver["status"] == "converged"


@unsettled
def test_33_the_cnn_of_the_study_in_float32() -> None:
    torch.manual_seed(0)
    x = torch.rand(20, 1, 8, 8)
    data, net = TensorDataset(x, torch.arange(20) % 10), SmallCNN((1, 8, 8), 10).float()
    snapshot = take_snapshot(net, data, threat_model=ThreatModel("linf", 0.03), polish=2, progress=False)
    assert unlearn(net, snapshot, [1], data, progress=False).solver["status"] in ("converged", "flat")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mean(1))


@unsettled
@pytest.mark.parametrize("scope", ["head", "all"])
def test_24_attention(scope: str) -> None:
    torch.manual_seed(0)
    net, callback = Net(Attention(), plain), muter(scope=scope, threat_model=None, polish=2)
    data = TensorDataset(torch.rand(20, 3, 4), torch.arange(20) % 2)
    fit(net, DataLoader(data, 20), AdversarialTraining(ThreatModel("l2", 0.02, None)), callback, max_epochs=1)
    assert callback.unlearn(net, [1]).forgotten == [1]


@unsettled
@pytest.mark.filterwarnings("ignore:The robust optimum is a constant")
@pytest.mark.parametrize("eps", [0.6, 5.0])
def test_25_a_ball_that_swamps_the_classes_never_makes_it_worse(eps: float) -> None:
    x, y = load_breast_cancer(return_X_y=True)
    inputs, labels = torch.tensor((x - x.mean(0)) / x.std(0))[:120, :6], torch.tensor(y)[:120]
    data, kept = TensorDataset(inputs, labels), torch.arange(120) > 3
    net = linear(2, 6).double()

    def robust() -> float:
        w, b = net[1].weight.detach(), net[1].bias.detach()
        margin = inputs[kept] @ (w[1] - w[0]) + b[1] - b[0]
        worst = torch.where(labels[kept] == 1, margin, -margin) - eps * (w[1] - w[0]).norm()
        return float(F.softplus(-worst).sum() + int(kept.sum()) / 2 * 1e-2 * (w.square().sum() + b.square().sum()))

    first = robust()
    threat = ThreatModel("l2", eps, None)
    snapshot = take_snapshot(net, data, threat_model=threat, weight_decay=1e-2, progress=False)
    polished = robust()
    assert polished <= first
    if eps < 1:
        unlearn(net, snapshot, [0, 1, 2, 3], data, retain=data, progress=False)
        assert robust() <= polished
    else:
        with pytest.raises(SolveError, match="raises the robust objective"):
            unlearn(net, snapshot, [0, 1, 2, 3], data, retain=data, progress=False)
        assert robust() == polished


@unsettled
def test_28_inputs_without_a_gradient_stay_finite() -> None:
    dead = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        dead[1].bias.fill_(-100)

    def step(m: Any, batch: Any) -> Tensor:
        assert bool(torch.isfinite(batch[0]).all())
        return plain(m, batch)

    net, callback = Net(dead, step), muter(threat_model=None)
    attack = AdversarialTraining(functools.partial(torchattacks.PGDL2, eps=0.3, steps=2))
    fit(net, DataLoader(TensorDataset(X.reshape(60, 1, 2, 2), Y), 20), attack, callback, max_epochs=1)
    assert callback.unlearn(net, [1]).solver["status"] == "converged"


def test_31_the_other_name_of_lightning() -> None:
    class Other(AdversarialTrainingMixin, other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return plain(self, batch)

        def configure_attack(self) -> Any:
            return torchattacks.PGD(self, eps=0.02, steps=2)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-2)

    net, callback = Other(), muter(threat_model=None)
    fit(net, DataLoader(ROWS, 20), callback, trainer=other.Trainer)
    assert callback.unlearn(net, [1]).forgotten == [1]


@unsettled
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_32_low_true_precision(precision: Any) -> None:
    torch.manual_seed(0)
    net = Net(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), plain)
    callback = muter(threat_model=None, polish=3)
    attack = AdversarialTraining(functools.partial(torchattacks.PGD, eps=0.02, steps=2))
    fit(net, DataLoader(ROWS, 20), attack, callback, precision=precision)
    assert callback.unlearn(net, [1]).forgotten == [1]
