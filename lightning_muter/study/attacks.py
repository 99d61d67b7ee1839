"""Clean and robust predictions of a model on a whole dataset, the same for every method that is compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torchattacks
from torch import Tensor, nn

from lightning_muter.adversarial.climb import LossAttack, attack_scope
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError
from lightning_muter.model.head import eval_mode
from lightning_muter.model.losses import Loss, per_sample, resolve_loss
from lightning_muter.study.metrics import class_logits

Sample = tuple[Tensor, Tensor]


def stacked(data: torch.utils.data.Dataset[Sample], dtype: torch.dtype, positions: list[int] | None = None) -> Sample:
    """Inputs (in ``dtype``) and targets of a map-style dataset, or of some of its positions, as two tensors."""
    if positions is None:
        positions = list(range(len(data)))  # type: ignore[arg-type]
    items = [data[i] for i in positions]
    return torch.stack([x for x, _ in items]).to(dtype), torch.stack([y for _, y in items])


class Evaluation(ABC):
    """An attack for testing, stronger than the one trained with and always started from the same random state.

    Args:
        batch_size: inputs per forward pass; it changes nothing but time and memory.
        seed: of what is random in the attack.
    """

    name = "evaluation"

    def __init__(self, *, batch_size: int = 512, seed: int = 0) -> None:
        self.batch_size, self.seed = batch_size, seed

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits of ``model`` in eval mode, without gradients."""
        with torch.no_grad(), eval_mode(model):
            return torch.cat([model(part) for part in x.split(self.batch_size)])

    def adversarial(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel | None, loss: Loss | None = None
    ) -> Tensor:
        """Inputs in ``B(x)`` that this attack finds against ``model``; ``x`` itself without a threat model."""
        if threat is None or threat.eps == 0 or len(x) == 0:
            return x
        with torch.random.fork_rng(devices=[]), attack_scope(model):
            torch.manual_seed(self.seed)
            found = [self.attack(model, a, b, threat, loss) for a, b in self._batches(x, y)]
        return torch.cat(found).detach().to(x.dtype)

    def _batches(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)

    @abstractmethod
    def attack(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, loss: Loss | None) -> Tensor: ...


class PGD(Evaluation):
    """Projected gradient ascent on the model's own loss, the best iterate of all starts kept.

    The first start is the input itself, so that ``restarts=1`` is deterministic; further ones are random in the ball.
    """

    def __init__(self, steps: int = 20, restarts: int = 1, **options: int) -> None:
        super().__init__(**options)
        if restarts < 1:
            raise ArgumentError("restarts", restarts, "a whole number, 1 or more")
        self.steps, self.restarts = steps, restarts
        self.name = f"PGD-{steps}" + (f" x {restarts}" if restarts > 1 else "")

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, loss: Loss | None) -> Tensor:
        loss = resolve_loss(loss)
        best = LossAttack(threat, loss, steps=self.steps, random_start=False)(model, x, y)
        for _ in range(self.restarts - 1):
            other = LossAttack(threat, loss, steps=self.steps, random_start=True)(model, x, y)
            with torch.no_grad():
                better = per_sample(loss, model(other), y) > per_sample(loss, model(best), y)
            best = torch.where(better.reshape(-1, *(1,) * (x.ndim - 1)), other, best)
        return best


class AutoAttack(Evaluation):
    """torchattacks' AutoAttack (APGD-CE, APGD-T, FAB-T, Square) for images in [0, 1]; slow, for final figures.

    Source: F. Croce, M. Hein, "Reliable Evaluation of Adversarial Robustness ...", ICML 2020.
    """

    name = "AutoAttack"

    def __init__(self, version: str = "standard", **options: int) -> None:
        super().__init__(**options)
        self.version = version

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, loss: Loss | None) -> Tensor:
        if x.ndim != 4 or threat.box != (0.0, 1.0):
            raise ArgumentError("evaluation", "AutoAttack", "images in [0, 1] for AutoAttack", "Use evaluation=pgd50.")
        classes = class_logits(self.logits(model, x[:1])).shape[1]
        if classes < 4:  # the targeted parts attack the nine, at least three, next classes
            raise ArgumentError("evaluation", "AutoAttack", "models of at least 4 classes", "Use evaluation=pgd50.")
        norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
        attack = torchattacks.AutoAttack(
            model, norm=norm, eps=threat.eps, version=self.version, n_classes=classes, seed=self.seed
        )
        return attack(x, y)
