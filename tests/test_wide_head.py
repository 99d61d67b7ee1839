"""The statistics of a head on given features: chunks do not change them, the published series, and a wide head in little memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian import sums as total
from lightning_muter.curvature.hessian.sums import Sums, add_gradient, add_hessian
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.choose import NoResponse, Response, Unconstrained
from lightning_muter.study.models import SoftmaxRegression


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


def test_the_truncated_series_tends_to_the_inverse_where_it_converges() -> None:
    """Two features and four classes: d2l/dphi2 = W^T Lambda W has full rank; scaled to eigenvalues in (0, 2), the series of
    the published response sums to -(d2l/dphi2)^-1, and its indirect part to the exact Schur complement.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 2, generator=generator, dtype=torch.float64) - 0.5
    y = torch.randint(0, 4, (6,), generator=generator)
    problem = HeadProblem(SoftmaxRegression((2,), 4).double(), F.cross_entropy, x[:4])
    corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    theta = torch.cat([corners, torch.linspace(-0.2, 0.2, 4, dtype=torch.float64)[:, None]], 1)
    weight = problem.weight(theta)
    p = torch.softmax(x @ weight.T + theta[:, -1], 1)
    hess = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    top = torch.linalg.eigvalsh(weight.T @ hess @ weight)
    assert 0.2 < float(top.min()) < float(top.max()) < 1.9, top  # constructed: it converges

    def total_hessian(terms: int) -> torch.Tensor:
        local = LocalPoint(problem, theta, ThreatModel("l2", 0.0, None), x, y, torch.zeros_like(x))
        sums = Sums.zeros(problem.shape, problem.dtype, problem.device, hessian=True)
        add_hessian(sums, local, Unconstrained(terms), "hessian")
        assert sums.hessian is not None
        return sums.hessian.dense()

    exact = torch.zeros_like(total_hessian(1))
    for a, t in zip(x, y, strict=True):

        def loss(v: torch.Tensor, a: torch.Tensor = a, t: torch.Tensor = t) -> torch.Tensor:
            head, at = v[:-2].reshape(problem.shape), a + v[-2:]
            return F.cross_entropy(head[:, :-1] @ at + head[:, -1], t)

        full = torch.func.hessian(loss)(torch.cat([theta.flatten(), torch.zeros(2, dtype=torch.float64)]))
        ww, wx, xx = full[:-2, :-2], full[:-2, -2:], full[-2:, -2:]
        exact += ww - wx @ torch.linalg.solve(xx, wx.T)
    errors = [float((total_hessian(terms) - exact).norm() / exact.norm()) for terms in (3, 10, 100)]
    assert errors[2] < 1e-9, errors
    assert errors[2] < errors[1] < errors[0], errors


_MEASURE = """
import resource, time, torch
from lightning_muter.curvature.response.choose import NoResponse, Unconstrained
from tests.test_wide_head import statistics
began = time.perf_counter()
sums = statistics(10_000, 640, {response})
seconds = time.perf_counter() - began
print(sums.hessian.size, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, torch.get_num_threads())
"""


@pytest.mark.slow
@pytest.mark.parametrize("response", ["NoResponse()", "Unconstrained(100)"])
def test_the_head_of_a_wide_resnet_fits_into_three_gigabytes(response: str) -> None:
    """n = 10 000 features of length 640, 10 classes: a (6410, 6410) matrix, in a process of its own. The time is printed."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE.format(response=response)], capture_output=True, text=True, check=True
    )
    size, seconds, peak, threads = (float(word) for word in done.stdout.split())
    print(f"{response}: {seconds:.1f} s on {threads:.0f} threads, {peak / 1e9:.2f} GB")
    assert size == 6410
    assert peak < 3e9
