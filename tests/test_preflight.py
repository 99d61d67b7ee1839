"""Preflight: everything unsuitable in one list, with real trainers; and weight decay read off optimisers."""

from __future__ import annotations

import functools
import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchattacks
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.adversarial.training import AdversarialTraining
from lightning_muter.errors import UnsuitableError
from lightning_muter.model.head import find_head
from lightning_muter.model.weight_decay import read_weight_decay
from lightning_muter.preflight.checks import inspect_fit, inspect_objective, inspect_trainer
from lightning_muter.preflight.data import inspect_loaders
from lightning_muter.preflight.findings import Finding, enforce, skip_reason
from lightning_muter.preflight.model import inspect_size, predict_bytes
from lightning_muter.preflight.optimizers import inspect_optimizers

PGD = functools.partial(torchattacks.PGD, eps=0.1, steps=2)


def table(n: int = 12) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 5, generator=g), torch.arange(n) % 3)


class Net(L.LightningModule):
    def __init__(self, **optimiser: Any) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.optimiser = {"lr": 0.1, "weight_decay": 1e-3, **optimiser}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), **self.optimiser)


class Criterion(Net):
    """A step that hands the logits to any loss."""

    def __init__(self, criterion: Any) -> None:
        super().__init__()
        self.criterion = criterion

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1]).mean()


class Deep(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Hardswish(), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Look(L.Callback):
    """Stands where MUterCallback stands: looks at fit start."""

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.findings = inspect_fit(trainer, pl_module, callback=self, **self.kwargs)


def look(
    module: L.LightningModule | None = None,
    loader: Any = None,
    *,
    callbacks: Any = None,
    trainer: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[Finding]:
    found = Look(**kwargs)
    settings = {"accelerator": "cpu", "logger": False, "max_epochs": 1, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, **(trainer or {})}
    first = [AdversarialTraining(PGD)] if callbacks is None else callbacks
    L.Trainer(callbacks=[*first, found], **settings).fit(
        module or Net(), DataLoader(table(), batch_size=4) if loader is None else loader
    )
    return found.findings


def serious(findings: list[Finding]) -> list[str]:
    return [f"{f.level}: {f}" for f in findings if f.level != "note"]


def assert_only(findings: list[Finding], level: str, words: str) -> None:
    """Exactly one serious finding, of this level, that says this."""
    got = serious(findings)
    assert len(got) == 1, got
    assert got[0].startswith(level + ":")
    assert words in got[0]


pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


# -- findings as such -----------------------------------------------------------------------------------------------


def test_errors_are_raised_together_and_warnings_given_together() -> None:
    findings = [
        Finding("error", "First.", "Do one."),
        Finding("warning", "Second.", "Do two."),
        Finding("error", "Third."),
        Finding("note", "Fourth."),
    ]
    with pytest.raises(UnsuitableError) as caught:
        enforce(findings)
    assert "- blocks: First. Do one.\n- blocks: Third." in str(caught.value)
    assert "Second" not in str(caught.value)
    findings = [Finding("skip", "A.", "Pass b."), Finding("warning", "C."), Finding("note", "D.")]
    with pytest.warns(UserWarning, match=r"(?s)- no snapshot: A\. Pass b\.\n- weaker: C\.$"):
        reason = enforce(findings)
    assert reason == skip_reason(findings)
    assert "A. Pass b." in reason
    assert enforce([Finding("note", "quiet")]) is None


def test_a_suitable_fit_has_nothing_serious() -> None:
    findings = look()
    assert serious(findings) == []
    assert any("MiB" in str(f) for f in findings)


def test_everything_is_listed_at_once() -> None:
    module = Criterion(nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])))
    module.optimiser["weight_decay"] = 0.0
    loader = DataLoader(table(10), batch_size=4, drop_last=True)
    text = "\n".join(serious(look(module, loader, callbacks=[])))
    for words in ("divides by the weights", "drop_last leaves out 2 of 10", "Weight decay is 0", "Nothing tells"):
        assert words in text


