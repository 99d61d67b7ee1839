"""Responses of the inner maximiser: K = d(delta*)/d(dl/dx), so that d(delta*)/dw = K d2l/dxdw.

A head's total Hessian needs K only through the head's input: G = J K J^T (f, f), J = d phi/dx. Every response gives a
*Gram* of the samples at hand, `None` where delta* does not move.

`none`          K = 0
`unconstrained` K = -(d2l/dx2)^-1 by the truncated series sum_{j<T} (I - d2l/dx2)^j (Liu et al., MUter, ICCV 2023)
`l2`            ball and box: K = (P (mu I - d2l/dx2) P)^+, P onto the free coordinates and, where the ball binds, across delta
`linf`          K = (C_FF - d2l/dx2_FF)^-1 on the coordinates F inside their range, C of `curvature.inner`; where the input
                curvature is diagonal this is  K_jj = width_j kappa(s_j),  kappa the box kernel of the switch s_j
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import ClassVar

from lightning_muter.curvature.problem.backbone import Backbone
from lightning_muter.curvature.problem.point import LocalPoint
from lightning_muter.curvature.response.operators import Motion
from lightning_muter.curvature.response.pullback import Gram
from lightning_muter.extension import Extensible


class Response(Extensible, ABC):
    """How the maximisers move with the weights: K (D, D) with d delta* / dw = K d2l/dxdw, delta* (D,) the maximiser of a sample.

    Extend by subclassing, with a ``name`` of its own and every argument of its constructor kept as an attribute: snapshots store
    both, and whoever loads one imports the module of the subclass first.

    Attributes:
        uses_gradient: input gradients are asked for.
        norm: the norm whose constraint it knows; None: it knows of none.

    >>> sorted(Response.known())
    ['l2', 'linf', 'none', 'unconstrained']
    """

    @property
    def forms_squares(self) -> bool:
        """Whether :meth:`gram` holds a matrix of the size of features x features (or inputs) for every sample."""
        return True

    @abstractmethod
    def gram(self, local: LocalPoint, counts: Counter[str]) -> Gram | None:
        """G = J K J^T (f, f) of every sample, J = d phi/dx (f, D): what the head's total Hessian needs.

        Args:
            local: samples, their maximisers and the derivatives of the loss there.
            counts: what happened, by name: free and bound coordinates, systems that were singular, ...

        Returns:
            The Gram of these samples, `None` if no maximiser moves.
        """

    @abstractmethod
    def motion(self, local: LocalPoint, counts: Counter[str]) -> Motion | None:
        """K itself, as an operator on inputs: what scopes beyond the head need.

        Args:
            local: samples, their maximisers and the derivatives of the loss there.
            counts: what happened, by name.

        Returns:
            (n, D) -> (n, D), `None` if no maximiser moves.
        """

    def resolved(self, backbone: Backbone, count: int) -> Response:
        """With every choice made that depends on the number of samples: what is stored with their sums.

        Args:
            backbone: of the model.
            count: samples.
        """
        return self

    uses_gradient: ClassVar[bool] = False
    norm: ClassVar[str | None] = None


class NoResponse(Response):
    """K = 0: the direct Hessian alone (ordinary second-order unlearning)."""

    name = "none"

    @property
    def forms_squares(self) -> bool:
        """It holds nothing."""
        return False

    def gram(self, local: LocalPoint, counts: Counter[str]) -> Gram | None:
        """None: nothing moves."""
        return None

    def motion(self, local: LocalPoint, counts: Counter[str]) -> Motion | None:
        """None: nothing moves."""
        return None
