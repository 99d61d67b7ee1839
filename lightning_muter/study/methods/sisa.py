"""SISA: an ensemble of shards, of which a request retrains those it touches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_muter.errors import ArgumentError
from lightning_muter.study.methods.base import Competitor, Outcome, State
from lightning_muter.study.methods.sgd import descend
from lightning_muter.study.models.base import Classifier
from lightning_muter.study.setup.problem import World


class Ensemble(nn.Module):
    """Mean of the constituents' predicted probabilities, as logits, on one shared backbone."""

    def __init__(self, model: Classifier, heads: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.model, self.heads = model, nn.ModuleList(heads)
        self.criterion = model.criterion

    def forward(self, x: Tensor) -> Tensor:
        features = self.model.features(x)
        logits = torch.stack([head(features) for head in self.heads])
        if logits.shape[-1] == 1:
            mean = torch.sigmoid(logits).mean(0)
            return torch.log(mean) - torch.log1p(-mean)
        return torch.logsumexp(torch.log_softmax(logits, dim=-1), dim=0) - math.log(len(self.heads))


class SISA(Competitor):
    """Sharded, isolated, sliced, aggregated training: retrain only what the forgotten samples touched.

    The private part is dealt into ``shards``; each trains a head of its own, slice after slice (after slice r on slices
    1..r, ``epochs`` each), keeping a checkpoint before every slice. A request retrains the shards it touches, from the
    first slice it touches. Predictions are averaged, so there is no single head to measure a distance of.

    Source: L. Bourtoule et al., "Machine Unlearning", IEEE S&P 2021.
    """

    default_label = "SISA"

    def __init__(
        self, shards: int = 5, slices: int = 3, epochs: int = 10, lr: float = 0.1, label: str | None = None
    ) -> None:
        super().__init__(label)
        if shards < 1 or slices < 1:
            raise ArgumentError("shards", shards, "at least one shard of at least one slice")
        self.shards, self.slices, self.epochs, self.lr = shards, slices, epochs, lr

    def start(self, world: World) -> State:
        began = time.perf_counter()
        if self.shards * self.slices > len(world.data):
            raise ArgumentError("shards", self.shards, f"shards x slices of at most {len(world.data)} samples")
        order = torch.randperm(len(world.data), generator=torch.Generator().manual_seed(world.seed)).tolist()
        dealt = [order[s :: self.shards] for s in range(self.shards)]
        plan = [[shard[r :: self.slices] for r in range(self.slices)] for shard in dealt]
        trained = [self.train(world, s, parts) for s, parts in enumerate(plan)]
        stored = {"plan": plan, "checkpoints": trained}
        heads = [saved for checkpoints in trained for saved in checkpoints]
        size = sum(tensor.numel() * tensor.element_size() for saved in heads for tensor in saved.values())
        state = State(world, world.copy_model(), time.perf_counter() - began, size, stored)
        state.model = self.ensemble(state)
        return state

    def train(
        self,
        world: World,
        shard: int,
        parts: Sequence[Sequence[int]],
        checkpoints: Sequence[dict[str, Tensor]] = (),
    ) -> list[dict[str, Tensor]]:
        """Checkpoints before slice 0, 1, ... and after the last; those given (up to where training starts) are kept."""
        model = world.copy_model()
        if checkpoints:
            model.head.load_state_dict(checkpoints[-1])
        else:
            model.reset_head()
        saved = list(checkpoints) or [_saved(model)]
        for r in range(len(saved) - 1, len(parts)):
            x, y = world.tensors([i for part in parts[: r + 1] for i in part]) if any(parts[: r + 1]) else (None, None)
            if x is not None and y is not None and parts[r]:
                seed = world.seed * 1_000_003 + shard * 1009 + r
                descend(model, x, y, world, epochs=self.epochs, lr=self.lr, seed=seed)
            saved.append(_saved(model))
        return saved

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        gone, plan, checkpoints = set(request), state.stored["plan"], state.stored["checkpoints"]
        touched = 0
        for s, parts in enumerate(plan):
            first = next((r for r, part in enumerate(parts) if gone & set(part)), None)
            if first is None:
                continue
            touched += 1
            plan[s] = [[i for i in part if i not in gone] for part in parts]
            checkpoints[s] = self.train(state.world, s, plan[s], checkpoints[s][: first + 1])
        state.model = self.ensemble(state)
        return Outcome(state.model, math.nan, status=f"{touched} of {len(plan)} shards")

    def ensemble(self, state: State) -> Ensemble:
        heads = []
        model = state.world.copy_model()
        for checkpoints in state.stored["checkpoints"]:
            head = nn.Linear(model.head.in_features, model.head.out_features, dtype=model.head.weight.dtype)
            head.load_state_dict(checkpoints[-1])
            heads.append(head)
        return Ensemble(model, heads)


def _saved(model: Classifier) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.head.state_dict().items()}
