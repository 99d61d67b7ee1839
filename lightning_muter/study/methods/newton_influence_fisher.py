"""The published closed forms that take the perturbed (or the clean) inputs as fixed: Newton, influence, Fisher.

With the forgotten samples U (k of them), R what is left of D, everything at the trained w:

    w_u = w + (C + m Lambda_d)^-1 ( sum_U grad l_i + k Lambda_d w )

    Newton      C = sum_R of the Hessians, m = |R|
                C. Guo et al., "Certified Data Removal from Machine Learning Models", ICML 2020
    influence   C = sum_D of the Hessians, m = |D|
                P. W. Koh, P. Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017
    Fisher      C = sum_R of (r r^T) x (phi phi^T), m = |R|
                A. Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020

Plain: losses and derivatives at the clean inputs. With delta: at the adversarial inputs (Liu et al., ICCV 2023).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.hessian.direct import Curvature
from lightning_muter.curvature.hessian.sums import BlockSymmetric, Sums, add_gradient, add_hessian
from lightning_muter.curvature.inner.maximiser import InnerSolver
from lightning_muter.curvature.problem.head import HeadProblem
from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.choose import NoResponse
from lightning_muter.errors import ArgumentError, SolveError
from lightning_muter.study.methods.base import Competitor, Outcome, State, head_outcome
from lightning_muter.study.models.base import Classifier
from lightning_muter.study.setup.problem import World

BATCH = 512


@dataclass
class Stored:
    """Sum of the direct Hessians of all samples at the trained head, (K q, K q) in blocks."""

    hessian: BlockSymmetric
    theta: Tensor


class ClosedForm(Competitor):
    """One step with the curvature at fixed inputs.

    Args:
        points: "adversarial" (the delta variants) or "clean".
        curvature: "hessian" or "fisher".
        remaining: True for the curvature of what is left (Newton, Fisher), False for that of all samples (influence).
    """

    default_label = "Newton"

    def __init__(
        self,
        points: Literal["adversarial", "clean"] = "clean",
        curvature: Curvature = "hessian",
        remaining: bool = True,
        label: str | None = None,
    ) -> None:
        super().__init__(label)
        if points not in ("adversarial", "clean"):
            raise ArgumentError("points", points, "'adversarial' or 'clean'")
        self.points, self.curvature, self.remaining = points, curvature, remaining

    def start(self, world: World) -> State:
        began = time.perf_counter()
        model = world.copy_model()
        sums, theta = self.sums(world, model, list(range(len(world.data))), hessian=True)
        assert sums.hessian is not None
        blocks = sums.hessian.blocks
        size = blocks.numel() * blocks.element_size()
        return State(world, model, time.perf_counter() - began, size, Stored(sums.hessian, theta))

    def sums(self, world: World, model: Classifier, positions: list[int], *, hessian: bool) -> tuple[Sums, Tensor]:
        """Gradient and (where asked for) curvature sums of some samples at the head of ``model``."""
        first, _ = world.tensors(positions[:2] if len(positions) > 1 else [positions[0]] * 2)
        problem = HeadProblem(model, world.loss, first)
        theta = problem.read_theta()
        threat = (
            world.threat
            if world.threat is not None and self.points == "adversarial"
            else ThreatModel("linf", 0.0, None)
        )
        total = Sums.zeros(problem.shape, problem.dtype, problem.device, hessian=hessian)
        for begin in range(0, len(positions), BATCH):
            x, y = world.tensors(positions[begin : begin + BATCH])
            x = x.flatten(1).to(problem.backbone.exact_dtype)
            delta = InnerSolver().solve(problem, theta, threat, x, y).delta
            local = LocalPoint(problem, theta, threat, x, y, delta)
            add_gradient(total, local, None)
            if hessian:
                add_hessian(total, local, NoResponse(), self.curvature)
        return total, theta

    def answer(self, state: State, request: list[int], forgotten: list[int]) -> Outcome:
        world, stored = state.world, state.stored
        assert isinstance(state.model, Classifier)
        start = world.copy_model()  # always from the trained weights, with all that was forgotten so far
        gone, theta = self.sums(world, start, forgotten, hessian=self.remaining)
        curvature, count = stored.hessian, len(world.data)
        if self.remaining:
            assert gone.hessian is not None
            curvature, count = curvature.minus(gone.hessian), count - len(forgotten)
        matrix = curvature.dense()
        matrix.diagonal().add_(count * world.weight_decay)
        right = (gone.gradient + len(forgotten) * world.weight_decay * theta).reshape(-1)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise SolveError(
                f"{self.label}: the curvature is not positive definite (Cholesky stops at row {int(info)}). "
                "Raise weight_decay."
            )
        step = torch.cholesky_solve(right[:, None], factor)[:, 0]
        residual = float((matrix @ step - right).norm() / right.norm().clamp(min=1e-300))
        new = theta + step.reshape(theta.shape)
        with torch.no_grad():
            state.model.head.weight.copy_(new[:, :-1])
            state.model.head.bias.copy_(new[:, -1])
        outcome = head_outcome(state.model, status="converged", residual=residual)
        outcome.seconds = math.nan
        return outcome