# -- data -----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(table())


class Augmented(Dataset):
    def __init__(self, source: str) -> None:
        self.data, self.source = table(), source

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        x, y = self.data[i]
        draw = {"torch": lambda: torch.rand(1).item(), "python": random.random, "numpy": np.random.rand}[self.source]
        return (x.flip(0) if draw() < 0.5 else x), y


def test_data_without_an_index_is_an_error() -> None:
    assert_only(look(loader=DataLoader(Stream(), batch_size=4)), "error", "no map-style dataset")
    two = {"a": DataLoader(table(), batch_size=4), "b": DataLoader(table(), batch_size=4)}
    assert_only(inspect_loaders(list(two.values())), "error", "2 training data loaders")
    assert_only(inspect_loaders([[1, 2]]), "error", "a list")
    assert_only(inspect_loaders([]), "error", "no training data loader")
    assert_only(inspect_loaders([DataLoader(Sized())]), "error", "empty")


class Sized(Dataset):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, i: int) -> Any:
        raise IndexError


def test_several_loaders_in_a_real_fit() -> None:
    class Two(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx)

    loaders = {"a": DataLoader(table(), batch_size=4), "b": DataLoader(table(), batch_size=4)}
    findings = look(Two(), loaders, callbacks=[], threat_model=ThreatModel("l2", 0.1))
    assert_only(findings, "error", "2 training data loaders")


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_random_augmentation_is_an_error_and_randomness_is_left_alone(source) -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert_only(inspect_loaders([DataLoader(Augmented(source), batch_size=4)]), "error", "random augmentation")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


def test_collate_that_mixes_samples_is_an_error() -> None:
    def mixup(samples: list[Any]) -> Any:
        x, y = torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples])
        return (x + x.flip(0)) / 2, y

    assert_only(inspect_loaders([DataLoader(table(), collate_fn=mixup)]), "error", "mixes samples")


def test_bad_samples_are_errors() -> None:
    x, y = table().tensors
    x = x.clone()
    x[0, 0] = torch.nan
    assert_only(inspect_loaders([DataLoader(TensorDataset(x, y))]), "error", "NaN or infinite numbers")
    ragged = [(torch.zeros(3), 0), (torch.zeros(4), 1)]
    assert_only(inspect_loaders([DataLoader(ragged)]), "error", "Reading and collating")


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (lambda: DataLoader(table(), 4, sampler=WeightedRandomSampler(torch.ones(12), 12)), "WeightedRandomSampler"),
        (lambda: DataLoader(table(), 4, sampler=torch.utils.data.RandomSampler(table(), True)), "with replacement"),
        (lambda: DataLoader(table(13), 4, drop_last=True), "drop_last leaves out 1 of 13"),
        (lambda: DataLoader(table(), batch_sampler=Odd([[0, 1], [1, 2]])), "Odd decides"),
        (
            lambda: DataLoader(table(), 4, sampler=torch.utils.data.DistributedSampler(table(), 5, 0)),
            "12 samples over 5 processes",
        ),
    ],
)
def test_samples_that_do_not_count_once_are_warned_about(loader, words) -> None:
    assert_only(inspect_loaders([loader()]), "warning", words)


class Odd(list):
    pass


def test_shuffling_and_full_batches_are_fine() -> None:
    for loader in (
        DataLoader(table(), 4, shuffle=True),
        DataLoader(table(), 4, drop_last=True),
        DataLoader(table()),
        DataLoader(table(), 4, sampler=torch.utils.data.DistributedSampler(table(), 4, 0)),
    ):
        assert inspect_loaders([loader]) == []


def test_shuffled_fit_is_fine() -> None:
    assert serious(look(loader=DataLoader(table(), 4, shuffle=True))) == []


