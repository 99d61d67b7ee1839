"""Ways in which people write a loss into ``training_step``: accepted ones, and refused ones with words of the refusal."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

D, K = 4, 3
Pair = namedtuple("Pair", ["inputs", "target"])


@dataclasses.dataclass
class Record:
    features: Tensor
    target: Tensor


class Lit(pl.LightningModule):
    """A linear model, or a network of one hidden layer, whose step is the form's."""

    def __init__(
        self, k: int = K, hidden: int = 0, decay: float = 0.1, lr: float = 0.1, act: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, hidden), act()) if hidden else nn.Identity()
        self.body.requires_grad_(False)
        self.head = nn.Linear(hidden or D, k)
        self.decay, self.lr = decay, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=self.lr, weight_decay=self.decay)


def columns(n: int, seed: int, dtype: torch.dtype = torch.float32, k: int = K) -> dict[str, Tensor]:
    """Whatever a form may want of a row: x, class y, binary t, targets r (k), multi-label m (k), soft s (k), weights w."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = rand(n, D)
    y = torch.randint(0, k, (n,), generator=generator)
    y[: min(n, k)] = torch.arange(min(n, k))
    r = x[:, :1] - x[:, 1:2] * torch.arange(1, k + 1) + 0.1 * rand(n, k)
    t = (r[:, 0] > r[:, 0].median()).long()
    return {
        "x": x,
        "y": y,
        "t": t,
        "r": r,
        "m": (rand(n, k) > 0.5).to(dtype),
        "s": rand(n, k).softmax(1),
        "w": rand(n) + 0.5,
    }


class Rows(Dataset[Any]):
    """Rows in the structure that a form takes (its ``pack``)."""

    def __init__(
        self, pack: Callable[[dict[str, Tensor]], Any], n: int, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.columns, self.pack, self.n = columns(n, seed, dtype), pack, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return self.pack({name: column[i] for name, column in self.columns.items()})


def xy(c: dict[str, Tensor]) -> Any:
    return c["x"], c["y"]


def with_(*names: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda c: tuple(c[n] for n in names)


@dataclass(frozen=True)
class Form:
    """``step(module, batch)`` is the loss; ``made(module)`` gives the module what it needs; ``methods`` override its own."""

    step: Callable[..., Any]
    pack: Callable[[dict[str, Tensor]], Any] = xy
    k: int = K
    made: Callable[[Any], None] | None = None
    methods: dict[str, Any] = field(default_factory=dict)
    convex: bool = True
    refused: str | None = None
    denominator: str = "rows"
    collate: Any = None

    def module(self, hidden: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
        step = self.step

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            return step(self, batch)

        torch.manual_seed(0)
        kind: Any = type("Lit", (Lit,), {"training_step": training_step, **self.methods})
        module = kind(self.k, hidden, **kwargs)
        if self.made is not None:
            self.made(module)
        return module.to(dtype)

    def batch(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        rows = self.rows(n, seed, dtype)
        return (self.collate or torch.utils.data.default_collate)([rows[i] for i in range(n)])

    def rows(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Rows:
        return Rows(self.pack, n, seed, dtype)


def _set(**kwargs: Any) -> Callable[[Any], None]:
    def made(module: Any) -> None:
        for name, value in kwargs.items():
            setattr(
                module,
                name,
                value() if isinstance(value, type) or (callable(value) and not isinstance(value, nn.Module)) else value,
            )

    return made


def _ce(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def _logged(module: Any, batch: Any) -> Tensor:
    x, y = batch
    z = module(x)
    loss = F.cross_entropy(z, y)
    module.metric(z.softmax(1), y)
    module.metric.update(z.softmax(1), y)
    scores = module.scores(z, y)
    module.seen += len(x)
    module.history.append(float(loss.detach()))
    module.nested["a"].append(1)
    module.log("loss", loss, prog_bar=True)
    module.log("acc", module.metric, on_epoch=True)
    module.log_dict(scores)
    return loss


def _trained(module: Any, batch: Any) -> Any:
    loss = _ce(module, batch)
    module.log("lr", 0.1 * (1 + module.current_epoch))
    if module._trainer is not None and module.logger is not None:
        module.logger.experiment.add_scalar("a", loss.detach(), module.global_step)
        _ = module.trainer.max_epochs, module.trainer.is_global_zero
    return {"loss": loss, "progress": module.current_epoch, "z": loss.detach()}


def _counted(module: Any, batch: Any) -> Tensor:
    x, y = batch
    z = module(x)
    module.steps += 1
    module.average.mul_(0.9).add_(0.1 * z.detach().mean())
    module.last = z.detach()
    module.log("average", module.average)
    return F.cross_entropy(z, y)


def _smoothed_by_hand(module: Any, batch: Any) -> Tensor:
    x, y = batch
    log_p = F.log_softmax(module(x), dim=1)
    nll = -log_p.gather(1, y[:, None])[:, 0]
    return (0.9 * nll - 0.1 * log_p.mean(1)).mean()


def _focal(module: Any, batch: Any) -> Tensor:
    ce = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
    return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


def _masked(module: Any, batch: Any) -> Tensor:
    x, y, w = batch
    keep = (w > 0.8).float()
    return (F.cross_entropy(module(x), y, reduction="none") * keep).sum() / keep.sum().clamp(min=1)


def _branching(module: Any, batch: Any) -> Tensor:
    x, y = batch
    z = module(x)
    loss = F.cross_entropy(z, y)
    if loss > 100:
        raise RuntimeError("diverged")
    hits = (z.argmax(1).cpu().numpy() == y.numpy()).mean()
    module.log("acc", float(hits))
    return loss


def _counted_by_item(module: Any, batch: Any) -> Tensor:
    x, y, w = batch
    keep = w > 0.8
    return (F.cross_entropy(module(x), y, reduction="none") * keep).sum() / keep.sum().item()


class Meter:
    def __init__(self) -> None:
        self.total, self.seen, self.by_class = 0.0, [], {"a": np.zeros(2), "b": torch.zeros(2)}

    def update(self, value: float) -> None:
        self.total += value
        self.seen.append(value)
        self.by_class["a"] += 1
        self.by_class["b"] += 1


def _meters(module: Any) -> None:
    module.meter = Meter()
    module.meters = [Meter(), {"deep": Meter()}]


def _metered(module: Any, batch: Any) -> Tensor:
    loss = _ce(module, batch)
    for meter in (module.meter, module.meters[0], module.meters[1]["deep"]):
        meter.update(float(loss.detach()))
    return loss


def _scored(module: Any, batch: Any) -> Tensor:
    from sklearn.metrics import f1_score

    x, y = batch
    z = module(x)
    module.log("f1", f1_score(y.cpu().numpy(), z.argmax(1).tolist(), average="macro"))
    return _smoothed_by_hand(lambda _: z, batch)


def _class_weights(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], weight=module.class_weights)


def _class_weights_by_row(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], weight=module.class_weights, reduction="none").mean()


def _buffer(module: Any) -> None:
    module.register_buffer("class_weights", torch.tensor([1.0, 2.0, 4.0]))


def _two_objects(module: Any) -> None:
    module.metric = torchmetrics.Accuracy(task="multiclass", num_classes=K)
    module.scores = torchmetrics.MetricCollection({"f1": torchmetrics.F1Score(task="multiclass", num_classes=K)})
    module.seen, module.history, module.nested = 0, [], {"a": []}


def _counters(module: Any) -> None:
    module.steps = 0
    module.register_buffer("average", torch.zeros(()))


class Wrapped(nn.Module):
    """A loss module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(z, y)


