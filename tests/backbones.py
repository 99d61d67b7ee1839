"""Small networks with every kind of layer before their head, the losses people write into a step, and Lightning's precisions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

N, D, K = 12, 6, 3
PRECISIONS = {"32-true": torch.float32, "64-true": torch.float64, "bf16-mixed": torch.float32, "16-true": torch.float16}


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


class _OnlyOnce(torch.autograd.Function):
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
        return _OnlyOnce.apply(x)


def _after(*layers: Callable[[], nn.Module], width: int = 3) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(D, width), *(layer() for layer in layers))


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "ReLU": _after(nn.ReLU),
    "SiLU": _after(nn.SiLU),
    "GELU": _after(nn.GELU),
    "Tanh": _after(nn.Tanh),
    "Softplus": _after(nn.Softplus),
    "BatchNorm": _after(lambda: nn.BatchNorm1d(3), nn.Tanh),
    "LayerNorm": _after(lambda: nn.LayerNorm(5), width=5),
    "attention": lambda: Attention("fused"),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: Attention("encoder"),
    "Hardsigmoid": _after(nn.Hardsigmoid),
    "Hardswish": _after(nn.Hardswish),
    "Sigmoid": _after(nn.Sigmoid),
    "ELU": _after(nn.ELU),
    "once": _after(Once),
}


@functools.cache
def rows() -> dict[str, Tensor]:
    """Inputs x (n, d) in [0, 1], classes y, binary t, multi-label m (n, k), targets r (n, k)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(N, D, generator=generator)
    top = x[:, :K]
    return {"x": x, "y": top.argmax(1), "t": (x[:, 0] > 0.5).long(), "m": (top > 0.5).float(), "r": 2 * top - x[:, K:]}


#: Name -> outputs, the column that is the target, the loss of z and target as a step writes it.
LOSSES: dict[str, tuple[int, str, Callable[[Tensor, Tensor], Tensor]]] = {
    "cross-entropy": (K, "y", lambda z, y: F.cross_entropy(z, y)),
    "label smoothing": (K, "y", lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)),
    "class weights": (K, "y", lambda z, y: F.cross_entropy(z, y, z.new_tensor([1.0, 2.0, 0.5]))),
    "BCE one logit": (1, "t", lambda z, t: F.binary_cross_entropy_with_logits(z[:, 0], t.to(z.dtype))),
    "BCE multi-label": (K, "m", lambda z, m: F.binary_cross_entropy_with_logits(z, m.to(z.dtype))),
    "MSE": (K, "r", lambda z, r: F.mse_loss(z, r.to(z.dtype))),
    "Huber": (K, "r", lambda z, r: F.huber_loss(z, r.to(z.dtype))),
    "log_softmax+nll": (K, "y", lambda z, y: F.nll_loss(F.log_softmax(z, 1), y)),
}


class Net(pl.LightningModule):
    """A backbone and a linear head, with a loss of :data:`LOSSES` in the step."""

    def __init__(self, backbone: str, loss: str = "cross-entropy", scope: str = "head") -> None:
        super().__init__()
        torch.manual_seed(0)
        k, self.target, self.of = LOSSES[loss]
        self.backbone = {**BACKBONES, **OTHERS}[backbone]()
        with torch.no_grad():
            width = self.backbone.eval()(torch.zeros(2, D)).shape[1]
        self.backbone.train().requires_grad_(scope != "head")
        self.head = nn.Linear(width, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.of(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)
