"""Kronecker factors of the Gauss-Newton matrix, layer by layer: a preconditioner for conjugate gradients.

For a linear or convolutional layer with inputs a (a 1 appended for the bias) and output derivatives g = J_l^T Lambda^1/2 e,

    sum_i J_i^T Lambda_i J_i  ~  A (x) B,       A = mean over samples and places of a a^T,      B = sum over them of g g^T

(Martens and Grosse, 2015; for convolutions the "expand" form of Eschenhagen et al., 2023). With A = U diag(a) U^T and
B = V diag(b) V^T the damped inverse is exact: V (V^T X U / (b a^T + mu)) U^T. Random signs e, keyed by position, stand for the
columns of Lambda^1/2. Everything else (normalisation, embeddings) gets the mean diagonal of the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap
from torch.nn import functional as F

from lightning_muter.curvature.objective.network import Batch, WideObjective, problem_parts
from lightning_muter.curvature.problem.network import WideProblem
from lightning_muter.curvature.response.sketch import rademacher
from lightning_muter.solvers.eigen import symmetric_eigh

#: Factors up to this side are decomposed; of larger ones the diagonal is used.
_MAX_SIDE = 1100
#: Sign vectors per sample; logits beyond which the derivatives of the loss itself stand for them.
_SIGNS, _MAX_LOGITS = 2, 64
#: Numbers of one unfolded piece of a convolution's input.
_WORKSPACE = 16_000_000


#: Eigenvalues (d,) and vectors (d, d), None for the coordinate axes.
Side = tuple[Tensor, Tensor | None]


@dataclass
class Factor:
    """One side of a Kronecker product: a sum of outer products (d, d), or its diagonal (d,)."""

    total: Tensor
    count: float = 0.0

    @classmethod
    def of_side(cls, side: int, like: Tensor) -> Factor:
        return cls(like.new_zeros((side, side) if side <= _MAX_SIDE else (side,)))

    def add(self, rows: Tensor) -> None:
        """Rows (m, d)."""
        rows = rows.to(self.total)
        self.total += rows.T @ rows if self.total.dim() == 2 else rows.square().sum(0)
        self.count += len(rows)

    def decomposed(self, scale: float) -> Side:
        if self.total.dim() == 1:
            return self.total * scale, None
        values, vectors = symmetric_eigh(self.total)
        return values.clamp(min=0.0) * scale, vectors


class Kronecker:
    """The factors at w and the tracked maximisers of an objective; :meth:`inverse` for any damping.

    Args:
        objective: one pass over its samples (this process's share, summed over processes).
    """

    def __init__(self, objective: WideObjective, w: Tensor) -> None:
        problem = objective.problem
        self.problem, self.decay, self.count = problem, objective.decay, objective.count
        self.layers = _layers(problem)
        first = {n: Factor.of_side(a, w) for n, (a, _) in self.layers.items()}
        second = {n: Factor.of_side(b, w) for n, (_, b) in self.layers.items()}
        covered = {p for n in self.layers for p in self._names(n)}
        self.rest = [n for n in problem.names if n not in covered]
        for batch, _ in objective._batches(problem_parts(problem, w), settle=False):
            self._add(problem_parts(problem, w), batch, first, second)
        counts = w.new_tensor([first[n].count for n in self.layers])
        totals = [t for n in self.layers for t in (first[n].total, second[n].total)]
        objective.reduce([counts, *totals])
        self.factors: dict[str, tuple[Side, Side]] = {}
        for n, seen in zip(self.layers, counts.tolist(), strict=True):
            self.factors[n] = first[n].decomposed(1 / max(seen, 1.0)), second[n].decomposed(1.0)
        means = [float(a.mean() * b.mean()) for (a, _), (b, _) in self.factors.values()]
        self.mean = sum(means) / max(len(means), 1)

    def _names(self, layer: str) -> list[str]:
        prefix = f"{layer}." if layer else ""
        return [prefix + "weight"] + ([prefix + "bias"] if self._biased(layer) else [])

    def _biased(self, layer: str) -> bool:
        prefix = f"{layer}." if layer else ""
        return prefix + "bias" in self.problem.names

    def _add(self, w: dict[str, Tensor], batch: Batch, first: dict[str, Factor], second: dict[str, Factor]) -> None:
        problem = self.problem
        modules = dict(problem.module.named_modules())
        calls: list[tuple[str, Tensor, Tensor]] = []

        def record(name: str) -> Callable[..., None]:
            return lambda module, args, output: calls.append((name, args[0].detach(), output))

        leaves = {n: t.detach().requires_grad_(True) for n, t in w.items()}
        handles = [modules[n].register_forward_hook(record(n)) for n in self.layers]
        try:
            with problem.ready():
                z = problem.joint(leaves, batch.x, batch.delta)
                outputs = [output for _, _, output in calls]
                covectors = _covectors(problem, z.detach(), batch)
                for c in covectors if calls else []:
                    found = torch.autograd.grad(z, outputs, c, retain_graph=True, allow_unused=True)
                    for (name, _, _), slope in zip(calls, found, strict=True):
                        if slope is not None:
                            second[name].add(_places(slope, modules[name]) / len(covectors) ** 0.5)
        finally:
            for handle in handles:
                handle.remove()
        for name, given, _ in calls:
            module = modules[name]
            side = self.layers[name][0]
            for piece in given.split(max(1, _WORKSPACE // max(1, _unfolded_size(given, module)))):
                rows = _patches(piece, module)
                first[name].add(torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if rows.shape[1] < side else rows)

    def inverse(self, shift: float) -> Callable[[Tensor], Tensor]:
        """v -> (blocks + n Lambda_d + shift)^-1 v."""
        problem = self.problem
        tensors = dict(zip(problem.names, self.decay.split(problem.sizes), strict=True))
        shifts = {n: self.count * float(t[0]) + shift for n, t in tensors.items()}
        floor = 1e-8 * max([1e-30, *(float(a[0].max() * b[0].max()) for a, b in self.factors.values())])

        def apply(v: Tensor) -> Tensor:
            parts = dict(zip(problem.names, v.split(problem.sizes), strict=True))
            out = {n: parts[n] / max(self.mean + shifts[n], floor) for n in self.rest}
            for layer, ((a, u), (b, q)) in self.factors.items():
                names = self._names(layer)
                x = parts[names[0]].reshape(len(b), -1)
                if len(names) == 2:
                    x = torch.cat([x, parts[names[1]][:, None]], 1)
                x = x if q is None else q.T @ x
                x = x if u is None else x @ u
                x = x / (b[:, None] * a + max(shifts[names[0]], floor))
                x = x if u is None else x @ u.T
                x = x if q is None else q @ x
                out[names[0]] = (x[:, :-1] if len(names) == 2 else x).reshape(-1)
                if len(names) == 2:
                    out[names[1]] = x[:, -1]
            return torch.cat([out[n] for n in problem.names])

        return apply


def _layers(problem: WideProblem) -> dict[str, tuple[int, int]]:
    """Layers whose weight is in the scope, with the sides of A (bias included) and B."""
    found = {}
    for name, module in problem.module.named_modules():
        prefix = f"{name}." if name else ""
        if prefix + "weight" not in problem.names:
            continue
        plain = isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
        )
        if plain:
            weight = dict(problem.module.named_parameters())[prefix + "weight"]
            extra = int(prefix + "bias" in problem.names)
            found[name] = (weight[0].numel() + extra, weight.shape[0])
    return found


def _covectors(problem: WideProblem, z: Tensor, batch: Batch) -> list[Tensor]:
    """Lambda^1/2 e for sign vectors e, (n, K) each."""

    def one(zi: Tensor, yi: Tensor) -> Tensor:
        return problem.loss.values(zi[None], yi[None]).sum()

    weight = None if batch.weight is None else batch.weight.to(z).clamp(min=0.0).sqrt()[:, None]
    if z.shape[1] > _MAX_LOGITS:
        slopes = [vmap(grad(one))(z, batch.y).detach()]
    else:
        values, vectors = symmetric_eigh(vmap(jacrev(grad(one)))(z, batch.y).detach().to(problem.dtype))
        root = vectors * values.clamp(min=0.0).sqrt()[:, None, :]
        at = torch.arange(len(z)) if batch.positions is None else batch.positions
        signs = [rademacher(1 + s, at, z.shape[1]).to(root) for s in range(_SIGNS)]
        slopes = [(root @ e[:, :, None])[:, :, 0].to(z) for e in signs]
    return slopes if weight is None else [s * weight for s in slopes]


def _places(slope: Tensor, module: nn.Module) -> Tensor:
    """Output derivatives, one row per sample and place."""
    if isinstance(module, nn.Conv2d):
        return slope.movedim(1, -1).reshape(-1, slope.shape[1])
    return slope.reshape(-1, slope.shape[-1])


def _patches(given: Tensor, module: nn.Module) -> Tensor:
    """What one output place is computed from, one row per sample and place."""
    if isinstance(module, nn.Conv2d):
        pad = module.padding
        if isinstance(pad, str):
            total = [
                d * (k - 1) if pad == "same" else 0 for d, k in zip(module.dilation, module.kernel_size, strict=True)
            ]
            left = [t // 2 for t in total]
            given = F.pad(given, (left[1], total[1] - left[1], left[0], total[0] - left[0]))
            pad = (0, 0)
        rows = F.unfold(given, module.kernel_size, module.dilation, pad, module.stride)
        return rows.mT.reshape(-1, rows.shape[1])
    return given.reshape(-1, given.shape[-1])


def _unfolded_size(given: Tensor, module: nn.Module) -> int:
    """Numbers per sample of :func:`_patches`."""
    size = given[0].numel()
    return size * module.kernel_size[0] * module.kernel_size[1] if isinstance(module, nn.Conv2d) else size
