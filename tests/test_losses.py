"""Losses per sample: the forms users have, alignment of one logit, and what counts as plain cross-entropy."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_muter.errors import ArgumentError
from lightning_muter.model.losses import accuracy, is_cross_entropy, mean_loss, per_sample, resolve_loss


def test_criterion_of_the_module_then_cross_entropy() -> None:
    module = nn.Module()
    assert resolve_loss(None, module) is F.cross_entropy
    module.criterion = nn.BCEWithLogitsLoss()
    z, y = torch.tensor([[0.3], [-2.0]]), torch.tensor([1, 0])
    want = torch.stack([F.softplus(-z[0, 0]), F.softplus(z[1, 0])])
    torch.testing.assert_close(per_sample(resolve_loss(None, module), z, y), want)
    assert module.criterion.reduction == "mean"  # the user's own object is not touched
    assert resolve_loss(F.mse_loss, module) is F.mse_loss


def test_class_weights_of_a_copied_loss_follow_the_original() -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
    loss = resolve_loss(criterion)
    criterion.double()
    z, y = torch.tensor([[0.0, 1.0], [0.5, 0.0]], dtype=torch.float64), torch.tensor([1, 0])
    want = torch.tensor([2.0, 1.0], dtype=torch.float64) * F.cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(per_sample(loss, z, y), want)


@pytest.mark.parametrize("z_shape", [(3,), (3, 1)])
@pytest.mark.parametrize("y_shape", [(3,), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_one_logit_is_aligned_not_broadcast(z_shape, y_shape, dtype) -> None:
    z, y = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1, 0, 0])
    out = per_sample(F.binary_cross_entropy_with_logits, z.reshape(z_shape), y.to(dtype).reshape(y_shape))
    torch.testing.assert_close(out, F.softplus(torch.where(y == 1, -z, z)))


def test_several_regression_outputs_are_averaged_as_torch_does() -> None:
    z, y = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
    assert per_sample(resolve_loss(nn.MSELoss()), z, y).mean() == nn.MSELoss()(z, y)
    assert per_sample(resolve_loss(nn.MSELoss(reduction="sum")), z, y).sum() == nn.MSELoss(reduction="sum")(z, y)
    assert mean_loss(F.mse_loss, z, y).item() == 2.5


def test_one_logit_with_cross_entropy_is_refused_with_the_choices() -> None:
    for loss in (F.cross_entropy, resolve_loss(nn.CrossEntropyLoss(label_smoothing=0.1))):
        with pytest.raises(ArgumentError, match="binary_cross_entropy_with_logits"):
            per_sample(loss, torch.zeros(2, 1), torch.tensor([0, 1]))


def test_losses_that_cannot_give_one_number_per_sample_are_refused() -> None:
    for bad in (3, lambda z, y: (z - y).sum(), nn.Linear(2, 2)):
        with pytest.raises(ArgumentError, match="loss: got"):
            resolve_loss(bad)
    with pytest.raises(ArgumentError, match="gave shape"):
        per_sample(lambda z, y, reduction: z.sum(), torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ArgumentError, match="y: got"):
        per_sample(F.mse_loss, torch.zeros(2), torch.zeros(3))


def test_plain_cross_entropy_is_recognised() -> None:
    weight = torch.ones(2)
    yes = [None, F.cross_entropy, nn.CrossEntropyLoss(), resolve_loss(nn.CrossEntropyLoss())]
    yes.append(functools.partial(F.cross_entropy, reduction="mean"))
    no = [F.mse_loss, nn.CrossEntropyLoss(weight), nn.CrossEntropyLoss(label_smoothing=0.1), nn.BCEWithLogitsLoss()]
    no += [functools.partial(F.cross_entropy, weight=weight), resolve_loss(nn.CrossEntropyLoss(weight)), nn.NLLLoss()]
    assert all(is_cross_entropy(loss) for loss in yes)
    assert not any(is_cross_entropy(loss) for loss in no)


def test_accuracy_for_classes_one_logit_and_regression() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    assert accuracy(F.cross_entropy, z, torch.tensor([0, 1, 1, 1])).item() == 0.75
    one, y = torch.tensor([0.1, 5.0, -1.0, -0.2]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert accuracy(resolve_loss(nn.BCEWithLogitsLoss()), one[:, None], y).item() == 0.75
    assert accuracy(F.mse_loss, one, y.long()).item() == 0.75
    assert accuracy(F.mse_loss, one, y) is None
    assert accuracy(F.mse_loss, z, torch.zeros(4, 2)) is None
