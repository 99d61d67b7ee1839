"""Every precision, backbone, norm and door: a cell unlearns with finite numbers, and whatever it cannot do it refuses by name."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muter import AdversarialTraining, MUterCallback, ThreatModel, take_snapshot, unlearn
from lightning_muter.curvature.inner.maximiser import InnerSolver
from lightning_muter.errors import UnsuitableError
from lightning_muter.model.modes import working_dtype

PRECISIONS = {"32-true": torch.float32, "64-true": torch.float64, "bf16-mixed": torch.float32, "16-true": torch.float16}
NORMS, DOORS = ("l2", "linf"), ("callback", "functional")


class Attention(nn.Module):
    """(n, 6) as two tokens of three numbers."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 9) if layer == "fused" else None
        self.encoder = (
            nn.TransformerEncoderLayer(3, 1, 4, batch_first=True, norm_first=True) if layer == "encoder" else None
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 2, 3)
        if self.encoder is not None:
            return self.encoder(x).flatten(1)
        assert self.qkv is not None
        return F.scaled_dot_product_attention(*(t[:, None] for t in self.qkv(x).chunk(3, -1))).flatten(1)


class OnlyOnce(torch.autograd.Function):
    """A function of a user's that gives a first derivative and no other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * ctx.saved_tensors[0].cos()


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnlyOnce.apply(x)


BACKBONES = {
    "linear": lambda: nn.Identity(),
    "ReLU": lambda: nn.Sequential(nn.Linear(6, 3), nn.ReLU()),
    "SiLU": lambda: nn.Sequential(nn.Linear(6, 3), nn.SiLU()),
    "GELU": lambda: nn.Sequential(nn.Linear(6, 3), nn.GELU()),
    "Tanh": lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh()),
    "Softplus": lambda: nn.Sequential(nn.Linear(6, 3), nn.Softplus()),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Tanh()),
    "LayerNorm": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)),
    "attention": lambda: Attention("fused"),
}
OTHERS = {
    "encoder": lambda: Attention("encoder"),
    "Hardsigmoid": lambda: nn.Sequential(nn.Linear(6, 3), nn.Hardsigmoid()),
    "Hardswish": lambda: nn.Sequential(nn.Linear(6, 3), nn.Hardswish()),
    "Sigmoid": lambda: nn.Sequential(nn.Linear(6, 3), nn.Sigmoid()),
    "ELU": lambda: nn.Sequential(nn.Linear(6, 3), nn.ELU()),
    "once": lambda: nn.Sequential(nn.Linear(6, 3), Once()),
}


class Net(pl.LightningModule):
    def __init__(self, backbone: str, scope: str = "head") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = {**BACKBONES, **OTHERS}[backbone]()
        with torch.no_grad():
            width = self.backbone.eval()(torch.zeros(2, 6)).shape[1]
        self.backbone.train().requires_grad_(scope != "head")
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)


@functools.cache
def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(12, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def _cell(precision: str, backbone: str, norm: str, door: str, scope: str = "head") -> Net:
    x, y = _data()
    dtype = PRECISIONS[precision]
    net, data = Net(backbone, scope), TensorDataset(x.to(dtype), y)
    threat = ThreatModel(norm, 0.1 if norm == "l2" else 0.03)
    if door == "callback":
        muter = MUterCallback(scope=scope, polish=3 if scope == "head" else 1, verbose=False)
        trainer = pl.Trainer(
            max_epochs=1,
            precision=precision,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[AdversarialTraining(attack=threat), muter],
        )
        trainer.fit(net, DataLoader(data, 12))
        result = muter.unlearn(net, [1])
    else:
        net.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            snapshot = take_snapshot(
                net,
                data,
                threat_model=threat,
                weight_decay=0.1,
                polish=3,
                inner=InnerSolver(max_iter=20),
                progress=False,
            )
            result = unlearn(net, snapshot, [1], data, progress=False)
    assert result.solver["status"] in ("converged", "flat", "capped")
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    assert all(p.dtype == dtype for p in net.parameters())
    if scope == "head":
        assert 0 < result.step_norm < 10
    return net


def _pairs() -> list[tuple[str, str, str, str]]:
    """Every pair of values of two of the four meets in one cell at least."""
    return [
        (precision, backbone, NORMS[(i + j) % 2], DOORS[(i // 2 + j) % 2])
        for i, precision in enumerate(PRECISIONS)
        for j, backbone in enumerate(BACKBONES)
    ]


QUIET = pytest.mark.filterwarnings(
    "ignore:The head is not stationary",
    "ignore:The weights are not stationary",
    "ignore:The inner maximiser converged for",
    "ignore:Unlearning, before the fit starts.\n- weaker. Precision",
)


@QUIET
@pytest.mark.parametrize("cell", _pairs(), ids="-".join)
def test_a_cell_unlearns(cell: tuple[str, str, str, str]) -> None:
    _cell(*cell)


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize(
    "cell", list(itertools.product(PRECISIONS, {**BACKBONES, **OTHERS}, NORMS, DOORS)), ids="-".join
)
def test_every_cell_unlearns(cell: tuple[str, str, str, str]) -> None:
    _cell(*cell)


@QUIET
@pytest.mark.parametrize(("norm", "backbone"), [(NORMS[i % 2], b) for i, b in enumerate(OTHERS)])
def test_functions_without_rules_of_their_own(backbone: str, norm: str) -> None:
    _cell("32-true", backbone, norm, "functional")


WIDE = ["attention", "encoder", "Hardsigmoid", "LayerNorm"]


@QUIET
@pytest.mark.parametrize(
    ("precision", "backbone", "norm"), [(p, WIDE[i], NORMS[i % 2]) for i, p in enumerate(PRECISIONS)], ids=str
)
def test_a_whole_network_unlearns(precision: str, backbone: str, norm: str) -> None:
    _cell(precision, backbone, norm, "callback", scope="all")


def test_no_second_derivative_is_refused_by_name_beyond_the_head() -> None:
    with pytest.raises(UnsuitableError, match="differentiable once only"):
        _cell("64-true", "once", "l2", "callback", scope="all")


def test_sixteen_bits_are_run_in_thirty_two() -> None:
    assert [working_dtype(t) for t in (torch.float16, torch.bfloat16, torch.float64)] == [
        torch.float32,
        torch.float32,
        torch.float64,
    ]


def test_a_forward_that_insists_on_its_dtype_is_refused_by_name() -> None:
    class Insists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.bfloat16())

    x, y = _data()
    with pytest.raises(UnsuitableError, match=r"in torch.bfloat16 and cannot be run in torch.float32"):
        take_snapshot(Insists().bfloat16(), TensorDataset(x, y), threat_model=ThreatModel("l2", 0.1), weight_decay=0.1)
