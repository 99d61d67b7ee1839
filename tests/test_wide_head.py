"""The statistics of a wide head: chunks do not change them, and the full size stays in time and memory."""

from __future__ import annotations

import resource
import time

import pytest
import torch
import torch.nn.functional as F

from lightning_muter.curvature import total
from lightning_muter.curvature.problem import HeadProblem
from lightning_muter.curvature.response import LocalPoint, NoResponse, Response, Unconstrained
from lightning_muter.curvature.total import Sums, add_gradient, add_hessian
from lightning_muter.models import SoftmaxRegression
from lightning_muter.threat import ThreatModel


def statistics(n: int, width: int, response: Response, batch: int = 1024) -> Sums:
    """Sums of a softmax head on given features."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64).relu()
    y = torch.randint(0, 10, (n,), generator=generator)
    torch.manual_seed(0)
    problem = HeadProblem(SoftmaxRegression((width,), 10).double(), F.cross_entropy, x[:4])
    theta = problem.read_theta()
    sums = Sums.zeros(problem.shape, problem.dtype, problem.device, hessian=True)
    for at in range(0, n, batch):
        part = x[at : at + batch]
        local = LocalPoint(
            problem, theta, ThreatModel("l2", 0.0, None), part, y[at : at + batch], torch.zeros_like(part)
        )
        add_gradient(sums, local, None)
        add_hessian(sums, local, response, "hessian")
    return sums


@pytest.mark.parametrize("response", [NoResponse(), Unconstrained(5), Unconstrained(5, "inputs")])
def test_chunks_change_nothing(response: Response, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = statistics(50, 7, response)
    monkeypatch.setattr(total, "_WORKSPACE", 1000)
    parts = statistics(50, 7, response)
    assert whole.hessian is not None
    assert parts.hessian is not None
    torch.testing.assert_close(whole.hessian.blocks, parts.hessian.blocks, rtol=1e-12, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("response", [NoResponse(), Unconstrained(100)])
def test_the_head_of_a_wide_resnet_takes_less_than_two_minutes_and_three_gigabytes(response: Response) -> None:
    """n = 10 000 features of length 640, 10 classes: a (6410, 6410) matrix."""
    began = time.perf_counter()
    sums = statistics(10_000, 640, response)
    assert time.perf_counter() - began < 120
    assert sums.hessian is not None
    assert sums.hessian.size == 6410
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3_000_000  # kB