def _transfer(self: Any, batch: Any, dataloader_idx: int) -> Any:
    x, y = batch
    return 2 * x - 1, y


def _bce(module: Any, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(module(batch[0]).squeeze(-1), batch[1].to(batch[0]))


def _attribute(module: Any, batch: Any) -> Tensor:
    return module.loss_fn(module(batch[0]), batch[1])


def _forward_tuple(self: Any, x: Tensor) -> Any:
    phi = self.body(x)
    return self.head(phi), phi


def _forward_dict(self: Any, x: Tensor) -> Any:
    return {"logits": self.head(self.body(x))}


def _forward_log_softmax(self: Any, x: Tensor) -> Tensor:
    return F.log_softmax(self.head(self.body(x)), dim=-1)


def _forward_sigmoid(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.head(self.body(x)))


def _normalised(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(module((x - module.mean) / module.std), y)


def _moments(module: Any) -> None:
    module.register_buffer("mean", torch.full((D,), 0.4))
    module.register_buffer("std", torch.full((D,), 0.3))


def _named_batch_alone(self: Any, batch: Any) -> Tensor:
    return _ce(self, batch)


def _named_otherwise(self: Any, train_batch: Any, i: int) -> Tensor:
    return _ce(self, train_batch)


def _keywords(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
    return _ce(self, batch)


def _shared(self: Any, batch: Any, stage: str) -> Tensor:
    loss = _ce(self, batch)
    self.log(f"{stage}/loss", loss)
    return loss


def _multi_margin(module: Any, batch: Any) -> Tensor:
    return F.multi_margin_loss(module(batch[0]), batch[1])


def of_step(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The user's loss and its gradient in the head, by his own step in eval mode."""
    twin = copy.deepcopy(module).eval()
    twin.log = twin.log_dict = lambda *args, **kwargs: None
    out = twin.training_step(copy.deepcopy(batch), *([0] if twin.training_step.__code__.co_argcount > 2 else []))
    loss = (out["loss"] if isinstance(out, dict) else out).reshape(())
    slopes = torch.autograd.grad(loss, list(twin.head.parameters()))
    return loss.detach(), torch.cat([s.flatten() for s in slopes]).double()


ACCEPTED: dict[str, Form] = {
    "cross-entropy": Form(_ce),
    "own loss module": Form(_attribute, made=_set(loss_fn=Wrapped)),
    "self.loss_fn": Form(_attribute, made=_set(loss_fn=nn.CrossEntropyLoss)),
    "smoothing argument": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1)),
    "smoothing attribute": Form(
        _attribute, made=lambda m: setattr(m, "loss_fn", nn.CrossEntropyLoss(label_smoothing=0.2))
    ),
    "smoothing by hand": Form(_smoothed_by_hand),
    "class weights, their mean": Form(_class_weights, made=_buffer, denominator="weights"),
    "class weights, mean of rows": Form(_class_weights_by_row, made=_buffer),
    "class weights from a list": Form(
        lambda m, b: F.cross_entropy(
            m(b[0]), b[1], weight=torch.tensor([1.0, 2.0, 5.0], dtype=b[0].dtype), reduction="none"
        ).mean()
    ),
    "pos_weight": Form(
        lambda m, b: F.binary_cross_entropy_with_logits(
            m(b[0])[:, 0], b[1].to(b[0]), pos_weight=torch.tensor(3.0).to(b[0])
        ),
        with_("x", "t"),
        k=1,
    ),
    "weights last": Form(
        lambda m, b: (b[2] * F.cross_entropy(m(b[0]), b[1], reduction="none")).mean(), with_("x", "y", "w")
    ),
    "weights in the middle": Form(
        lambda m, b: (b[1] * F.cross_entropy(m(b[0]), b[2], reduction="none")).mean(), with_("x", "w", "y")
    ),
    "weights first": Form(
        lambda m, b: (b[0] * F.cross_entropy(m(b[1]), b[2], reduction="none")).mean(), with_("w", "x", "y")
    ),
    "weights by key, normalised": Form(
        lambda m, b: (
            (b["importance"] * F.cross_entropy(m(b["img"]), b["cls"], reduction="none")).sum() / b["importance"].sum()
        ),
        lambda c: {"importance": c["w"], "cls": c["y"], "img": c["x"]},
        denominator="weights",
    ),
    "ignore_index": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1], ignore_index=2), denominator="weights"),
    "ignored -100": Form(
        lambda m, b: F.cross_entropy(m(b[0]), torch.where(b[2] > 0.8, b[1], -100)),
        with_("x", "y", "w"),
        denominator="weights",
    ),
    "masked mean": Form(_masked, with_("x", "y", "w"), denominator="weights"),
    "masked rows": Form(
        lambda m, b: F.cross_entropy(m(b[0])[b[2] > 0.8], b[1][b[2] > 0.8]), with_("x", "y", "w"), denominator="weights"
    ),
    "sum": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), denominator="sum"),
    "log_softmax + nll": Form(lambda m, b: F.nll_loss(F.log_softmax(m(b[0]), 1), b[1])),
    "log_softmax in forward": Form(lambda m, b: F.nll_loss(m(b[0]), b[1]), methods={"forward": _forward_log_softmax}),
    "sigmoid + BCELoss": Form(
        lambda m, b: nn.BCELoss()(torch.sigmoid(m(b[0])).flatten(), b[1].to(b[0])), with_("x", "t"), k=1
    ),
    "sigmoid in forward": Form(
        lambda m, b: F.binary_cross_entropy(m(b[0])[:, 0], b[1].to(b[0])),
        with_("x", "t"),
        k=1,
        methods={"forward": _forward_sigmoid},
    ),
    "temperature": Form(lambda m, b: F.cross_entropy(m(b[0]) / 0.5, b[1])),
    "ReLU on the logits": Form(lambda m, b: F.cross_entropy(F.relu(m(b[0])), b[1]), convex=False),
    "L2 of the head's weight": Form(lambda m, b: _ce(m, b) + 0.05 * m.head.weight.pow(2).sum()),
    "half the square of every parameter's norm": Form(
        lambda m, b: _ce(m, b) + 0.5 * 0.02 * sum(p.norm() ** 2 for p in m.parameters())
    ),
    "L2 of weight and bias by two numbers, MSE": Form(
        lambda m, b: (
            F.mse_loss(m(b[0]), b[1]) + 0.01 * (m.head.weight * m.head.weight).sum() + 0.03 * (m.head.bias**2).sum()
        ),
        with_("x", "r"),
    ),
    "penalty on the logits": Form(lambda m, b: _penalty(m, b)),
    "focal": Form(_focal, convex=False),
    "MSE, several": Form(lambda m, b: F.mse_loss(m(b[0]), b[1]), with_("x", "r")),
    "MSE, one": Form(lambda m, b: F.mse_loss(m(b[0])[:, 0], b[1][:, 0]), with_("x", "r"), k=1),
    "MSE, one, labels (n, 1)": Form(lambda m, b: F.mse_loss(m(b[0]), b[1]), lambda c: (c["x"], c["r"][:1]), k=1),
    "MSE on one-hot": Form(lambda m, b: F.mse_loss(m(b[0]).softmax(1), F.one_hot(b[1], K).to(b[0])), convex=False),
    "MSE on one-hot of logits": Form(lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1], K).to(b[0]))),
    "Huber": Form(lambda m, b: F.huber_loss(m(b[0]), b[1], delta=0.3), with_("x", "r")),
    "Huber, one": Form(lambda m, b: nn.HuberLoss()(m(b[0]).squeeze(1), b[1][:, 0]), with_("x", "r"), k=1),
    "SmoothL1": Form(lambda m, b: F.smooth_l1_loss(m(b[0]), b[1], beta=0.5), with_("x", "r")),
    "L1": Form(lambda m, b: F.l1_loss(m(b[0]), b[1]), with_("x", "r")),
    "log-cosh": Form(lambda m, b: torch.log(torch.cosh(m(b[0]) - b[1])).mean(), with_("x", "r")),
    "Poisson": Form(lambda m, b: F.poisson_nll_loss(m(b[0])[:, 0], b[1][:, 0].abs()), with_("x", "r"), k=1),
    "BCE, one": Form(_bce, with_("x", "t"), k=1),
    "BCE, multi-label": Form(lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]), with_("x", "m")),
    "BCE, summed over labels": Form(
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1], reduction="none").sum(1).mean(), with_("x", "m")
    ),
    "multi-label soft margin": Form(lambda m, b: F.multilabel_soft_margin_loss(m(b[0]), b[1]), with_("x", "m")),
    "multi-margin": Form(_multi_margin),
    "soft margin": Form(lambda m, b: F.soft_margin_loss(m(b[0])[:, 0], 2.0 * b[1] - 1), with_("x", "t"), k=1),
    "hinge squared": Form(
        lambda m, b: F.relu(1 - (2 * b[1] - 1) * m(b[0])[:, 0]).square().mean(), with_("x", "t"), k=1
    ),
    "KL to soft labels": Form(
        lambda m, b: F.kl_div(F.log_softmax(m(b[0]), 1), b[1], reduction="batchmean"), with_("x", "s")
    ),
    "soft labels": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1]), with_("x", "s")),
    "one-hot labels": Form(
        lambda m, b: F.cross_entropy(m(b[0]), b[1].argmax(1)), lambda c: (c["x"], F.one_hot(c["y"], K))
    ),
    "one-hot float labels": Form(
        lambda m, b: F.cross_entropy(m(b[0]), b[1].to(b[0])), lambda c: (c["x"], F.one_hot(c["y"], K))
    ),
    "int32 labels": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1].long()), lambda c: (c["x"], c["y"].int())),
    "uint8 labels": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1].long()), lambda c: (c["x"], c["y"].byte())),
    "float labels": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1].long()), lambda c: (c["x"], c["y"].float())),
    "labels (n, 1)": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1].squeeze(1)), lambda c: (c["x"], c["y"][None])),
    "labels from 1": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1] - 1), lambda c: (c["x"], c["y"] + 1)),
    "bool labels": Form(
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0])[:, 0], b[1].to(b[0])),
        lambda c: (c["x"], c["t"] > 0),
        k=1,
    ),
    "(x, group, y)": Form(lambda m, b: F.cross_entropy(m(b[0]), b[2]), with_("x", "t", "y")),
    "(y, x)": Form(lambda m, b: F.cross_entropy(m(b[1]), b[0]), with_("y", "x")),
    "two targets": Form(
        lambda m, b: _two_targets(m, b),
        with_("x", "t", "r"),
    ),
    "dict": Form(
        lambda m, b: F.cross_entropy(m(b["pixel_values"]), b["labels"]),
        lambda c: {"pixel_values": c["x"], "labels": c["y"]},
    ),
    "nested, with names": Form(
        lambda m, b: F.cross_entropy(m(b["data"]["image"]), b["target"][0]),
        lambda c: {"id": "row", "data": {"image": c["x"], "size": 3}, "target": [c["y"]]},
    ),
    "namedtuple": Form(lambda m, b: F.cross_entropy(m(b.inputs), b.target), lambda c: Pair(c["x"], c["y"])),
    "dataclass": Form(
        lambda m, b: F.cross_entropy(m(b.features), b.target),
        collate=lambda rows: Record(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])),
    ),
    "dict returned": Form(lambda m, b: {"loss": _ce(m, b), "log": {"a": 1}}),
    "a loss of shape (1,)": Form(lambda m, b: _ce(m, b)[None]),
    "metrics and logs": Form(_logged, made=_two_objects),
    "trainer, epoch, logger": Form(_trained),
    "counters and averages": Form(_counted, made=_counters),
    "item": Form(lambda m, b: (loss := _ce(m, b)) + 0 * loss.item()),
    "numpy and branches": Form(_branching),
    "a skipped batch where NaN": Form(lambda m, b: None if torch.isnan(loss := _ce(m, b)) else loss),
    "kept rows counted by item": Form(_counted_by_item, with_("x", "y", "w"), denominator="weights"),
    "item with class weights": Form(
        lambda m, b: (m.history.append(f"{(loss := _class_weights_by_row(m, b)).item():.3f}"), loss)[1],
        made=lambda m: (_buffer(m), setattr(m, "history", [])),
    ),
    "meters of one's own": Form(_metered, made=_meters),
    "scikit-learn in the step": Form(_scored),
    "normalisation in the step": Form(_normalised, made=_moments),
    "clamped, squared inputs": Form(lambda m, b: F.cross_entropy(m(b[0].clamp(0, 1) ** 2), b[1])),
    "forward gives a tuple": Form(lambda m, b: F.cross_entropy(m(b[0])[0], b[1]), methods={"forward": _forward_tuple}),
    "forward gives a dict": Form(
        lambda m, b: F.cross_entropy(m(b[0])["logits"], b[1]), methods={"forward": _forward_dict}
    ),
    "no forward": Form(
        lambda m, b: F.cross_entropy(m.head(m.body(b[0])), b[1]), methods={"forward": pl.LightningModule.forward}
    ),
    "transfer hook": Form(_ce, methods={"on_after_batch_transfer": _transfer}),
    "step(batch)": Form(_ce, methods={"training_step": _named_batch_alone}),
    "step(batch, i)": Form(_ce, methods={"training_step": _named_otherwise}),
    "step(batch, batch_idx, dataloader_idx=0)": Form(_ce, methods={"training_step": _keywords}),
    "a shared step": Form(lambda m, b: m.shared(b, "train"), methods={"shared": _shared}),
    "a constant added": Form(lambda m, b: _ce(m, b) + 3.0),
    "margin on the labels' logits": Form(
        lambda m, b: F.cross_entropy(m(b[0]) - 0.5 * F.one_hot(b[1], K).to(b[0]), b[1])
    ),
    "logits adjusted by priors": Form(
        lambda m, b: F.cross_entropy(m(b[0]) + torch.tensor([0.2, 0.3, 0.5]).to(b[0]).log(), b[1])
    ),
    "sum / len(x)": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum") / len(b[0])),
    "sum / x.size(0)": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none").sum() / b[0].size(0)),
    "sum * (1 / n)": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum") * (1 / len(b[1]))),
    "mean over rows and classes": Form(
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1], reduction="sum") / b[1].numel(), with_("x", "m")
    ),
    "ones made in the step": Form(
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0])[:, 0], torch.ones(len(b[0])).to(b[0]) * b[1]),
        with_("x", "t"),
        k=1,
    ),
    "in place on the logits": Form(lambda m, b: F.cross_entropy(m(b[0]).div_(0.5).sub_(1), b[1])),
    "in place on x and y": Form(
        lambda m, b: F.cross_entropy(m(b[0].sub_(0.4).div_(0.3)), b[1].sub_(1)), lambda c: (c["x"].clone(), c["y"] + 1)
    ),
    "in place on the losses": Form(lambda m, b: _in_place(m, b)),
    "in place in the backbone": Form(
        _ce,
        made=lambda m: setattr(
            m,
            "body",
            nn.Sequential(*m.body.children(), nn.Linear(m.head.in_features, m.head.in_features), nn.ReLU(inplace=True)),
        ),
    ),
    "squeeze": Form(lambda m, b: F.mse_loss(m(b[0]).squeeze(), b[1][:, 0].squeeze()), with_("x", "r"), k=1),
    "indexed by the rows": Form(lambda m, b: -F.log_softmax(m(b[0]), 1)[torch.arange(len(b[1])), b[1]].mean()),
    "a loop over rows": Form(
        lambda m, b: sum(F.cross_entropy(z, y) for z, y in zip(m(b[0]), b[1], strict=True)) / len(b[0])
    ),
    "a loop over classes": Form(lambda m, b: _one_against_all(m, b)),
    "one-hot by scatter": Form(lambda m, b: _scatter(m, b).sum(1).mean()),
    "autograd through logsumexp": Form(lambda m, b: _by_logsumexp(m, b)),
    "two weighted losses of one kind": Form(lambda m, b: _two_losses(m, b)),
    "in half precision": Form(lambda m, b: F.cross_entropy(m(b[0]).float(), b[1])),
    "a method of the batch": Form(
        lambda m, b: F.cross_entropy(m(b[0].contiguous().view(len(b[0]), -1)), b[1].view(-1))
    ),
    "einsum": Form(lambda m, b: _einsum(m, b), with_("x", "r")),
}


