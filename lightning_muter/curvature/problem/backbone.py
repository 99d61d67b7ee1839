"""phi, everything before the head: its form as a function of the input, and its derivatives in the module's own precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.head import Head, eval_mode, features
from lightning_muter.model.layout import ChannelsLast
from lightning_muter.model.modes import (
    algebra_dtype,
    calls_own_functions,
    derivatives,
    lacks_forward_mode,
    no_second_derivative,
    second_derivative_vanishes,
    slope_moves,
    twice_differentiable,
    widened,
    working_dtype,
)
from lightning_muter.model.reading import Reading

#: An affine backbone is represented by its matrix up to this many numbers.
_MAX_LINEAR = 20_000_000

#: Samples at a time on a processor.
_AT_A_TIME = 128

#: Forward-mode products, or reverse passes, taken together.
_TANGENTS = 6


def in_parts(rows: Tensor) -> tuple[Tensor, ...]:
    """As many rows at a time as run fastest: on a processor those that its caches hold, on a device all.

    >>> [len(part) for part in in_parts(torch.zeros(300, 2))]
    [128, 128, 44]
    """
    return rows.split(_AT_A_TIME) if rows.device.type == "cpu" else (rows,)


class Backbone:
    """phi, with what is known about its shape as a function of the input.

    Attributes:
        matrix: J (f, D) when phi(x) = J x + c for all x; ``None`` otherwise.
        identity: J = I, c = 0 exactly.
        piecewise_linear: d2 phi/dx2 = 0 wherever it exists (affine included): then the input Hessian of the loss is
            exactly J^T W^T Lambda W J.
        curved: d2 phi/dx2 can be computed (functions that are differentiable once have Gauss-Newton input Hessians).

    16-bit modules run in float32, at the same weights.
    """

    def __init__(self, module: nn.Module, head: Head, examples: Tensor, reading: Reading | None = None) -> None:
        self.module, self.head, self.reading = module, head, reading
        self.input_shape = tuple(examples.shape[1:])
        self.width = head.linear.in_features
        self.inputs = examples[0].numel()
        self.device, self.dtype = head.linear.weight.device, working_dtype(head.linear.weight.dtype)
        self.algebra = algebra_dtype(self.device)
        self.matrix: Tensor | None = None
        self.offset: Tensor | None = None
        self.identity = False
        self.curved, self._rewritten, self._values = True, False, widened(module)
        self._layout = ChannelsLast(module)
        flat = examples.reshape(len(examples), -1).to(self.device, self.dtype)
        try:
            self._recognise(flat)
        except RuntimeError as error:
            if self._values is None:
                raise
            raise UnsuitableError(
                f"The model is in {head.linear.weight.dtype} and cannot be run in {self.dtype}, in which its features are "
                f"computed ({str(error).splitlines()[0]}). Let its forward follow the dtype of its input, or train in mixed "
                "precision."
            ) from error
        self.piecewise_linear = self.affine or self._is_piecewise_linear(flat)

    @property
    def affine(self) -> bool:
        return self.identity or self.matrix is not None

    @property
    def exact_dtype(self) -> torch.dtype:
        """The dtype in which phi is evaluated: float64 algebra for affine maps, else the module's own."""
        return self.algebra if self.affine else self.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """phi at flattened inputs (n, D), with its autograd graph: (n, f) in the algebra's dtype."""
        if self.identity:
            return x.to(self.algebra)
        if self.matrix is not None and self.offset is not None:
            return x.to(self.algebra) @ self.matrix.T + self.offset
        return self._forward(x).to(self.algebra)

    def _forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype).reshape(-1, *self.input_shape)
        with eval_mode(self.module), twice_differentiable(rewritten=self._rewritten):
            parts = [self._features(part) for part in in_parts(x)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def once(self, x: Tensor) -> Tensor:
        """phi in the module's own precision, where first derivatives of one loss are all that is wanted, in the fastest layout.

        (Pooling has no rule for batches of tangents in that layout.)
        """
        with self._layout():
            return self._forward(x)

    def _features(self, x: Tensor) -> Tensor:
        if self.reading is not None:
            return self.reading.features(x, self._values)
        return features(self.module, self.head, x, self._values)

    def _recognise(self, x: Tensor) -> None:
        """Affine maps are told by their values on lines through data points, far beyond the data on both sides."""
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        with derivatives():
            with torch.no_grad():
                at = {t: self._forward(x + t * direction) for t in (0.0, 1.0, -1.0, 5.0)}
            rise = at[1.0] - at[0.0]
            scale = rise.abs().max() + at[0.0].abs().max() + torch.finfo(x.dtype).tiny
            limit = 64 * torch.finfo(x.dtype).eps * scale
            straight = all((at[t] - at[0.0] - t * rise).abs().max() <= limit * (1 + abs(t)) for t in (-1.0, 5.0))
            if not straight or self.width * x.shape[1] > _MAX_LINEAR:
                return
            if self.width == x.shape[1] and all(torch.equal(at[t], x + t * direction) for t in at):
                self.identity = True
                return
            point = x[:1].clone().requires_grad_(True)
            out = self._forward(point)[0]
            rows = [torch.autograd.grad(out[j], point, retain_graph=True)[0][0] for j in range(self.width)]
            matrix = torch.stack(rows).to(self.algebra)
            offset = out.detach().to(self.algebra) - matrix @ point.detach()[0].to(self.algebra)
            predicted = x.to(self.algebra) @ matrix.T + offset
            if (predicted - at[0.0].to(self.algebra)).abs().max() <= limit:
                self.matrix, self.offset = matrix, offset

    def _is_piecewise_linear(self, x: Tensor) -> bool:
        for self._rewritten in (False, True):
            try:
                straight = self._second_derivative_vanishes(x)
            except UnsuitableError:  # an operation without second derivative
                continue
            if not straight or not self._moves(x, own=True):
                return straight
        self.curved, self._rewritten = False, False
        return not self._moves(x)

    def _moves(self, x: Tensor, *, own: bool = False) -> bool:
        """Whether J changes from place to place; ``own``: asked only where a function of the user's makes second derivatives
        doubtful.
        """
        if own:
            with derivatives():
                if not calls_own_functions(self._forward(x.clone().requires_grad_(True))):
                    return False
        ones = torch.ones(len(x), 1, self.width, dtype=self.algebra, device=self.device)
        return slope_moves(lambda at: self.pullback(at, ones)[:, 0], x)

    def _second_derivative_vanishes(self, x: Tensor) -> bool:
        with derivatives():
            return second_derivative_vanishes(self._forward, x)

    def jacobian(self, x: Tensor) -> Tensor:
        """J (n, f, D) at flattened inputs (a view of the one matrix for affine maps): f reverse passes, or D forward ones, which
        are cheaper each.
        """
        if self.identity:
            return torch.eye(self.width, dtype=self.algebra, device=self.device).expand(len(x), -1, -1)
        if self.matrix is not None:
            return self.matrix.expand(len(x), -1, -1)
        eye = torch.eye(min(self.width, self.inputs), dtype=self.algebra, device=self.device).expand(len(x), -1, -1)
        return self.pushforward(x, eye) if self.inputs <= self.width else self.pullback(x, eye)

    def pullback(self, x: Tensor, covectors: Tensor) -> Tensor:
        """C J for covectors C (n, m, f): (n, m, D), by m reverse passes over the batch."""
        if self.identity:
            return covectors
        if self.matrix is not None:
            return covectors @ self.matrix
        with derivatives():
            point = x.detach().clone().requires_grad_(True)
            out = self(point)
            rows = [self._pulled(out, point, part) for part in covectors.movedim(1, 0).split(_TANGENTS)]
        return torch.cat(rows).movedim(0, 1).to(self.algebra)

    def _pulled(self, out: Tensor, point: Tensor, covectors: Tensor) -> Tensor:
        """(m, n, D) for covectors (m, n, f): one batched pass, or m where a layer has no rule for batches."""
        if len(covectors) > 1:
            try:
                return torch.autograd.grad(out, point, covectors, retain_graph=True, is_grads_batched=True)[0]
            except RuntimeError as error:
                if not lacks_forward_mode(error):
                    raise
        return torch.stack([torch.autograd.grad(out, point, c, retain_graph=True)[0] for c in covectors])

    def pushforward(self, x: Tensor, tangents: Tensor) -> Tensor:
        """J V for tangents V (n, D, m): (n, f, m), by m forward-mode products over the batch.

        Layers without forward mode take two reverse passes per product instead, or J itself.
        """
        if self.identity:
            return tangents
        if self.matrix is not None:
            return self.matrix @ tangents
        with derivatives():
            point = x.detach()
            rows = tangents.movedim(2, 0).to(self.dtype)

            def push(t: Tensor) -> Tensor:
                out: Tensor = jvp(self._forward, (point.to(self.dtype),), (t,))[1]
                return out

            try:  # the forward pass itself is shared by the products of a chunk
                with torch.no_grad():
                    pushed = vmap(push, chunk_size=_TANGENTS)(rows)
            except RuntimeError as error:
                if not lacks_forward_mode(error):  # out of memory, a layer's own error, ...
                    raise
                try:
                    pushed = torch.stack(self._pushed_by_reverse(point, list(rows)))
                except RuntimeError as second:
                    if no_second_derivative(second) is None:
                        raise
                    eye = torch.eye(self.width, dtype=self.algebra, device=self.device).expand(len(x), -1, -1)
                    pushed = (self.pullback(x, eye) @ tangents).movedim(2, 0)
        return pushed.detach().movedim(0, 2).to(self.algebra)

    def _pushed_by_reverse(self, x: Tensor, columns: list[Tensor]) -> list[Tensor]:
        point = x.clone().requires_grad_(True)
        out = self(point)
        dummy = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(out, point, dummy, create_graph=True)
        return [torch.autograd.grad(pulled, dummy, t.to(pulled), retain_graph=True)[0] for t in columns]
