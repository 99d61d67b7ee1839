"""Metrics against closed forms, and the classes against their functions over any batching."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_muter.errors import ArgumentError
from lightning_muter.study import metrics as m


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(37, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return a, b, torch.randint(0, 4, (37,), generator=g)


def test_relative_distance_is_scale_free_and_zero_at_retraining() -> None:
    u, r, w = torch.randn(3, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d = m.relative_parameter_distance(u, r, w)
    torch.testing.assert_close(m.relative_parameter_distance(7 * u, 7 * r, 7 * w), d)
    assert m.relative_parameter_distance(r, r, w) == 0
    assert m.relative_parameter_distance(w, r, w) == 1


def test_relative_distance_of_modules_and_state_dicts_agree() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(3)]
    direct = m.relative_parameter_distance(*models)
    by_name = m.relative_parameter_distance(*[mod.state_dict() for mod in models])
    torch.testing.assert_close(direct, by_name)
    metric = m.RelativeParameterDistance()
    metric.update(*models)
    torch.testing.assert_close(metric.compute(), direct)


def test_relative_distance_refuses_other_sizes_and_an_unchanged_reference() -> None:
    with pytest.raises(ArgumentError, match="same size"):
        m.relative_parameter_distance(torch.zeros(2), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ArgumentError, match="Nothing to unlearn"):
        m.relative_parameter_distance(torch.zeros(2), torch.ones(2), torch.ones(2))


def test_one_logit_models_equal_their_two_logit_form(logits) -> None:
    z = logits[0][:, 0]
    two = torch.stack([torch.zeros_like(z), z], 1)
    y = logits[2] % 2
    for one in (z, z[:, None]):
        assert m.accuracy(one, y) == m.accuracy(two, y) == m.accuracy(one, 2.0 * y - 1)
        torch.testing.assert_close(m.prediction_kl(one, -one), m.prediction_kl(two, -two))


def test_kl_is_the_closed_form_and_not_symmetric() -> None:
    u, r = torch.tensor([[0.2, 0.8]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    assert float(m.prediction_kl(u, r)) == pytest.approx(expected, abs=1e-6)
    assert float(m.prediction_kl(r, u)) != pytest.approx(expected, abs=1e-3)


def test_kl_ignores_a_shift_of_all_logits(logits) -> None:
    a, b, _ = logits
    torch.testing.assert_close(m.prediction_kl(a + 3, b - 5), m.prediction_kl(a, b))
    reference = F.kl_div(F.log_softmax(a, 1), F.softmax(b, 1), reduction="batchmean")
    torch.testing.assert_close(m.prediction_kl(a, b), reference)


@pytest.mark.parametrize("size", [1, 5, 37])
def test_classes_equal_functions_for_any_batch_size(logits, size: int) -> None:
    a, b, y = logits
    pairs = [
        (m.Accuracy(), m.accuracy(a, y), (a, y)),
        (m.AccuracyGap(), m.accuracy_gap(a, b, y), (a, b, y)),
        (m.Agreement(), m.agreement(a, b), (a, b)),
        (m.PredictionKL(), m.prediction_kl(a, b), (a, b)),
    ]
    for metric, expected, args in pairs:
        for part in zip(*[t.split(size) for t in args], strict=True):
            metric.update(*part)
        torch.testing.assert_close(metric.compute(), expected)
        metric.reset()
        metric.update(*args)
        torch.testing.assert_close(metric.compute(), expected)


def test_wrong_shapes_are_named(logits) -> None:
    a, b, y = logits
    with pytest.raises(ArgumentError, match="one target per row"):
        m.accuracy(a, y[:-1])
    with pytest.raises(ArgumentError, match="shape"):
        m.accuracy(a[:, :, None], y)
    with pytest.raises(ArgumentError, match="reference_logits"):
        m.prediction_kl(a, b[:, :2])
