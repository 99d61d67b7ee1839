"""A climb of a loss inside a norm ball, and what any attack is run in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError, UnsuitableError
from lightning_muter.model.head import eval_mode
from lightning_muter.model.losses import Loss, per_sample, resolve_loss


class LossAttack:
    """Projected gradient ascent on the true loss, for any input rank, dtype and device.

        delta_{t+1} = Proj_B(x) ( delta_t + alpha d_t ),   d_t = sign(g_t) (linf), g_t / ||g_t|| (l2), Ball.direction(g_t)

    with g_t the gradient of the loss at x + delta_t. The best iterate of each sample is returned, x itself being one of
    them: the loss never falls.

    Args:
        threat: the set B(x).
        loss: ``callable(logits, y, reduction="none")`` or a ``torch.nn`` loss; default cross-entropy.
        alpha: step size; default 2.5 eps / steps.
        steps: number of steps.
        random_start: start at a random point of the ball (global random generator) where the loss is higher there,
            else at x.

    Raises:
        ArgumentError: ``steps`` is no whole number above 0, or ``alpha`` is not above 0.

    Source: A. Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, ICLR 2018.

    >>> from torch import nn
    >>> w = torch.tensor([[1.0, -2.0]])
    >>> attack = LossAttack(ThreatModel("linf", 0.1, None), nn.MSELoss(), random_start=False)
    >>> attack(lambda x: x @ w.T, torch.zeros(1, 2), torch.tensor([-1.0]))
    tensor([[ 0.1000, -0.1000]])
    """

    def __init__(
        self,
        threat: ThreatModel,
        loss: Loss | None = None,
        alpha: float | None = None,
        steps: int = 10,
        random_start: bool = True,
    ) -> None:
        if not (isinstance(steps, int) and steps >= 1):
            raise ArgumentError("steps", steps, "a whole number, 1 or more")
        if alpha is not None and not alpha > 0:
            raise ArgumentError("alpha", alpha, "a number above 0, or None for 2.5 eps / steps")
        self.threat, self.steps, self.random_start = threat, steps, random_start
        self.loss = None if loss is None else resolve_loss(loss)
        self.alpha = 2.5 * threat.eps / steps if alpha is None else float(alpha)

    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The adversarial inputs for ``x`` with labels ``y``; the modes of ``model`` are the caller's.

        Args:
            model: inputs (n, ...) -> logits (n, K).
            x: clean inputs (n, ...), inside the box of the threat model.
            y: labels (n,), or what the loss takes.

        Returns:
            inputs of the shape and dtype of ``x``, in B(x); rows are attacked independently.

        Raises:
            ArgumentError: inputs outside the box.
            UnsuitableError: the loss has no gradient in the inputs.
        """
        loss = resolve_loss(self.loss)
        return self.maximise(model, x, lambda logits: per_sample(loss, logits, y))

    def maximise(self, model: Callable[[Tensor], Tensor], x: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Climb any objective of the outputs instead of the loss.

        Args:
            model: inputs (n, ...) -> outputs (n, ...).
            x: clean inputs (n, ...).
            objective: outputs -> values (n,), one per sample, that depend on that sample's output alone.

        Returns:
            inputs of the shape and dtype of ``x``.
        """
        check_box(x, self.threat)
        if x.numel() == 0 or self.threat.eps == 0:
            return x.detach().clone()
        # half precision would lose small steps: keep the perturbation in float32 at least
        flat = x.detach().flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        best = delta = torch.zeros_like(flat)
        best_value = torch.full((len(x),), -torch.inf, dtype=flat.dtype, device=x.device)
        if self.random_start:
            # from a start below the clean loss, a small step size might never climb back
            start = self.threat.project(self.threat.ball.sample(flat, self.threat.eps), flat)
            best_value, _ = _value_and_gradient(model, x, flat, delta, objective, gradient=False)
            value, _ = _value_and_gradient(model, x, flat, start, objective, gradient=False)
            delta = torch.where((value > best_value)[:, None], start, delta)
        for step in range(self.steps + 1):
            value, gradient = _value_and_gradient(model, x, flat, delta, objective, gradient=step < self.steps)
            better = value > best_value
            best = torch.where(better[:, None], delta, best)
            best_value = torch.where(better, value, best_value)
            if gradient is not None:
                delta = self.threat.project(delta + self.alpha * self.threat.ball.direction(gradient), flat)
        found = flat + best
        if self.threat.box is not None:  # x + (hi - x) may round to just above hi
            found = found.clamp(*self.threat.box)
        return found.to(x.dtype).reshape(x.shape)


def _value_and_gradient(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    flat: Tensor,
    delta: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Objective per sample and, where asked, its gradient in delta; parameters' ``.grad`` is never touched."""
    with torch.set_grad_enabled(gradient):
        at = delta.detach().clone().requires_grad_(gradient)
        value = objective(model((flat + at).to(x.dtype).reshape(x.shape)))
        with asking_gradients():
            slope = torch.autograd.grad(value.sum(), at)[0] if gradient else None
    return value.detach().to(flat.dtype), slope


@contextmanager
def asking_gradients() -> Iterator[None]:
    """Say in our words where torch says that the loss has no gradient in the inputs.

    Raises:
        UnsuitableError: it says so.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in ("not have been used in the graph", "does not require grad")):
            raise
        raise UnsuitableError(
            "The loss has no gradient in the inputs, so that nothing can attack them: forward computes features under "
            "torch.no_grad() or .detach(). Freeze the backbone with requires_grad_(False) instead: gradients then pass it and it "
            "stays as it is."
        ) from error


def check_box(x: Tensor, threat: ThreatModel) -> None:
    """Inputs must lie in the box, or an attack would move them there in silence.

    Raises:
        ArgumentError: some input lies outside.
    """
    if threat.box is None or x.numel() == 0:
        return
    lo, hi = (float(v) for v in x.detach().aminmax())
    slack = 1e-6 + 4 * torch.finfo(x.dtype).eps * max(abs(threat.box[0]), abs(threat.box[1]))
    if lo < threat.box[0] - slack or hi > threat.box[1] + slack:
        raise ArgumentError(
            "inputs",
            (lo, hi),
            f"values in the box {threat.box}",
            "Inputs that were normalised: pass normalization=(mean, std), or put it inside the model. Data without bounds (tables): "
            f"threat_model=ThreatModel({threat.norm!r}, {threat.eps:g}, box=None).",
        )


@contextmanager
def attack_scope(module: nn.Module) -> Iterator[None]:
    """Where an attack may run: gradients on, eval mode, no trace left behind.

    Lightning validates under ``inference_mode`` or ``no_grad``; torchattacks flips the mode of the whole model; some
    attacks call ``backward``; autocast of older torch reuses weights cast under ``inference_mode``.
    """
    grads = [(p, p.grad) for p in module.parameters()]
    cached = torch.is_autocast_cache_enabled()
    try:
        for p, _ in grads:
            p.grad = None
        torch.set_autocast_cache_enabled(False)
        with torch.inference_mode(False), torch.enable_grad(), eval_mode(module):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for p, grad in grads:
            p.grad = grad
