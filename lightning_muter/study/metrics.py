"""How close an unlearned model is to the retrained one: pure functions, and thin torchmetrics classes over them.

Notation: ``w_u`` unlearned, ``w_r`` retrained on the retained data, ``w`` the model before the request; ``p_u, p_r``
their predicted class probabilities.  Logits are ``(n, K)`` for K classes, ``(n, 1)`` or ``(n,)`` for a one-logit model,
whose second class has the logit and whose first has 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_muter.errors import ArgumentError

Parameters = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | Tensor


# -- functions ---------------------------------------------------------------------------------------------------------


def flat_parameters(parameters: Parameters) -> Tensor:
    """All parameters as one float64 vector: a module's ``parameters()``, a mapping's values by sorted name, or tensors.

    >>> flat_parameters({"b": torch.tensor([3.0]), "a": torch.tensor([[1.0, 2.0]])})
    tensor([1., 2., 3.], dtype=torch.float64)
    """
    if isinstance(parameters, Tensor):
        tensors: list[Tensor] = [parameters]
    elif isinstance(parameters, nn.Module):
        tensors = [p for _, p in sorted(parameters.named_parameters())]
    elif isinstance(parameters, Mapping):
        tensors = [parameters[name] for name in sorted(parameters)]
    else:
        tensors = list(parameters)
    if not tensors:
        raise ArgumentError("parameters", parameters, "at least one tensor", "Pass a module, a mapping or tensors.")
    return torch.cat([t.detach().reshape(-1).to("cpu", torch.float64) for t in tensors])


def parameter_distances(unlearned: Parameters, retrained: Parameters, original: Parameters) -> tuple[Tensor, Tensor]:
    """``(||w_u - w_r||, ||w - w_r||)`` in float64."""
    u, r, w = (flat_parameters(p) for p in (unlearned, retrained, original))
    if not u.shape == r.shape == w.shape:
        raise ArgumentError(
            "parameters",
            (tuple(u.shape), tuple(r.shape), tuple(w.shape)),
            "three sets of the same size (unlearned, retrained, original)",
            "Compare models of one architecture and the same parameters of each.",
        )
    return (u - r).norm(), (w - r).norm()


def relative_parameter_distance(unlearned: Parameters, retrained: Parameters, original: Parameters) -> Tensor:
    r"""``||w_u - w_r|| / ||w - w_r||``: 0 is retraining, 1 is as good as doing nothing.

    Raises:
        ArgumentError: different sizes, or original equal to retrained (there is nothing to unlearn).

    >>> relative_parameter_distance(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([4.0]))
    tensor(0.2500, dtype=torch.float64)
    """
    numerator, denominator = parameter_distances(unlearned, retrained, original)
    return _relative(numerator, denominator)


def _relative(numerator: Tensor, denominator: Tensor) -> Tensor:
    if float(denominator) == 0.0:
        raise ArgumentError(
            "retrained",
            "equal to the original parameters",
            "a model that differs from the original",
            "Nothing to unlearn.",
        )
    return numerator / denominator


def class_logits(logits: Tensor) -> Tensor:
    """Logits as ``(n, K)`` with K >= 2; a single logit ``z`` becomes ``(0, z)``.

    >>> class_logits(torch.tensor([2.0]))
    tensor([[0., 2.]])
    """
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ArgumentError(
            "logits", tuple(logits.shape), "shape (n, K), (n, 1) or (n,)", "Flatten other outputs first."
        )
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def predicted_classes(logits: Tensor) -> Tensor:
    """Class of the largest logit, ``(n,)`` int64; for one logit, class 1 where it is above 0."""
    return class_logits(logits).argmax(dim=1)


def class_targets(y: Tensor) -> Tensor:
    """Targets as class indices: int64 classes as they are; 0/1 and -1/+1 of one-logit models become 0/1.

    >>> class_targets(torch.tensor([-1.0, 1.0, 1.0]))
    tensor([0, 1, 1])
    """
    y = y.reshape(-1)
    return y.clamp(min=0).to(torch.int64)


def correct_predictions(logits: Tensor, y: Tensor) -> Tensor:
    """Boolean ``(n,)``: is the predicted class the target?"""
    predictions = predicted_classes(logits)
    targets = class_targets(y).to(predictions.device)
    if predictions.shape != targets.shape:
        raise ArgumentError("y", tuple(y.shape), f"one target per row of logits ({len(predictions)})")
    return predictions == targets


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of correct predictions: clean accuracy on clean logits, robust accuracy on logits at adversarial points.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    tensor(0.5000, dtype=torch.float64)
    """
    return correct_predictions(logits, y).double().mean()


