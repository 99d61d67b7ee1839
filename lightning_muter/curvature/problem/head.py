"""The robust objective's pieces for one model: backbone, head and loss on logits.

    z = W phi(x) + b,      r = dl/dz (K,),      Lambda = d2l/dz2 (K, K)

The head lives here as one matrix theta = [W | b] of shape (K, f + 1) ((K, f) without a bias); its row-major flattening is
the order of every vector and matrix of statistics. The backbone runs in the module's dtype, the head's algebra in
float64 wherever the device has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from lightning_muter.curvature.problem.backbone import Backbone
from lightning_muter.model.head import find_head
from lightning_muter.model.losses import Loss, is_cross_entropy, per_sample
from lightning_muter.model.modes import (
    derivatives,
    lacks_forward_mode,
)
from lightning_muter.model.reading import Reading
from lightning_muter.model.rowwise import hessians
from lightning_muter.solvers.eigen import symmetric_eigh


@dataclass(frozen=True)
class LogitTerms:
    """Per sample: loss (n,), r = dl/dz (n, K), and Lambda = d2l/dz2 (n, K, K) where asked for."""

    loss: Tensor
    r: Tensor
    hess: Tensor | None = None


class HeadProblem:
    """Loss, gradient and curvature of the head, and the input gradient through the backbone.

    Args:
        module: the model in any mode; nothing in it is changed.
        loss: ``callable(logits, y, reduction="none")``.
        examples: a few inputs as the model takes them, to find the head and to recognise the backbone's form.
        reading: how the module's own step reaches the head; None: as ``module(x)`` does, giving the logits.
    """

    def __init__(self, module: nn.Module, loss: Loss, examples: Tensor, reading: Reading | None = None) -> None:
        parameter = next(module.parameters())
        self.module, self.loss = module, loss
        examples = examples.to(parameter.device, parameter.dtype)
        self.head = find_head(module, examples) if reading is None else reading.head
        self.backbone = Backbone(module, self.head, examples, reading)
        self.device, self.dtype = self.backbone.device, self.backbone.algebra
        self.n_logits, self.has_bias = self.head.linear.out_features, self.head.linear.bias is not None
        self.shape = (self.n_logits, self.backbone.width + int(self.has_bias))

    # -- the head's parameters -------------------------------------------------------------------------------------

    def read_theta(self) -> Tensor:
        """[W | b] of the module, (K, f + 1)."""
        linear = self.head.linear
        columns = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
        return torch.cat([c.detach().to(self.dtype) for c in columns], 1)

    @torch.no_grad()
    def write_theta(self, theta: Tensor) -> None:
        """Write [W | b] into the module (rounded to its dtype)."""
        linear = self.head.linear
        linear.weight.copy_(theta[:, : self.backbone.width])
        if linear.bias is not None:
            linear.bias.copy_(theta[:, -1])

    def rounded(self, theta: Tensor) -> Tensor:
        """What is left of theta in the module's dtype."""
        return theta.to(self.head.linear.weight.dtype).to(self.dtype)

    def weight(self, theta: Tensor) -> Tensor:
        return theta[:, : self.backbone.width]

    def logits(self, theta: Tensor, phi: Tensor) -> Tensor:
        z = phi @ self.weight(theta).T
        return z + theta[:, -1] if self.has_bias else z

    def augment(self, phi: Tensor) -> Tensor:
        """phi with a 1 for the bias: dl/dtheta = r phi~^T."""
        return torch.cat([phi, phi.new_ones(len(phi), 1)], 1) if self.has_bias else phi

    # -- the loss on logits ----------------------------------------------------------------------------------------

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        return per_sample(self.loss, z, y)

    def terms(self, z: Tensor, y: Tensor, weight: Tensor | None = None, *, curvature: bool = True) -> LogitTerms:
        """Loss, r and Lambda at logits (n, K), times the sample weights; by autodiff, but for Lambda of cross entropy."""
        with derivatives():
            z = z.detach()
            point = z.clone().requires_grad_(True)
            loss = self.losses(point, y)
            (r,) = torch.autograd.grad(loss.sum(), point)
            hess = None
            if curvature and self._plain_softmax(y):
                hess = softmax_curvature(z)
                hess = torch.where((r != 0).any(1)[:, None, None], hess, 0.0)  # not of labels that are ignored
            elif curvature:

                def one(zi: Tensor, yi: Tensor) -> Tensor:
                    return per_sample(self.loss, zi[None], yi[None]).sum()

                try:
                    hess = vmap(jacrev(grad(one)))(z, y).detach()
                    hess = (hess + hess.mT) / 2
                except RuntimeError as error:  # rows selected by a mask, ...
                    if not lacks_forward_mode(error):
                        raise
                    hess = hessians(lambda at: self.losses(at, y), z)
        loss = loss.detach()
        if weight is not None:
            loss, r = loss * weight, r * weight[:, None]
            hess = None if hess is None else hess * weight[:, None, None]
        return LogitTerms(loss, r, hess)

    def _plain_softmax(self, y: Tensor) -> bool:
        return self.n_logits > 1 and is_cross_entropy(self.loss) and y.dim() == 1 and not y.is_floating_point()

    def loss_and_input_gradient(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """l (n,) and dl/dx (n, D) at flattened inputs."""
        if self.backbone.affine:
            terms = self.terms(self.logits(theta, self.backbone(x)), y, curvature=False)
            return terms.loss, self.backbone.pullback(x, (terms.r @ self.weight(theta))[:, None])[:, 0]
        with derivatives():
            point = x.detach().clone().requires_grad_(True)
            loss = self.losses(self.logits(theta, self.backbone(point)), y)
            (gradient,) = torch.autograd.grad(loss.sum(), point)
        return loss.detach(), gradient

    def input_hessian(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """d2l/dx2 (n, D, D) by D second reverse passes: for smooth backbones with small inputs."""
        with derivatives():
            point = x.detach().clone().requires_grad_(True)
            loss = self.losses(self.logits(theta, self.backbone(point)), y)
            (gradient,) = torch.autograd.grad(loss.sum(), point, create_graph=True)
            rows = [
                torch.autograd.grad(gradient[:, j].sum(), point, retain_graph=j + 1 < x.shape[1])[0]
                for j in range(x.shape[1])
            ]
        hess = torch.stack(rows, 1).to(self.dtype)
        return (hess + hess.mT) / 2

    def differentiated(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, LogitTerms, Tensor]:
        """phi, terms of the loss on logits, and dl/dx at flattened inputs, by one forward and one reverse pass."""
        with derivatives():
            point = x.detach().clone().requires_grad_(True)
            phi = self.backbone(point)
            terms = self.terms(self.logits(theta, phi.detach()), y)
            (gradient,) = torch.autograd.grad(phi, point, terms.r @ self.weight(theta))
        return phi.detach(), terms, gradient.to(self.dtype)

    def curvature_root(
        self, theta: Tensor, x: Tensor, hess: Tensor, jacobian: Tensor | None = None, directions: int | None = None
    ) -> Tensor:
        """R = J^T W^T L with L L^T = Lambda (negative eigenvalues cut, directions
        without curvature left out): (n, D, m), m <= K; R R^T is the Gauss-Newton d2l/dx2. Given J (n, f, D), without passes.

        ``directions``: so many of each sample's, those of the most curvature; a pass over the backbone each.
        """
        values, vectors = symmetric_eigh(hess)
        root = vectors * values.clamp(min=0.0).sqrt()[:, None, :]
        used = values.amax(0) > 1e-14 * values.abs().max()  # softmax: one direction less, and one pass
        root = root[:, :, used] if bool(used.any()) else root[:, :, -1:]
        root = root[:, :, -directions:] if directions else root  # eigenvalues ascend
        covectors = root.mT @ self.weight(theta)
        return (self.backbone.pullback(x, covectors) if jacobian is None else covectors @ jacobian).mT


def softmax_curvature(z: Tensor) -> Tensor:
    """d2/dz2 of cross entropy with class labels at logits z (n, K): diag(p) - p p^T, p = softmax(z); (n, K, K).

    >>> softmax_curvature(torch.zeros(1, 2))
    tensor([[[ 0.2500, -0.2500],
             [-0.2500,  0.2500]]])
    """
    p = z.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
