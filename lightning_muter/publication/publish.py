"""Certified publication: what is shown of an unlearned model can hardly be told from what retraining would have shown.

With |w_u - w*| <= Delta certified (``unlearn(..., within=Delta)``) and noise N(0, sigma^2 I) of its own on either, releasing w_u is
(eps, delta)-indistinguishable from retraining to w* and releasing that,
for the sigma of :mod:`~lightning_muter.publication.gaussian`.
Delta is fixed before the request and the same for every request: the bound that came out depends on the data and would leak.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_muter.errors import ArgumentError, MismatchError, UnsuitableError
from lightning_muter.publication.gaussian import gaussian_sigma
from lightning_muter.storage.fingerprint import weight_fingerprint
from lightning_muter.unlearning.result import UnlearnResult


@dataclass(frozen=True)
class Publication:
    """What may be shown.

    Attributes:
        module: a copy with noise on ``parameters``. Show its ``state_dict()``; the unlearned model, its snapshot and its bound
            stay private, and each further copy of it is a further release.
        sigma: standard deviation of the noise, per entry, in units of the weights.
        eps: of what this one release is worth against retraining.
        delta: of the same.
        within: Delta, the certified distance that sigma was made for.
        parameters: names of those with noise.

    Example::

        shown = publish(model, result)
        torch.save(shown.module.state_dict(), "shown.pt")
    """

    module: nn.Module
    sigma: float
    eps: float
    delta: float
    within: float
    parameters: tuple[str, ...]


def publish(module: nn.Module, result: UnlearnResult, eps: float = 1.0, delta: float = 1e-5) -> Publication:
    """A copy of an unlearned model with fresh noise: (eps, delta)-indistinguishable from publishing a retrained one alike.

    Args:
        module: as ``unlearn(..., within=Delta)`` left it.
        result: what that call returned.
        eps: of this release. What several are worth together: :func:`~lightning_muter.publication.gaussian.composed_epsilon`.
        delta: of this release; sigma is Delta times :func:`~lightning_muter.publication.gaussian.gaussian_sigma` of 1
            (B. Balle, Y.-X. Wang, *Improving the Gaussian Mechanism for Differential Privacy*, ICML 2018).

    Returns:
        The copy, with what it is worth; the model that was unlearned is left as it is.

    Raises:
        ArgumentError: the request had no ``within``, was a dry run, or eps or delta is out of range.
        MismatchError: the module's weights are not those that the request left.
        UnsuitableError: parameters outside the unlearned ones were trained too; nothing is known of what they keep.

    >>> from torch.utils.data import TensorDataset
    >>> from lightning_muter import ThreatModel, take_snapshot, unlearn
    >>> x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = TensorDataset(x, (x[:, 0] > 0.5).long())
    >>> model = nn.Linear(4, 2)
    >>> snapshot = take_snapshot(model, rows, threat_model=ThreatModel("l2", 0.05), weight_decay=1e-2, progress=False)
    >>> result = unlearn(model, snapshot, [3], rows, retain=rows, within=1e-3, progress=False)
    >>> shown = publish(model, result, eps=1.0, delta=1e-5)
    >>> round(shown.sigma, 5), shown.parameters
    (0.00373, ('weight', 'bias'))
    """
    if not isinstance(result, UnlearnResult):
        raise ArgumentError("result", result, "what unlearn(..., within=Delta) returned")
    if result.within is None or result.bound is None or not result.bound <= result.within:
        raise ArgumentError(
            "result", f"within={result.within}, bound={result.bound}", "a request with a bound below a distance fixed beforehand",
            "Ask with unlearn(..., retain=train_dataset, within=1e-3).",
        )  # fmt: skip
    if result.dry_run:
        raise ArgumentError(
            "result", "a dry run", "a request that was carried out", "The module holds the old weights."
        )
    found = weight_fingerprint(module.state_dict())
    if found != result.fingerprint_after:
        raise MismatchError(
            f"module: its weights are {found[:16]}…, the request left {result.fingerprint_after[:16]}…. Pass the module "
            "that was unlearned, as it was left."
        )
    inside = set(result.parameters)
    left = [name for name, p in module.named_parameters() if p.requires_grad and name not in inside]
    if left:
        raise UnsuitableError(
            f"module: {len(left)} trainable parameters outside of what was unlearned ({', '.join(left[:3])}) would be "
            "published as they are. Freeze them (requires_grad=False) if they were trained on other data."
        )
    sigma = gaussian_sigma(result.within, eps, delta)
    copied = _private_copy(module)
    noisy = with_noise(copied.state_dict(), result.parameters, sigma)
    copied.load_state_dict(noisy)
    return Publication(copied, sigma, eps, delta, result.within, tuple(result.parameters))


def with_noise(weights: Mapping[str, Tensor], names: Sequence[str], sigma: float) -> dict[str, Tensor]:
    """Copies of the weights, those named with N(0, sigma^2) added in float64 and rounded to their own precision.

    The noise begins with 256 bits from the operating system: no seed of the experiment repeats it.

    >>> shown = with_noise({"w": torch.zeros(1000), "mean": torch.ones(2)}, ["w"], sigma=0.1)
    >>> bool(0.08 < shown["w"].std() < 0.12), shown["mean"].tolist()
    (True, [1.0, 1.0])
    """
    generator = np.random.Generator(np.random.PCG64DXSM(secrets.randbits(256)))
    found = {name: value.detach().clone() for name, value in weights.items()}
    for name in names:
        value = found[name]
        noise = torch.from_numpy(generator.normal(0.0, sigma, tuple(value.shape)))
        found[name] = (value.to("cpu", torch.float64) + noise).to(value)
    return found


def _private_copy(module: nn.Module) -> nn.Module:
    """A copy that does not take a trainer (with its data and callbacks) along."""
    trainer = getattr(module, "_trainer", None)
    memo = {} if trainer is None else {id(trainer): None}
    return copy.deepcopy(module, memo)
