"""A user's own response, solver, method and ball, in the module of the user's own model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from userproject import UserNet

from lightning_muter import Method, MUter, Response, Solver
from lightning_muter.adversarial.threat_model import Ball
from lightning_muter.curvature.response.choose import L2Response
from lightning_muter.curvature.response.pullback import DenseGram
from lightning_muter.scope.head_methods import Request, Step
from lightning_muter.solvers.base import Border, Solution


class Share(Response):
    """A share of the constraint-aware response, per class."""

    name = "share"
    norm = "l2"
    uses_gradient = True

    def __init__(self, share: float = 0.5, scale: Tensor | None = None) -> None:
        self.share = share
        self.scale = torch.ones(2, dtype=torch.float64) if scale is None else scale

    def gram(self, local: Any, counts: Counter[str]) -> Any:
        found = L2Response().gram(local, counts)
        return None if found is None else DenseGram(self.share * float(self.scale.mean()) * found.value)

    def motion(self, local: Any, counts: Counter[str]) -> None:
        return None


class Eigen(Solver):
    """By eigenvalues, those below ``floor`` lifted to it."""

    name = "eigen"

    def __init__(self, floor: float = 1e-9) -> None:
        self.floor = floor

    def solve(self, matrix: Tensor, rhs: Tensor, border: Border | None = None) -> Solution:
        values, vectors = torch.linalg.eigh(matrix)
        value = vectors @ ((vectors.T @ rhs) / values.clamp(min=self.floor))
        return Solution(value, "converged", float((matrix @ value - rhs).norm() / rhs.norm()), 1)


class Cautious(Method):
    """A part of the step."""

    name = "cautious"

    def __init__(self, part: float = 1.0) -> None:
        self.part = part

    def step(self, request: Request) -> Step:
        step, now = MUter().step(request), request.problem.read_theta()
        return replace(step, theta=now + self.part * (step.theta - now))


class L1Ball(Ball):
    """sum_j |delta_j| <= eps, without a box."""

    name = "l1"

    def project(self, v: Tensor, lo: Tensor, hi: Tensor, eps: float) -> Tensor:
        size = v.abs()
        order = size.sort(1, descending=True).values
        above = (order.cumsum(1) - eps) / torch.arange(1, v.shape[1] + 1, device=v.device)
        level = torch.where(order > above, above, -torch.inf).amax(1, keepdim=True).clamp(min=0.0)
        return v.sign() * (size - level).clamp(min=0.0)

    def linear_maximiser(self, g: Tensor, lo: Tensor, hi: Tensor, eps: float) -> Tensor:
        return eps * self.direction(g)

    def direction(self, g: Tensor) -> Tensor:
        at = g.abs().argmax(1, keepdim=True)
        return torch.zeros_like(g).scatter(1, at, g.gather(1, at).sign())

    def sample(self, like: Tensor, eps: float) -> Tensor:
        return eps * torch.rand_like(like[:, :1]) * self.direction(torch.randn_like(like))

    def length(self, v: Tensor) -> Tensor:
        return v.abs().sum(1, keepdim=True)


class OwnNet(UserNet):
    """The user's model lies in the same module, so that whoever makes it has imported the rest."""
