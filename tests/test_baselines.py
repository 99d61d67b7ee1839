"""Baselines against what defines them, on a small softmax problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError
from lightning_muter.model.losses import per_sample
from lightning_muter.study.attacks import PGD
from lightning_muter.study.data import ArrayDataset, DigitsDataModule
from lightning_muter.study.methods.retrain import Nothing, RetrainCold, RetrainWarm
from lightning_muter.study.methods.sgd import FineTune, NegativeGradient, descend
from lightning_muter.study.methods.sisa import SISA
from lightning_muter.study.models import Classifier, LogisticRegression, SoftmaxRegression
from lightning_muter.study.setup.problem import World, head_vector

FORGET = [3, 10, 11, 40]


def stub_retrainer(model: Classifier, dataset: Any) -> float:
    """Full-batch descent: enough to tell which samples and which start were used."""
    x = torch.stack([dataset[i][0] for i in range(len(dataset))]).double()
    y = torch.stack([dataset[i][1] for i in range(len(dataset))])
    for _ in range(5):
        loss = per_sample(model.criterion, model(x), y).mean()
        grads = torch.autograd.grad(loss, list(model.head.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.head.parameters(), grads, strict=True):
                parameter -= 0.1 * grad
    return 0.5


@pytest.fixture
def world() -> World:
    dm = DigitsDataModule(limit_train=200)
    torch.manual_seed(0)
    model = SoftmaxRegression(dm.in_shape, 10).double()
    return World(
        model,
        dm.private_dataset,
        dm.test_dataset,
        ThreatModel("l2", 0.1),
        1e-3,
        PGD(2),
        seed=1,
        retrainer=stub_retrainer,
    )


def test_nothing_keeps_the_model(world: World) -> None:
    method = Nothing()
    outcome = method.forget(method.start(world), FORGET, FORGET)
    assert outcome.parameters is not None
    assert torch.equal(outcome.parameters, head_vector(world.model))
    assert outcome.seconds == 0


def test_retraining_uses_the_retained_samples_and_its_own_start(world: World) -> None:
    reference, stationarity, seconds, _ = world.retrain(FORGET)
    by_hand = world.copy_model()
    by_hand.reset_head()
    stub_retrainer(by_hand, [world.data[i] for i in range(len(world.data)) if i not in FORGET])
    torch.testing.assert_close(head_vector(reference), head_vector(by_hand))
    assert stationarity == 0.5
    assert seconds > 0
    cold, warm = RetrainCold(), RetrainWarm()
    from_random = cold.forget(cold.start(world), FORGET, FORGET).parameters
    from_current = warm.forget(warm.start(world), FORGET, FORGET).parameters
    expected = world.copy_model()
    stub_retrainer(expected, [world.data[i] for i in range(len(world.data)) if i not in FORGET])
    assert from_current is not None
    assert from_random is not None
    torch.testing.assert_close(from_current, head_vector(expected))
    assert not torch.allclose(from_random, from_current)


def test_the_key_of_a_reference_follows_data_threat_and_backbone(world: World) -> None:
    key = world.key()
    assert world.key() == key
    world.threat = ThreatModel("l2", 0.2)
    other = world.key()
    world.threat = ThreatModel("l2", 0.1)
    world.data = world.data.take(list(range(1, len(world.data))))
    assert len({key, other, world.key()}) == 3
    world.model.reset_head()  # the head is what is retrained: it must not count
    with_zero_head = world.key()
    world.model.head.weight.data += 1
    assert world.key() == with_zero_head


def test_fine_tuning_never_sees_forgotten_samples_and_negative_gradient_nothing_else(world: World) -> None:
    spoiled = ArrayDataset(world.data.x.clone(), world.data.targets, num_classes=10)
    outcomes = {}
    for name, data in (("clean", world.data), ("spoiled", spoiled)):
        if name == "spoiled":
            spoiled.x[FORGET] = 1 - spoiled.x[FORGET]
        world.data = data
        for method in (FineTune(epochs=1), NegativeGradient(epochs=2)):
            outcomes[name, method.label] = method.forget(method.start(world), FORGET, FORGET).parameters
    assert torch.equal(outcomes["clean", "fine-tuning"], outcomes["spoiled", "fine-tuning"])
    assert not torch.equal(outcomes["clean", "negative gradient"], outcomes["spoiled", "negative gradient"])
    world.data = spoiled
    retained = world.retained(FORGET)
    spoiled.x[retained] = 1 - spoiled.x[retained]
    method = NegativeGradient(epochs=2)
    again = method.forget(method.start(world), FORGET, FORGET).parameters
    assert torch.equal(again, outcomes["spoiled", "negative gradient"])


def test_one_step_of_descent_is_the_formula(world: World) -> None:
    """Full batch, no momentum, no threat: w - lr (grad of the mean loss + weight_decay w); the ascent has no decay."""
    world.threat = None
    x, y = world.tensors(range(20))
    for sign, decay in ((1.0, world.weight_decay), (-1.0, 0.0)):
        model = world.copy_model()
        loss = per_sample(world.loss, model(x), y).mean()
        grads = torch.autograd.grad(loss, list(model.head.parameters()))
        expected = torch.cat(
            [
                (p - 0.1 * (sign * g + decay * p)).reshape(-1)
                for p, g in zip(model.head.parameters(), grads, strict=True)
            ]
        )
        descend(model, x, y, world, epochs=1, lr=0.1, momentum=0.0, sign=sign, batch_size=20, seed=0)
        torch.testing.assert_close(head_vector(model), expected.detach())


def test_negative_gradient_raises_the_loss_of_the_forgotten(world: World) -> None:
    x, y = world.tensors(FORGET)
    method = NegativeGradient(epochs=5, lr=0.1)
    outcome = method.forget(method.start(world), FORGET, FORGET)
    before, after = (per_sample(world.loss, m(x), y).mean() for m in (world.model, outcome.model))
    assert after > before + 1e-3


def test_sisa_retrains_touched_shards_as_from_scratch_and_no_others(world: World) -> None:
    method = SISA(shards=4, slices=3, epochs=2)
    state = method.start(world)
    before = [
        [{k: v.clone() for k, v in c.items()} for c in checkpoints] for checkpoints in state.stored["checkpoints"]
    ]
    shard_of = {i: s for s, parts in enumerate(state.stored["plan"]) for part in parts for i in part}
    assert sorted(shard_of) == list(range(len(world.data)))
    touched_shard = shard_of[FORGET[0]]
    request = [i for i in FORGET if shard_of[i] == touched_shard] or FORGET[:1]
    outcome = method.forget(state, request, request)
    assert outcome.status == "1 of 4 shards"
    for s, checkpoints in enumerate(state.stored["checkpoints"]):
        scratch = method.train(world, s, state.stored["plan"][s])
        for saved, own in zip(checkpoints, scratch, strict=True):
            assert all(torch.equal(saved[k], own[k]) for k in saved)
        if s != touched_shard:
            assert all(torch.equal(a[k], b[k]) for a, b in zip(before[s], checkpoints, strict=True) for k in a)
    assert not torch.equal(
        before[touched_shard][-1]["weight"], state.stored["checkpoints"][touched_shard][-1]["weight"]
    )
    assert not any(set(request) & set(part) for parts in state.stored["plan"] for part in parts)


def test_sisa_survives_the_loss_of_a_whole_shard(world: World) -> None:
    method = SISA(shards=20, slices=2, epochs=1)
    state = method.start(world)
    gone = [i for part in state.stored["plan"][0] for i in part]
    outcome = method.forget(state, gone, gone)
    assert torch.isfinite(outcome.model(world.tensors(range(5))[0])).all()
    assert not state.stored["checkpoints"][0][-1]["weight"].any()  # back at its start


def test_the_ensemble_averages_probabilities(world: World) -> None:
    method = SISA(shards=3, slices=1, epochs=1)
    state = method.start(world)
    x, _ = world.tensors(range(7))
    features = world.model.features(x)
    assert isinstance(state.model, torch.nn.Module)
    mean = torch.stack([head(features).softmax(1) for head in state.model.heads]).mean(0)  # type: ignore[union-attr]
    torch.testing.assert_close(state.model(x).softmax(1), mean)
    torch.testing.assert_close(state.model(x).exp().sum(1), torch.ones(7, dtype=torch.float64))


def test_the_ensemble_of_one_logit_models_averages_probabilities() -> None:
    dm = DigitsDataModule(classes=[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], limit_train=120)
    torch.manual_seed(0)
    model = LogisticRegression(dm.in_shape).double()
    world = World(model, dm.private_dataset, dm.test_dataset, None, 1e-3, PGD(1), 0)
    state = SISA(shards=2, slices=1, epochs=1).start(world)
    x, _ = world.tensors(range(5))
    mean = torch.stack([torch.sigmoid(h(model.features(x))) for h in state.model.heads]).mean(0)  # type: ignore[union-attr]
    torch.testing.assert_close(torch.sigmoid(state.model(x)), mean)


def test_more_parts_than_samples_are_refused(world: World) -> None:
    with pytest.raises(ArgumentError, match="shards x slices"):
        SISA(shards=100, slices=10).start(world)
    with pytest.raises(ArgumentError, match="at least one shard"):
        SISA(shards=0)
