"""Newton's method for the smoothed maximiser of a linear model over a box, for many samples at once.

With z = A (x + d) the loss sees K numbers alone. The plain step is the fixed-point iteration d <- G(d) = clip(m + A^T r(z) / c),
whose derivative is D A^T Lambda A, with D = 1 / c where G is inside the box and 0 on its faces. Newton's step

    s = b + D A^T Lambda u,        (I - A D A^T Lambda) u = A b,        b = G(d) - d

costs a K x K solve per sample, and ends where the plain iteration takes hundreds of steps (semismooth Newton: L. Qi and J. Sun,
Math. Programming 58, 1993).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_muter.curvature.problem.head import HeadProblem

#: Logits up to which a K x K matrix per sample is held.
LOGITS = 64


class Newton:
    """Newton points of ``n`` iterations in R^D.

    Args:
        x, y: all samples; c: the coefficients of their concave terms (n, D).
    """

    def __init__(self, problem: HeadProblem, theta: Tensor, x: Tensor, y: Tensor, c: Tensor) -> None:
        self.problem, self.theta, self.x, self.y, self.c = problem, theta, x, y, c
        self.jacobian = problem.backbone.pullback(x[:1], problem.weight(theta)[None])[0].to(x)  # A (K, D)
        self._plain = torch.ones(len(x), dtype=torch.bool, device=x.device)  # a plain step comes first
        self._reach = x.new_full((len(x), 1), 0.5)  # share of Newton's step that is tried: doubled while steps rise

    @staticmethod
    def serves(problem: HeadProblem, c: Tensor | None) -> bool:
        return problem.backbone.affine and c is not None and problem.n_logits <= LOGITS

    def mix(self, rows: Tensor, point: Tensor, image: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Newton's points of ``rows`` (images where a plain step is due), and which of them are Newton's.

        Args:
            inside: where the image does not lie on a face of the box (rows, D).
        """
        plain = self._plain[rows]
        self._plain[rows] = False
        if bool(plain.all()):
            return image, ~plain
        reach = self._reach[rows] = (2 * self._reach[rows]).clamp(max=1.0)
        x = self.x[rows] + point
        z = self.problem.logits(self.theta, self.problem.backbone(x))
        hess = self.problem.terms(z, self.y[rows]).hess
        assert hess is not None
        hess, step, a = hess.to(x), image - point, self.jacobian
        free = inside / self.c[rows]
        coupling = (a * free[:, None]) @ a.T  # A D A^T
        eye = torch.eye(len(a), dtype=x.dtype, device=x.device)
        u, _ = torch.linalg.solve_ex(eye - coupling @ hess, (step @ a.T)[:, :, None])
        newton = step + free * ((hess @ u)[:, :, 0] @ a)
        # beside a saddle Newton's step leads down, back to it: away from it instead
        down = (self.c[rows] * step * newton).sum(1, keepdim=True) < 0
        out = point + reach * torch.where(down, -newton, newton)
        good = ~plain & torch.isfinite(out).all(1)
        return torch.where(good[:, None], out, image), good

    def forget(self, rows: Tensor) -> None:
        """The points of these rows were no good: a plain step comes next, and shorter ones after it."""
        self._reach[rows] /= 8
        self._plain[rows] = True