def test_inputs_outside_the_box_are_an_error() -> None:
    data = TensorDataset(3 * table().tensors[0], table().tensors[1])
    callbacks = [AdversarialTraining(PGD, ThreatModel("linf", 0.1, None))]
    findings = look(loader=DataLoader(data, 4), callbacks=callbacks, threat_model=ThreatModel("linf", 0.1))
    assert any("values in the box" in f for f in serious(findings))
    assert any("Training uses" in f for f in serious(findings))
    assert serious(look(loader=DataLoader(data, 4), callbacks=callbacks)) == []


# -- trainer --------------------------------------------------------------------------------------------------------


def test_limits_on_the_data_are_warned_about() -> None:
    assert_only(look(trainer={"limit_train_batches": 2}), "warning", "limit_train_batches=2")
    assert_only(look(trainer={"overfit_batches": 1}), "warning", "overfit_batches=1")
    assert_only(look(trainer={"fast_dev_run": True}), "skip", "fast_dev_run")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_warned_about(precision) -> None:
    assert_only(look(trainer={"precision": precision}), "warning", f"Precision {precision}")


def test_sharding_strategies_are_refused_and_ddp_is_not(monkeypatch) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert inspect_trainer(trainer) == []
    real = type(trainer.strategy)
    for cls in (strategies.FSDPStrategy, strategies.DeepSpeedStrategy, strategies.ModelParallelStrategy):
        name = cls.__name__  # none of them can be built on this machine
        monkeypatch.setattr(trainer.strategy, "__class__", type(name, (real,), {}))
        assert any(f.level == "error" and name in str(f) for f in inspect_trainer(trainer))
    spawn = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, enable_checkpointing=False)
    assert_only(inspect_trainer(spawn), "warning", "Spawned processes")
    ddp = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    assert inspect_trainer(ddp) == []


def test_averaged_weights_must_come_first() -> None:
    look_at, averaging = Look(), StochasticWeightAveraging(swa_lrs=0.01)
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    before = L.Trainer(callbacks=[averaging, look_at], **settings)
    after = L.Trainer(callbacks=[look_at, averaging], **settings)
    assert serious(inspect_trainer(before, look_at)) == []
    assert "averaged weights are polished" in str(inspect_trainer(before, look_at)[0])
    assert_only(inspect_trainer(after, look_at), "error", "after they were snapshot")


def test_batch_transfer_hooks_are_noted() -> None:
    class Hooked(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    found = look(Hooked())
    assert serious(found) == []
    assert any("Hooked.on_after_batch_transfer is run" in f.what for f in found)


# -- adversary and loss ---------------------------------------------------------------------------------------------


def test_threat_model_must_be_known() -> None:
    assert_only(look(callbacks=[]), "error", "Nothing tells the threat model")
    assert serious(look(callbacks=[], threat_model=ThreatModel("l2", 0.0))) == []


def test_fgsm_and_trades_say_what_becomes_of_them() -> None:
    fgsm = [AdversarialTraining(functools.partial(torchattacks.FGSM, eps=0.1))]
    assert_only(look(callbacks=fgsm), "warning", "ThreatModel('linf', eps=0.1)")
    assert_only(look(callbacks=[AdversarialTraining(PGD, trades_beta=2.0)]), "skip", "TRADES")


def objective(module: nn.Module, loss: Any = None) -> Any:
    return inspect_objective(module, DataLoader(table(), 4), loss, None, None, None)


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])), "divides by the weights"),
        (nn.CrossEntropyLoss(reduction="sum"), "sums over the batch"),
    ],
)
def test_criteria_that_are_no_mean_over_samples_are_taken_for_the_whole_data_set(criterion, words) -> None:
    assert_only(objective(Criterion(criterion))[0], "warning", words)


def test_suitable_criteria_and_unsuitable_losses() -> None:
    plain = "torch.nn.functional.cross_entropy"
    for criterion, identity in (
        (nn.CrossEntropyLoss(), plain),
        (nn.CrossEntropyLoss(label_smoothing=0.1), f"{plain}(label_smoothing=0.1)"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), reduction="none"), plain),
    ):
        findings, reading = objective(Criterion(criterion))
        assert findings == []
        assert reading.identity == identity
    one = nn.Linear(5, 1)
    assert_only(objective(one)[0], "error", "set `criterion`")
    assert objective(one, nn.MSELoss())[0] == []
    with torch.no_grad():
        one.weight.fill_(torch.inf)
    assert_only(objective(one, nn.MSELoss())[0], "skip", "NaN or infinite on the first samples")