def accuracy_gap(logits: Tensor, reference_logits: Tensor, y: Tensor) -> Tensor:
    """Accuracy minus the retrained model's, in percentage points (positive: more accurate than retraining).

    >>> accuracy_gap(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    tensor(100., dtype=torch.float64)
    """
    return 100 * (accuracy(logits, y) - accuracy(reference_logits, y))


def agreement(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Share of inputs on which both models predict the same class (right or wrong).

    >>> agreement(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    tensor(0.5000, dtype=torch.float64)
    """
    return (predicted_classes(logits) == predicted_classes(reference_logits)).double().mean()


def prediction_kl_terms(logits: Tensor, reference_logits: Tensor) -> Tensor:
    r"""``KL(p_r || p_u) = sum_c p_r(c) [log p_r(c) - log p_u(c)]`` per input, ``(n,)`` float64."""
    log_u = F.log_softmax(class_logits(logits).double(), dim=1)
    log_r = F.log_softmax(class_logits(reference_logits).double(), dim=1)
    if log_u.shape != log_r.shape:
        raise ArgumentError(
            "reference_logits", tuple(reference_logits.shape), f"the shape of logits {tuple(logits.shape)}"
        )
    return F.kl_div(log_u, log_r, reduction="none", log_target=True).sum(1)


def prediction_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Mean of ``KL(p_r || p_u)`` over the inputs, in nats; 0 only where both models predict the same probabilities.

    >>> bool(prediction_kl(torch.zeros(1, 2), torch.zeros(1, 2)) == 0)
    True
    """
    return prediction_kl_terms(logits, reference_logits).mean()


# -- torchmetrics ------------------------------------------------------------------------------------------------------


class RelativeParameterDistance(Metric):
    """:func:`relative_parameter_distance`; over several updates the ratio of the root-mean-square distances.

    >>> metric = RelativeParameterDistance()
    >>> metric.update(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([4.0]))
    >>> metric.compute()
    tensor(0.2500, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    numerator: Tensor
    denominator: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("numerator", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("denominator", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, unlearned: Parameters, retrained: Parameters, original: Parameters) -> None:
        numerator, denominator = parameter_distances(unlearned, retrained, original)
        self.numerator += numerator.square().to(self.numerator.device)
        self.denominator += denominator.square().to(self.denominator.device)

    def compute(self) -> Tensor:
        return _relative(self.numerator.sqrt(), self.denominator.sqrt())


class _MeanMetric(Metric):
    """Mean of one number per sample, exact over batches and processes: a sum and a count."""

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, terms: Tensor) -> None:
        self.total += terms.detach().double().sum()
        self.count += terms.numel()

    def compute(self) -> Tensor:
        return self.total / self.count if int(self.count) else torch.full_like(self.total, math.nan)


class Accuracy(_MeanMetric):
    """:func:`accuracy` over batches; feed clean logits for clean accuracy, adversarial ones for robust accuracy.

    >>> metric = Accuracy()
    >>> metric.update(torch.tensor([0.3, -0.2]), torch.tensor([1.0, 1.0]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def update(self, logits: Tensor, y: Tensor) -> None:
        self._add(correct_predictions(logits, y))


class AccuracyGap(_MeanMetric):
    """:func:`accuracy_gap` over batches, in points; the sign says who is more accurate.

    >>> metric = AccuracyGap()
    >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    >>> metric.compute()
    tensor(-100., dtype=torch.float64)
    """

    higher_is_better = None

    def update(self, logits: Tensor, reference_logits: Tensor, y: Tensor) -> None:
        gain = correct_predictions(logits, y).double() - correct_predictions(reference_logits, y).double()
        self._add(100 * gain)


class Agreement(_MeanMetric):
    """:func:`agreement` with the reference (retrained) model over batches.

    >>> metric = Agreement()
    >>> metric.update(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 0.0]]))
    >>> metric.compute()
    tensor(1., dtype=torch.float64)
    """

    higher_is_better = True

    def update(self, logits: Tensor, reference_logits: Tensor) -> None:
        self._add(predicted_classes(logits) == predicted_classes(reference_logits))


class PredictionKL(_MeanMetric):
    """:func:`prediction_kl` from the reference (retrained) model's probabilities over batches.

    >>> metric = PredictionKL()
    >>> metric.update(torch.zeros(2, 3), torch.zeros(2, 3))
    >>> bool(metric.compute() == 0)
    True
    """

    higher_is_better = False

    def update(self, logits: Tensor, reference_logits: Tensor) -> None:
        self._add(prediction_kl_terms(logits, reference_logits))
