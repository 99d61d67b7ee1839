"""Models: the contract (logits = head(features), one objective), losses in closed form, and weights from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lightning_muter.errors import ArgumentError, CorruptFileError
from lightning_muter.study import models as m
from lightning_muter.study.data import BreastCancerDataModule, DigitsDataModule
from lightning_muter.study.models.criteria import signs

IMAGE = (3, 16, 16)


def small(kind: str, **options: Any) -> m.Classifier:
    torch.manual_seed(0)
    made: m.Classifier
    if kind == "softmax":
        made = m.SoftmaxRegression(IMAGE, 4, **options)
    elif kind == "cnn":
        made = m.SmallCNN(IMAGE, 4, width=4, hidden=8, **options)
    elif kind == "preact":
        made = m.PreActResNet18(IMAGE, 4, width=4, **options)
    elif kind == "wide":
        made = m.WideResNet(IMAGE, 4, depth=10, widen=1, **options)
    elif kind == "resnet18":
        made = m.PretrainedBackbone(IMAGE, 4, name="resnet18", **options)
    else:
        made = m.LogisticRegression(IMAGE, **options)
    return made


KINDS = ["softmax", "cnn", "preact", "wide", "resnet18", "logistic"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_heads_output_on_normalised_inputs(kind: str) -> None:
    model = small(kind, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4]).eval()
    x = torch.rand(5, *IMAGE)
    by_hand = (x - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    torch.testing.assert_close(model(x), model.head(model.backbone(by_hand)))
    assert model(x).shape == (5, 1 if kind == "logistic" else 4)
    assert [n for n, mod in model.named_modules() if isinstance(mod, nn.Linear)][-1] == "head"


@pytest.mark.parametrize("kind", ["cnn", "preact", "wide", "resnet18"])
def test_backbones_are_piecewise_linear_in_eval_mode(kind: str) -> None:
    """On a short enough segment the logits are affine: the second difference vanishes."""
    model = small(kind).double().eval()
    x, v = torch.rand(2, *IMAGE, dtype=torch.float64), torch.randn(2, *IMAGE, dtype=torch.float64)
    with torch.no_grad():
        second = model(x + 1e-7 * v) - 2 * model(x) + model(x - 1e-7 * v)
    assert second.abs().max() < 1e-12


def test_published_sizes() -> None:
    wide = m.WideResNet((3, 32, 32), 10)
    preact = m.PreActResNet18((3, 32, 32), 10)
    assert wide.head.in_features == 640
    assert preact.head.in_features == 512
    convolutions = [mod for mod in wide.backbone.modules() if isinstance(mod, nn.Conv2d) and mod.kernel_size == (3, 3)]
    assert len(convolutions) == 25  # 28 layers = 25 convolutions + 2 counted projections of the paper + the head
    assert sum(p.numel() for p in wide.parameters()) == 36_479_194
    final_batch_norm = 2 * 512  # in the paper; the common variant of 11 171 146 parameters leaves it out
    assert sum(p.numel() for p in preact.parameters()) == 11_171_146 + final_batch_norm


@pytest.mark.parametrize("kind", ["preact", "cnn"])
def test_a_frozen_backbone_stays_frozen(kind: str) -> None:
    model = small(kind)
    model.freeze_backbone()
    model.train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    optimiser = model.configure_optimizers()
    assert {id(p) for g in optimiser.param_groups for p in g["params"]} == {id(p) for p in model.head.parameters()}
    model.criterion(model(torch.rand(8, *IMAGE)), torch.arange(8) % 4).backward()
    optimiser.step()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.reset_head()
    assert not model.head.weight.any()
    assert not model.head.bias.any()


def test_one_logit_losses_are_the_textbook_ones() -> None:
    z = torch.randn(9, 1, dtype=torch.float64)
    zero_one = torch.arange(9) % 2
    for y in (zero_one, zero_one.double(), 2.0 * zero_one.double() - 1):
        logistic = m.LogisticLoss()(z, y, reduction="none")
        torch.testing.assert_close(
            logistic, F.binary_cross_entropy_with_logits(z[:, 0], zero_one.double(), reduction="none")
        )
        squared = m.SquaredLoss()(z[:, 0], y, reduction="none")
        torch.testing.assert_close(squared, (z[:, 0] - 2.0 * zero_one + 1).square() / 2)
    assert signs(zero_one, z).dtype == torch.float64
    with pytest.raises(ArgumentError, match="one logit per sample"):
        m.LogisticLoss()(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ArgumentError, match="reduction"):
        m.SquaredLoss()(z, zero_one, reduction="avg")


def test_one_logit_losses_have_second_derivatives_both_ways() -> None:
    y = torch.tensor([1.0, 0.0])
    for loss, second in ((m.LogisticLoss(), 0.25), (m.SquaredLoss(), 1.0)):
        f = lambda z, loss=loss: loss(z, y, reduction="sum")  # noqa: E731
        expected = torch.eye(2) * second
        torch.testing.assert_close(torch.func.hessian(f)(torch.zeros(2)), expected)  # forward over reverse
        torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(f))(torch.zeros(2)), expected)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: m.SoftmaxRegression((4,), 1), "num_classes"),
        (lambda: m.LogisticRegression((4,), 3), "one-logit"),
        (lambda: m.SmallCNN((4,), 3), "in_shape"),
        (lambda: m.WideResNet(IMAGE, 4, depth=11), "depth"),
        (lambda: m.SoftmaxRegression((4,), 2, mean=[0.5]), "std"),
        (lambda: m.SoftmaxRegression((4,), 2, mean=[0.5], std=[0.0]), "above 0"),
        (lambda: m.PretrainedBackbone(IMAGE, 4, name="resnet999"), "list_models"),
        (lambda: m.PretrainedBackbone(IMAGE, 4, library="keras"), "timm"),  # type: ignore[arg-type]
        (lambda: m.PretrainedBackbone(IMAGE, 4, name="squeezenet1_0"), r"nn\.Linear"),
    ],
)
def test_impossible_models_are_refused_by_name(build: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        build()


def test_pretrained_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = torchvision.models.resnet18(num_classes=7)
    path = tmp_path / "resnet18.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    model = m.PretrainedBackbone(IMAGE, 4, weights=path, frozen=True).eval()
    x = torch.rand(2, *IMAGE)
    source.fc = nn.Identity()  # type: ignore[assignment]
    torch.testing.assert_close(model.features(x), source.eval()(x))
    assert not any(p.requires_grad for p in model.backbone.parameters())

    state = source.state_dict()
    state.pop("conv1.weight")
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:3]
    torch.save(state, path)
    with pytest.raises(ArgumentError, match=r"(?s)missing conv1\.weight.*layer1\.0\.conv1\.weight has shape"):
        m.PretrainedBackbone(IMAGE, 4, weights=path)
    path.write_bytes(b"garbage")
    with pytest.raises(CorruptFileError, match="Fetch it again"):
        m.PretrainedBackbone(IMAGE, 4, weights=path)
    with pytest.raises(ArgumentError, match="existing file"):
        m.PretrainedBackbone(IMAGE, 4, weights=tmp_path / "none.pth")


class Exploit:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploited"),))


def test_a_weights_file_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Exploit()}, "evil.pth")
    with pytest.raises(CorruptFileError):
        m.PretrainedBackbone(IMAGE, 4, weights="evil.pth")
    assert not Path("exploited").exists()


def fit(model: L.LightningModule, dm: L.LightningDataModule, epochs: int, root: Path) -> dict[str, float]:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    trainer.fit(model, dm)
    return {k: float(v) for k, v in trainer.test(model, dm, verbose=False)[0].items()}


def test_training_learns_digits(tmp_path: Path) -> None:
    dm = DigitsDataModule()
    out = fit(m.SoftmaxRegression(dm.in_shape, dm.num_classes, lr=0.5), dm, 15, tmp_path)
    assert out["test_acc"] > 0.9


@pytest.mark.parametrize("kind", [m.LogisticRegression, m.RidgeClassifier])
def test_one_logit_training_learns_tables_and_reloads(kind: type[m.Classifier], tmp_path: Path) -> None:
    dm = BreastCancerDataModule()
    model = kind(dm.in_shape, 2, weight_decay=1e-2)
    assert fit(model, dm, 5, tmp_path)["test_acc"] > 0.9
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = kind.load_from_checkpoint(tmp_path / "model.ckpt").double().eval()
    x = dm.test_dataset.x.double()
    torch.testing.assert_close(again(x), model.eval()(x))
