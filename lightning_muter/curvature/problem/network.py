"""The robust loss of one model as a function of any subset of its parameters.

    l_i(w, delta) = loss(f_w(x_i + delta), y_i)                                                    adversarial training
    l_i(w, delta) = loss(f_w(x_i), y_i) + beta KL(softmax f_w(x_i) || softmax f_w(x_i + delta))    TRADES

w is the flat vector of the chosen parameters (float64), in the order of ``named_parameters()``; everything else in the
module is constant, and it runs in eval mode. Nothing here grows with the number of parameters but a few copies of w.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.errors import ArgumentError, UnsuitableError
from lightning_muter.model.head import eager, eval_mode
from lightning_muter.model.losses import Loss, per_sample
from lightning_muter.model.modes import (
    algebra_dtype,
    calls_own_functions,
    derivatives,
    directional,
    second_derivative_vanishes,
    slope_moves,
    twice_differentiable,
    widened,
    working_dtype,
)
from lightning_muter.model.reading import Reading
from lightning_muter.solvers.eigen import symmetric_eigh

Parameters = dict[str, Tensor]

#: Logit Hessians of up to this many classes are decomposed exactly; beyond it to this rank.
_EXACT_CLASSES, _RANK = 64, 32


def parameters_in(module: nn.Module, scope: str | Sequence[str]) -> list[str]:
    """Names of the trainable parameters that ``scope`` means: "all", or fnmatch patterns over names.

    Raises:
        ArgumentError: a pattern that matches nothing trainable.

    >>> parameters_in(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), ["1.*"])
    ['1.weight', '1.bias']
    """
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    if scope in ("all", ["all"]) and names:
        return names
    patterns = [scope] if isinstance(scope, str) else list(scope)
    idle = [p for p in patterns if not fnmatch.filter(names, p)]
    if idle or not patterns:
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        raise ArgumentError("scope", idle or scope, f"'all' or patterns of trainable parameters ({shown or 'none'})")
    return [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]


@dataclass(frozen=True)
class RobustLoss:
    """The loss of a clean and an adversarial point by their logits z = [adversarial | clean] (clean: TRADES only)."""

    loss: Loss
    beta: float | None = None

    def __post_init__(self) -> None:
        if self.beta is not None and not (isinstance(self.beta, (int, float)) and self.beta > 0):
            raise ArgumentError("trades_beta", self.beta, "a number above 0, or None", "TRADES uses 6.")

    def values(self, z: Tensor, y: Tensor) -> Tensor:
        if self.beta is None:
            return per_sample(self.loss, z, y)
        adversarial, clean = z.chunk(2, 1)
        return per_sample(self.loss, clean, y) + self.beta * _divergence(clean.log_softmax(1), adversarial)

    def inner_values(self, adversarial: Tensor, target: Tensor) -> Tensor:
        """What the adversary raises; ``target``: labels, or clean log-probabilities for TRADES."""
        if self.beta is None:
            return per_sample(self.loss, adversarial, target)
        return self.beta * _divergence(target, adversarial)


def _divergence(log_clean: Tensor, adversarial: Tensor) -> Tensor:
    return F.kl_div(adversarial.log_softmax(1), log_clean, reduction="none", log_target=True).sum(1)


class _Way(nn.Module):
    """Inputs to the head's output, as the module's step goes."""

    def __init__(self, module: nn.Module, reading: Reading) -> None:
        super().__init__()
        self.module = module
        self._logits = reading.logits

    def forward(self, x: Tensor) -> Tensor:
        return self._logits(x)


class WideProblem:
    """A model, its robust loss and the chosen parameters.

    Args:
        module: in any mode; nothing in it is changed but by :meth:`write`.
        scope: "all" or patterns (:func:`parameters_in`).
        beta: of TRADES; None for plain adversarial training.
        examples: a few inputs as the model takes them.
        reading: how the module's own step reaches what its loss takes; None: ``module(x)`` is that.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        scope: str | Sequence[str],
        examples: Tensor,
        beta: float | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.module, self.loss = module, RobustLoss(loss, beta)
        self._way = None if reading is None else _Way(module, reading)
        self.names = parameters_in(module, scope)
        named = dict(module.named_parameters())
        first = named[self.names[0]]
        self.device, self.dtype = first.device, algebra_dtype(first.device)
        self.model_dtype = working_dtype(first.dtype)  # in which it runs
        self.shapes = [named[n].shape for n in self.names]
        self.sizes = [math.prod(s) for s in self.shapes]
        self.size = sum(self.sizes)
        self.input_shape = tuple(examples.shape[1:])
        self.fixed = {n: p.detach() for n, p in named.items() if n not in set(self.names)}
        self.fixed |= {n: t for n, t in (widened(module) or {}).items() if n not in set(self.names)}
        self._rewritten = False
        flat = examples.reshape(len(examples), -1).to(self.device, self.model_dtype)
        # what the inner solver and the responses ask of a backbone
        self.backbone: Any = SimpleNamespace(
            exact_dtype=self.model_dtype,
            affine=False,
            identity=False,
            curved=True,
            piecewise_linear=self._is_piecewise_linear(flat),
        )

    # -- parameters ------------------------------------------------------------------------------------------------

    def read(self) -> Tensor:
        """w (p,) in the algebra's dtype."""
        named = dict(self.module.named_parameters())
        return self.flatten({n: named[n].detach() for n in self.names})

    def parameters(self) -> list[nn.Parameter]:
        """Those in scope, in the order of w."""
        named = dict(self.module.named_parameters())
        return [named[n] for n in self.names]

    @torch.no_grad()
    def write(self, w: Tensor) -> None:
        for parameter, value in zip(self.parameters(), self.split(w).values(), strict=True):
            parameter.copy_(value)

    def split(self, w: Tensor) -> Parameters:
        parts = w.to(self.model_dtype).split(self.sizes)
        return {n: p.reshape(s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}

    def flatten(self, parts: Parameters) -> Tensor:
        return torch.cat([parts[n].reshape(-1).to(self.dtype) for n in self.names])

    # -- functions -------------------------------------------------------------------------------------------------

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Eval mode, eager, autograd on: around every use of :meth:`net`."""
        with derivatives(), eval_mode(self.module), eager(self.module):
            yield

    def net(self, w: Parameters, x: Tensor) -> Tensor:
        """Logits (n, K) at flattened inputs."""
        parameters, x = {**self.fixed, **w}, x.reshape(-1, *self.input_shape)
        with twice_differentiable(rewritten=self._rewritten):
            if self._way is None:
                out: Tensor = functional_call(self.module, parameters, (x,))
            else:
                out = functional_call(self._way, {f"module.{n}": p for n, p in parameters.items()}, (x,))
        return out.reshape(len(x), -1)

    def joint(self, w: Parameters, x: Tensor, delta: Tensor) -> Tensor:
        z = self.net(w, x + delta)
        return z if self.loss.beta is None else torch.cat([z, self.net(w, x)], 1)

    def inner_target(self, w: Parameters, x: Tensor, y: Tensor) -> Tensor:
        """What stays fixed while the adversary moves: y, or the clean log-probabilities."""
        if self.loss.beta is None:
            return y
        with self.ready(), torch.no_grad():
            return self.net(w, x).log_softmax(1)

    def loss_and_input_gradient(self, w: Parameters, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The adversary's loss (n,) and its input gradient (n, D)."""
        with self.ready():
            point = x.detach().clone().requires_grad_(True)
            loss = self.loss.inner_values(self.net(w, point), target)
            (gradient,) = torch.autograd.grad(loss.sum(), point)
        return loss.detach(), gradient

    def input_hessian(self, w: Parameters, x: Tensor, target: Tensor) -> Tensor:
        """d2l/dx2 (n, D, D): D second reverse passes, for smooth networks with small inputs."""
        with self.ready():
            point = x.detach().clone().requires_grad_(True)
            loss = self.loss.inner_values(self.net(w, point), target)
            (gradient,) = torch.autograd.grad(loss.sum(), point, create_graph=True)
            rows = [torch.autograd.grad(gradient[:, j].sum(), point, retain_graph=True)[0] for j in range(x.shape[1])]
        hess = torch.stack(rows, 1)
        return (hess + hess.mT) / 2

    def curvature_root(self, w: Parameters, x: Tensor, target: Tensor) -> Tensor:
        """R (n, D, m), R R^T the Gauss-Newton d2l/dx2: one reverse pass per class, or its largest part beyond 64."""
        with self.ready():
            point = x.detach().clone().requires_grad_(True)
            z = self.net(w, point)
            if z.shape[1] > _EXACT_CLASSES:
                return self._nystrom_root(w, x.detach(), z.detach(), target)
            root = self._logit_root(z.detach(), target)
            m = root.shape[2]
            columns = [torch.autograd.grad(z, point, root[:, :, j], retain_graph=j + 1 < m)[0] for j in range(m)]
        return torch.stack(columns, 2)

    def _logit_root(self, z: Tensor, target: Tensor) -> Tensor:
        def one(zi: Tensor, ti: Tensor) -> Tensor:
            return self.loss.inner_values(zi[None], ti[None]).sum()

        values, vectors = symmetric_eigh(vmap(jacrev(grad(one)))(z, target).detach().to(self.dtype))
        root = vectors * values.clamp(min=0.0).sqrt()[:, None, :]
        used = values.amax(0) > 1e-14 * values.abs().max()  # softmax: one direction less
        return root[:, :, used].to(z) if bool(used.any()) else root[:, :, -1:].to(z)

    def _nystrom_root(self, w: Parameters, x: Tensor, z: Tensor, target: Tensor) -> Tensor:
        """Nystrom by 2 x 32 products with H = J^T Lambda J (exact up to 32 inputs): R = Y (Q^T Y)^-1/2, Y = H Q."""

        def slope(at: Tensor) -> Tensor:
            return grad(lambda t: self.loss.inner_values(t, target).sum())(at)

        def times(columns: Tensor) -> Tensor:
            out = []
            for column in columns.unbind(2):
                _, turned = directional(lambda at: self.net(w, at), (x,), (column,))
                _, pull = directional(slope, (z,), (turned.detach(),))
                point = x.clone().requires_grad_(True)
                out.append(torch.autograd.grad(self.net(w, point), point, pull.detach())[0])
            return torch.stack(out, 2)

        rank = min(_RANK, x.shape[1])
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(x.shape[1], rank, generator=generator, dtype=torch.float64).to(x).expand(len(x), -1, -1)
        basis = torch.linalg.qr(times(torch.linalg.qr(basis)[0].contiguous()))[0]
        image = times(basis)
        values, vectors = symmetric_eigh((basis.mT @ image + image.mT @ basis) / 2)
        floor = 1e3 * torch.finfo(x.dtype).eps * values[:, -1:]
        inverse = torch.where(values > floor, values.clamp(min=torch.finfo(x.dtype).tiny).rsqrt(), values.new_zeros(()))
        return image @ (vectors * inverse[:, None, :])

    def _is_piecewise_linear(self, x: Tensor) -> bool:
        """Raises UnsuitableError: an operation has no second derivative and cannot be written otherwise."""
        try:
            straight = self._second_derivative_vanishes(x)
        except UnsuitableError:
            self._rewritten = True
            straight = self._second_derivative_vanishes(x)
        if straight and self._claims_too_much(x):
            raise UnsuitableError(
                "The model calls a torch.autograd.Function that is differentiable once only: beyond the head, curvature "
                "needs its second derivative. Write its backward with differentiable operations, or use scope='head'."
            )
        return straight

    def _claims_too_much(self, x: Tensor) -> bool:
        """Whether a vanishing second derivative is a function's of the user's that has none."""
        w = self.split(self.read())

        def slope(at: Tensor) -> Tensor:
            point = at.clone().requires_grad_(True)
            return torch.autograd.grad(self.net(w, point).sum(), point)[0]

        with self.ready():
            return calls_own_functions(self.net(w, x.clone().requires_grad_(True))) and slope_moves(slope, x)

    def _second_derivative_vanishes(self, x: Tensor) -> bool:
        w = self.split(self.read())
        with self.ready():
            return second_derivative_vanishes(lambda point: self.net(w, point), x)


class WidePoint(LocalPoint):
    """Samples at their maximisers; ``problem`` is a `WideProblem`, ``theta`` its parameters, ``y`` the inner target."""

    @cached_property
    def phi(self) -> Tensor:  # responses look at its dtype
        return self.at.detach()

    @cached_property
    def input_gradient(self) -> Tensor:
        return self.problem.loss_and_input_gradient(self.theta, self.at, self.y)[1]

    @cached_property
    def root(self) -> Tensor:
        wide: Any = self.problem
        found: Tensor = wide.curvature_root(self.theta, self.at, self.y)
        return found
