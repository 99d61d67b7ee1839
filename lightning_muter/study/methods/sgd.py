"""Methods that only descend or ascend on samples, by adversarial SGD on the head."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muter.adversarial.climb import LossAttack
from lightning_muter.model.losses import per_sample
from lightning_muter.study.methods.base import Competitor, Outcome, State, head_outcome
from lightning_muter.study.models.base import Classifier
from lightning_muter.study.setup.problem import World


def descend(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    world: World,
    *,
    epochs: int,
    lr: float,
    seed: int,
    batch_size: int = 64,
    momentum: float = 0.9,
    sign: float = 1.0,
    attack_steps: int = 10,
) -> None:
    """Adversarial SGD on the head: ``w <- w - lr (sign * grad of the batch's mean robust loss + weight_decay w)``.

    The order of the samples depends on ``seed`` alone, the adversarial points on the weights alone.
    """
    if len(x) == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    attack = (
        None if world.threat is None else LossAttack(world.threat, world.loss, steps=attack_steps, random_start=False)
    )
    decay = world.weight_decay if sign > 0 else 0.0
    optimiser = torch.optim.SGD(model.head.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    model.eval()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(batch_size):
            points = x[batch] if attack is None or world.threat is None else attack(model, x[batch], y[batch])
            loss = sign * per_sample(world.loss, model(points), y[batch]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    optimiser.zero_grad()


class FineTune(Competitor):
    """A few epochs of adversarial SGD on the retained samples, from the current head.

    Source: the "fine-tuning" baseline of A. Golatkar et al., CVPR 2020.
    """

    default_label = "fine-tuning"

    def __init__(self, epochs: int = 5, lr: float = 0.05, label: str | None = None) -> None:
        super().__init__(label)
        self.epochs, self.lr = epochs, lr

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        assert isinstance(state.model, Classifier)
        x, y = state.world.tensors(state.world.retained(forgotten))
        descend(state.model, x, y, state.world, epochs=self.epochs, lr=self.lr, seed=state.world.seed)
        return head_outcome(state.model)


class NegativeGradient(Competitor):
    """Adversarial gradient *ascent* on the forgotten samples: ``w <- w + lr grad of their mean robust loss``.

    Source: the "negative gradient" baseline of A. Golatkar et al., CVPR 2020.
    """

    default_label = "negative gradient"

    def __init__(self, epochs: int = 1, lr: float = 0.01, label: str | None = None) -> None:
        super().__init__(label)
        self.epochs, self.lr = epochs, lr

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        assert isinstance(state.model, Classifier)
        x, y = state.world.tensors(request)
        descend(
            state.model,
            x,
            y,
            state.world,
            epochs=self.epochs,
            lr=self.lr,
            momentum=0.0,
            sign=-1.0,
            seed=state.world.seed,
        )
        return head_outcome(state.model)
