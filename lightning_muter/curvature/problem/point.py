"""Samples at their maximisers, and what is known of the model there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.curvature.problem.head import HeadProblem, LogitTerms


@dataclass
class LocalPoint:
    """Samples at their maximisers, with what responses ask of them (computed once, on demand)."""

    problem: HeadProblem
    theta: Tensor
    threat: ThreatModel
    x: Tensor  # clean, flattened (n, D)
    y: Tensor
    delta: Tensor
    c: Tensor | None = None
    positions: Tensor | None = None  # in the dataset: what random signs are keyed by

    @cached_property
    def at(self) -> Tensor:
        return self.x.to(self.delta) + self.delta

    def take(self, rows: slice | Tensor) -> LocalPoint:
        """Some of the samples, with what is known of them."""
        part = LocalPoint(
            self.problem,
            self.theta,
            self.threat,
            self.x[rows],
            self.y[rows],
            self.delta[rows],
            None if self.c is None else self.c[rows],
            None if self.positions is None else self.positions[rows.cpu() if isinstance(rows, Tensor) else rows],
        )
        known = self.__dict__
        part.__dict__.update(
            {name: known[name][rows] for name in ("phi", "input_gradient", "jacobian") if name in known}
        )
        if "terms" in known:
            loss, r, hess = self.terms.loss, self.terms.r, self.terms.hess
            part.__dict__["terms"] = LogitTerms(loss[rows], r[rows], None if hess is None else hess[rows])
        return part

    @cached_property
    def phi(self) -> Tensor:
        with torch.no_grad():
            return self.problem.backbone(self.at)

    def differentiate(self) -> None:
        """Features and input gradient in one pass over the backbone, where both are going to be asked for."""
        if "phi" not in self.__dict__ and not self.problem.backbone.affine:
            self.phi, self.terms, self.input_gradient = self.problem.differentiated(self.theta, self.at, self.y)

    @cached_property
    def terms(self) -> LogitTerms:
        """Unweighted loss, r and Lambda."""
        return self.problem.terms(self.problem.logits(self.theta, self.phi), self.y)

    @cached_property
    def hess(self) -> Tensor:
        assert self.terms.hess is not None
        return self.terms.hess

    @cached_property
    def weight(self) -> Tensor:
        return self.problem.weight(self.theta)

    @cached_property
    def jacobian(self) -> Tensor:
        """J (n, f, D)."""
        return self.problem.backbone.jacobian(self.at)

    @cached_property
    def input_gradient(self) -> Tensor:
        if "jacobian" in self.__dict__:
            return ((self.terms.r @ self.weight)[:, None] @ self.jacobian)[:, 0]
        return self.problem.backbone.pullback(self.at, (self.terms.r @ self.weight)[:, None])[:, 0]

    @cached_property
    def root(self) -> Tensor:
        return self._root(None)

    def leading_root(self, directions: int | None) -> Tensor:
        """R from so many directions of the logits (None: all), by a pass over the backbone each where J is not known."""
        return self.root if directions is None else self._root(directions)

    def _root(self, directions: int | None) -> Tensor:
        jacobian = self.__dict__.get("jacobian")
        return self.problem.curvature_root(self.theta, self.at, self.hess, jacobian, directions)
