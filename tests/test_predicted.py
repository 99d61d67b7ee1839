"""What one step is predicted to leave is what it leaves, within a factor of three; and a request that needs more is told so."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from lightning_muter import ThreatModel, take_snapshot, unlearn

#: Rows with a wrong label, the first ones.
WRONG = 30


def mislabelled() -> TensorDataset:
    digits, generator = load_digits(), torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(digits.target), generator=generator)[:600]
    x, y = torch.tensor(digits.data)[chosen] / 16, torch.tensor(digits.target)[chosen]
    y[:WRONG] = (y[:WRONG] + torch.randint(1, 10, (WRONG,), generator=generator)) % 10
    return TensorDataset(x, y)


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("decay", [1e-3, 1e-2])
def test_the_error_of_one_step_is_predicted_within_a_factor_of_three(decay):
    data, options = mislabelled(), {"threat_model": ThreatModel("l2", 0.3), "weight_decay": decay, "progress": False}
    net = nn.Sequential(nn.Linear(64, 10)).double()
    snapshot = take_snapshot(net, data, **options)
    for rows in (range(WRONG), range(100, 130)):
        retrained, unlearned = deepcopy(net), deepcopy(net)
        take_snapshot(retrained, Subset(data, [i for i in range(600) if i not in rows]), **options)
        result = unlearn(unlearned, deepcopy(snapshot), rows, data, progress=False)
        error = (weights(unlearned) - weights(retrained)).norm() / (weights(net) - weights(retrained)).norm()
        assert 1 / 3 < float(error) / result.quality["predicted_error"] < 3
        told = [w for w in result.warnings if "predicted to end" in w]
        assert bool(told) == (result.quality["predicted_error"] > 0.1)
        steps = result.quality["refine_steps"]
        if steps:
            refined = deepcopy(net)
            unlearn(refined, deepcopy(snapshot), rows, data, retain=data, refine=steps, certify=False, progress=False)
            left = (weights(refined) - weights(retrained)).norm() / (weights(net) - weights(retrained)).norm()
            assert float(left) < 0.03
