"""Anderson acceleration of a fixed-point iteration d <- G(d), for many small problems at once.

With f = G(d) - d and the last differences Df, DG of f and G as columns, the next point is

    G(d) - DG gamma,      gamma = argmin |f - Df gamma|

(D. G. Anderson, J. ACM 12, 1965; Walker and Ni, SIAM J. Numer. Anal. 49, 2011): near the end as fast as GMRES.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Anderson:
    """Memories of ``n`` iterations in R^D.

    Args:
        like: (n, D), for size, dtype and device.
        depth: differences kept.
    """

    def __init__(self, like: Tensor, depth: int = 5) -> None:
        n, width = like.shape
        self.depth = depth
        self._steps = like.new_zeros(depth, n, width)  # Df
        self._images = like.new_zeros(depth, n, width)  # DG
        self._step, self._image = torch.zeros_like(like), torch.zeros_like(like)
        self._known = torch.zeros(n, dtype=torch.long, device=like.device)  # points seen since the last `forget`

    def mix(self, rows: Tensor, point: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The accelerated points of ``rows`` (images where nothing is known yet), and which of them are accelerated."""
        step = image - point
        known = self._known[rows]
        again = rows[known > 0]
        if len(again):
            at = (self._known[again] - 1) % self.depth
            self._steps[at, again] = step[known > 0] - self._step[again]
            self._images[at, again] = image[known > 0] - self._image[again]
        self._step[rows], self._image[rows] = step, image
        self._known[rows] += 1
        mixed = known > 0
        if not bool(mixed.any()):
            return image, mixed
        change = self._steps[:, rows].movedim(0, 1)  # (rows, depth, D)
        gram = change @ change.mT
        size = gram.diagonal(dim1=1, dim2=2).amax(1).clamp(min=torch.finfo(step.dtype).tiny)[:, None, None]
        # a slight ridge: differences grow nearly parallel, and slots not used yet are zero
        ridge = 1e-12 if step.dtype == torch.float64 else 1e-6
        eye = torch.eye(self.depth, dtype=step.dtype, device=step.device)
        gamma = torch.linalg.solve(gram / size + ridge * eye, (change @ step[:, :, None]) / size)
        out = image - (gamma.mT @ self._images[:, rows].movedim(0, 1))[:, 0]
        good = mixed & torch.isfinite(out).all(1)
        return torch.where(good[:, None], out, image), good

    def forget(self, rows: Tensor) -> None:
        """Start anew: the points of these rows were no good."""
        self._known[rows] = 0
        self._steps[:, rows] = 0
        self._images[:, rows] = 0