def _in_place(module: Any, batch: Any) -> Tensor:
    x, y = batch
    losses = F.cross_entropy(module(x), y, reduction="none")
    losses[y == 2] *= 3.0
    losses += 0.5 * (y == 1)
    return losses.mean()


def _one_against_all(module: Any, batch: Any) -> Tensor:
    z = module(batch[0])
    total = z.new_zeros(())
    for k in range(K):
        total = total + F.binary_cross_entropy_with_logits(z[:, k], (batch[1] == k).to(z))
    return total / K


def _scatter(module: Any, batch: Any) -> Tensor:
    z = module(batch[0])
    return -F.log_softmax(z, 1) * torch.zeros_like(z).scatter_(1, batch[1][:, None], 1.0)


def _by_logsumexp(module: Any, batch: Any) -> Tensor:
    z = module(batch[0])
    return (torch.logsumexp(z, 1) - z[torch.arange(z.shape[0]), batch[1]]).mean()


def _two_losses(module: Any, batch: Any) -> Tensor:
    z = module(batch[0])
    return 0.7 * F.cross_entropy(z, batch[1]) + 0.3 * F.multi_margin_loss(z, batch[1])


def _einsum(module: Any, batch: Any) -> Tensor:
    off = module(batch[0]) - batch[1]
    return torch.einsum("nk,nk->n", off, off).mean()