def test_a_given_loss_that_is_not_the_steps_own_is_refused_with_both() -> None:
    findings, reading = objective(Net(), nn.CrossEntropyLoss(label_smoothing=0.3))
    assert reading is None
    assert_only(findings, "skip", "but training_step minimises torch.nn.functional.cross_entropy")


# -- model ----------------------------------------------------------------------------------------------------------


def test_what_forward_returns_does_not_matter_where_the_step_says_what_the_loss_takes() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            return self.head(x), x

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.nll_loss(self(batch[0])[0].log_softmax(1), batch[1])

    findings, reading = objective(Two())
    assert findings == []
    assert reading.head.name == "head"
    assert reading.identity == "torch.nn.functional.cross_entropy"


def test_layers_with_a_life_of_their_own_and_trained_backbones() -> None:
    findings = look(Deep())
    text = serious(findings)
    assert len(text) == 1
    assert "4 parameters outside the scope (backbone.0.weight" in text[0]
    notes = [str(f) for f in findings if f.level == "note"]
    assert any("BatchNorm (backbone.1)" in n for n in notes)
    assert any("Dropout (backbone.3)" in n for n in notes)
    frozen = Deep()
    frozen.backbone.requires_grad_(False)
    assert not serious(look(frozen))


def test_predicted_size_against_the_cap() -> None:
    head = find_head(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)), torch.rand(2, 8))
    p = 3 * 5
    assert predict_bytes(head, 100, 8) == 8 * p * p + 32 * p
    assert predict_bytes(head, 100, 8, ThreatModel("l2", 1.0)) == 8 * p * p + 32 * p + 100 * 8 * 2
    assert predict_bytes(head, 100, 8, ThreatModel("linf", 1.0)) == 8 * p * p + 32 * p + 100 * 2
    assert predict_bytes(head, 100, 8, ThreatModel("linf", 1.0), linear=True) == 8 * p * p + 32 * p
    assert_only(inspect_size(head, 100, 8, None, cap=1000), "warning", "The head has 15 parameters")
    wide = find_head(nn.Linear(4096, 10), torch.rand(2, 4096))
    assert_only(inspect_size(wide, 100, 8), "warning", "12.5 GiB (cap 2 GiB)")
    assert_only(
        inspect_size(head, 100_000, 8, ThreatModel("l2", 1.0), cap=100_000), "error", "maximisers of 100000 samples"
    )
    assert_only(look(cap=100), "warning", "retained rows")


# -- optimisers and weight decay --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls",
    [optim.SGD, optim.Adam, optim.RMSprop, optim.Adagrad, optim.NAdam, optim.RAdam, optim.Adamax, optim.ASGD],
)
def test_decay_per_parameter_of_coupled_optimisers(cls) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [
        {"params": [net[0].weight, net[1].weight], "weight_decay": 0.02},
        {"params": [net[1].bias], "weight_decay": 0.0},
    ]
    got = read_weight_decay([cls(groups, lr=0.1)], net.named_parameters())
    assert got == {"0.weight": 0.02, "0.bias": 0.0, "1.weight": 0.02, "1.bias": 0.0}


def test_coupled_decay_is_the_gradient_of_the_objective() -> None:
    """The claim behind the table: at a stationary point of F, a step of SGD or RMSprop stays there; AdamW moves."""
    torch.manual_seed(0)
    x, y, lam = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, dtype=torch.float64), 0.1
    best = torch.linalg.solve(x.T @ x / 40 + lam / 2 * torch.eye(3, dtype=torch.float64), x.T @ y / 40)
    for cls, moves in ((optim.SGD, False), (optim.RMSprop, False), (optim.AdamW, True)):
        w = best.clone().requires_grad_()
        step = cls([w], lr=0.1, weight_decay=lam)
        (x @ w - y).square().mean().backward()
        step.step()
        assert (torch.linalg.vector_norm(w - best) > 1e-4).item() is moves


