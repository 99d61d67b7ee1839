"""The robust minimiser of a linear model with one logit in L-infinity, nothing smoothed: the largest loss has a closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def robust_minimum(x: Tensor, sign: Tensor, eps: float, decay: float, of: Any) -> Tensor:
    """(w, b) that minimises the mean of of(sign (w x + b), eps |w|_1) with the penalty: L-infinity, one logit, nothing smoothed."""
    w = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    for width in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):  # of |.|, from which the next starts
        search = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def value(width: float = width, search: Any = search) -> Tensor:
            search.zero_grad()
            reach = eps * (w[:-1].square() + width**2).sqrt().sum()
            total = of(sign * (x @ w[:-1] + w[-1]), reach, width).mean() + decay / 2 * w.square().sum()
            total.backward()
            return total

        search.step(value)
    return w.detach()


ONE_LOGIT = {
    "BCE": (nn.BCEWithLogitsLoss(), lambda margin, reach, _: F.softplus(reach - margin)),
    "MSE": (nn.MSELoss(), lambda margin, reach, width: (((margin - 1).square() + width**2).sqrt() + reach).square()),
}