def _penalty(module: Any, batch: Any) -> Tensor:
    z = module(batch[0])
    return F.cross_entropy(z, batch[1]) + 0.01 * z.square().mean()


def _two_targets(module: Any, batch: Any) -> Tensor:
    z = module(batch[0])
    return F.cross_entropy(z[:, :2], batch[1]) + 0.5 * F.mse_loss(z[:, 2], batch[2][:, 0])


def _mixup(module: Any, batch: Any) -> Tensor:
    x, y = batch
    share = torch.rand(())
    order = torch.randperm(len(x))
    z = module(share * x + (1 - share) * x[order])
    return share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, y[order])


def _two_forwards(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x), y) + F.mse_loss(module(x + 0.01), module(x))


def _features_loss(module: Any, batch: Any) -> Tensor:
    x, y = batch
    phi = module.body(x)
    return F.cross_entropy(module.head(phi), y) + phi.square().mean()


def _contrastive(module: Any, batch: Any) -> Tensor:
    z = F.normalize(module(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


def _by_hand(module: Any, batch: Any) -> None:
    optimizer = module.optimizers()
    loss = _ce(module, batch)
    optimizer.zero_grad()
    module.manual_backward(loss)
    optimizer.step()


def _tokens(module: Any) -> None:
    module.body = nn.Sequential(nn.Embedding(5, D), nn.Flatten())


def _noise(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x + 0.1 * torch.randn_like(x)), y)


def _dropped(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(F.dropout(module(batch[0]), 0.5), batch[1])


def _whitened(module: Any, batch: Any) -> Tensor:
    z = module(batch[0])
    return F.cross_entropy((z - z.mean(0)) / z.std(0), batch[1])


def _ranking(module: Any, batch: Any) -> Tensor:
    z = module(batch[0])[:, 0]
    return F.softplus(-(z[:, None] - z[None]) * torch.sign(batch[1][:, None] - batch[1][None])).mean()


def _distilled(module: Any, batch: Any) -> Tensor:
    x, y = batch
    z = module(x)
    with torch.no_grad():
        teacher = module.teacher(x)
    return F.cross_entropy(z, y) + F.kl_div(F.log_softmax(z, 1), F.softmax(teacher, 1), reduction="batchmean")


def _l1(module: Any, batch: Any) -> Tensor:
    return _ce(module, batch) + 0.01 * module.head.weight.abs().sum()


def _two_heads(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x), y) + 0.3 * F.cross_entropy(module.auxiliary(x), y)


def _numpy_mixup(module: Any, batch: Any) -> Tensor:
    x, y = batch
    share = float(np.random.beta(1, 1))  # noqa: NPY002 - as people do
    order = torch.randperm(len(x))
    z = module(x)
    return share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, y[order])