@pytest.mark.parametrize(
    "make", [lambda p: optim.AdamW(p), lambda p: optim.NAdam(p, 0.1, weight_decay=0.1, **decoupled)]
)
def test_decoupled_decay_skips_the_snapshot(make) -> None:
    net = nn.Linear(2, 2)
    optimizer = make(net.parameters())
    with pytest.raises(UnsuitableError, match="decouples weight decay"):
        read_weight_decay([optimizer], net.named_parameters())
    names = ["weight", "bias"]
    assert_only(inspect_optimizers([optimizer], net, names), "skip", "minimises no objective")
    assert inspect_optimizers([optimizer], net, names, weight_decay=0.1) == []


decoupled = {"decoupled_weight_decay": True}


def test_adamw_without_decay_is_merely_undecayed() -> None:
    net = nn.Linear(2, 2)
    optimizer = optim.AdamW(net.parameters(), weight_decay=0.0)
    assert read_weight_decay([optimizer], net.named_parameters()) == {"weight": 0.0, "bias": 0.0}
    assert_only(inspect_optimizers([optimizer], net, ["weight", "bias"]), "skip", "Weight decay is 0")


def test_no_decay_skips_and_undecayed_bias_does_not() -> None:
    findings = look(Net(weight_decay=0.0))
    assert_only(findings, "skip", "Weight decay is 0 (PyTorch's default) for head.weight")
    assert "pass weight_decay=lambda" in skip_reason(findings)
    assert serious(look(Net(weight_decay=0.0), weight_decay=0.01)) == []

    class Split(Net):
        def configure_optimizers(self) -> Any:
            groups = [{"params": [self.head.weight], "weight_decay": 0.1}, {"params": [self.head.bias]}]
            return optim.SGD(groups, lr=0.1)

    findings = look(Split())
    assert serious(findings) == []
    assert any("head.bias is not decayed" in str(f) for f in findings)


def test_unknown_kind_of_decay_is_not_guessed() -> None:
    class Homemade(optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"weight_decay": 0.1})

    net = nn.Linear(2, 2)
    assert_only(inspect_optimizers([Homemade(net.parameters())], net, ["weight"]), "skip", "not known here")


def test_wrong_optimisers_are_errors() -> None:
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert_only(inspect_optimizers([], net, ["weight"]), "error", "no optimiser")
    elsewhere = optim.SGD(other.parameters(), lr=0.1, weight_decay=0.1)
    text = "\n".join(serious(inspect_optimizers([elsewhere], net, ["weight", "bias"])))
    assert "No optimiser trains weight, bias" in text
    climbing = optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1, maximize=True)
    assert_only(inspect_optimizers([climbing], net, ["weight"]), "error", "maximises")


def test_several_optimisers_warn_and_must_agree() -> None:
    net = nn.Linear(2, 2)
    a = optim.SGD([net.weight], lr=0.1, weight_decay=0.1)
    assert_only(
        inspect_optimizers([a, optim.SGD([net.bias], lr=0.1)], net, ["weight", "bias"]), "warning", "2 optimisers"
    )
    b = optim.SGD(net.parameters(), lr=0.1, weight_decay=0.2)
    with pytest.raises(UnsuitableError, match=r"weight has weight decay 0\.1 in one optimiser and 0\.2"):
        read_weight_decay([a, b], net.named_parameters())


def test_lightning_wrapper_is_looked_through() -> None:
    from lightning.pytorch.core.optimizer import LightningOptimizer

    net = nn.Linear(2, 2)
    wrapped = LightningOptimizer(optim.SGD(net.parameters(), lr=0.1, weight_decay=0.3))
    assert read_weight_decay([wrapped], net.named_parameters()) == {"weight": 0.3, "bias": 0.3}