def _label_noise(module: Any, batch: Any) -> Tensor:
    share = random.random()
    z = module(batch[0])
    return (1 - share) * F.cross_entropy(z, batch[1]) + share * z.logsumexp(1).mean()


REFUSED: dict[str, Form] = {
    "numpy mixup of the labels": Form(_numpy_mixup, refused="at every call|random"),
    "one-hot without the number of classes": Form(
        lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1]).to(b[0])), refused="fails on a batch of"
    ),
    "python's random": Form(_label_noise, refused="at every call"),
    "mixup": Form(_mixup, refused="random"),
    "two forwards": Form(_two_forwards, refused="called 3 times"),
    "a loss on features": Form(_features_loss, refused="more than the head's output"),
    "contrastive": Form(_contrastive, refused="couples samples"),
    "whitening": Form(_whitened, refused="couples samples"),
    "ranking": Form(_ranking, k=1, refused="couples samples"),
    "manual optimisation": Form(
        _by_hand, made=lambda m: setattr(m, "automatic_optimization", False), refused="by hand"
    ),
    "in place on what is needed": Form(
        _ce,
        made=lambda m: setattr(m, "body", nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.ReLU(inplace=True))),
        refused="in place on what another needs",
    ),
    "tokens": Form(_ce, lambda c: (torch.tensor([int(c["y"])]), c["y"]), made=_tokens, refused="integer inputs"),
    "noise on x": Form(_noise, refused="another one at every"),
    "dropout on the logits": Form(_dropped, refused="random"),
    "a teacher in the step": Form(
        _distilled, made=lambda m: setattr(m, "teacher", nn.Linear(D, K)), refused="more than the head's output"
    ),
    "L1 of the head": Form(_l1, refused="own parameters"),
    "the norm of the head, not squared": Form(
        lambda m, b: _ce(m, b) + 0.01 * m.head.weight.norm(), refused="own parameters"
    ),
    "L1 and L2 of the head": Form(lambda m, b: _l1(m, b) + 0.01 * m.head.weight.pow(2).sum(), refused="own parameters"),
    "L2 divided by the rows": Form(
        lambda m, b: _ce(m, b) + m.head.weight.pow(2).sum() / len(b[0]), refused="own parameters"
    ),
    "an auxiliary head": Form(
        _two_heads, made=lambda m: setattr(m, "auxiliary", nn.Linear(D, K)), refused="called|more than"
    ),
    "detached inputs": Form(lambda m, b: F.cross_entropy(m(b[0].detach()), b[1]), refused="detached"),
    "no loss": Form(lambda m, b: None, refused="not one loss"),
    "a loss per row": Form(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), refused="not one loss"),
    "raises": Form(lambda m, b: b.missing, refused="could not be replayed"),
    "a loss without the head": Form(
        lambda m, b: (m.scale * m(b[0]).detach()).sum(),
        made=lambda m: setattr(m, "scale", nn.Parameter(torch.ones(()))),
        refused="depends on no nn.Linear",
    ),
}
