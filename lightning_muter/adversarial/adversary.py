"""Attacks on batches: torchattacks where it does the right thing, projected ascent on the true loss elsewhere.

torchattacks maximises cross-entropy over classes, on images in [0, 1]. For one logit, other losses, other boxes and
tabular data in L2 it gives no attack or a wrong one: there ``LossAttack`` climbs, with the attack's alpha and steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muter.adversarial.climb import LossAttack, asking_gradients, attack_scope, check_box
from lightning_muter.adversarial.from_torchattacks import attack_note, build_attack, is_tpgd, read_climb
from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.errors import ArgumentError, UnsuitableError
from lightning_muter.model.batches import split_batch
from lightning_muter.model.loss_identity import in_words
from lightning_muter.model.losses import Loss, is_cross_entropy, one_logit, per_sample, resolve_loss
from lightning_muter.model.normalization import Normalization
from lightning_muter.model.read_step import read_batch
from lightning_muter.model.reading import Reading
from lightning_muter.model.replay import SkippedBatchError, has_step


class Adversary:
    """Who perturbs the batches of one module: its threat model, its loss, and which attack does the work.

    torchattacks does the work for plain cross-entropy over classes on inputs in [0, 1]; otherwise ``LossAttack`` does,
    with the attack's step size, steps and start, and ``why_own`` says why. What is raised is the loss of the module's own
    ``training_step``, read off its first batch (:meth:`read`).

    Args:
        module: the model; ``module(x)`` gives logits.
        attack: a torchattacks attack, a factory of one, a ``LossAttack``, a ``ThreatModel``, or None (then
            ``threat_model`` is climbed by our own maximiser).
        threat_model: the set B(x); read off the attack when None.
        loss: what is maximised; None: the step's own loss (of a plain module its ``criterion``, else cross-entropy).
        maximise: "step", or "attack" to leave an attack library its own loss, whatever the step minimises.
        inputs, label: key or position in a batch, where it cannot be told which tensor is the input (or the label).
        normalization: (mean, std) of inputs that come normalised; ball and box are then in the scale of the data.
        trades_beta: weight of the TRADES term, or None; then the divergence from the clean prediction is maximised.

    Raises:
        ArgumentError: neither attack nor threat model, they disagree, or the attack cannot be read.
    """

    def __init__(
        self,
        module: nn.Module,
        attack: Any = None,
        threat_model: ThreatModel | None = None,
        loss: Loss | None = None,
        trades_beta: float | None = None,
        maximise: Literal["step", "attack"] = "step",
        inputs: Any = None,
        label: Any = None,
        normalization: Any = None,
    ) -> None:
        if maximise not in ("step", "attack"):
            raise ArgumentError("maximise", maximise, "'step' or 'attack'")
        if attack is None and threat_model is None:
            raise ArgumentError("attack", None, "an attack, or threat_model=ThreatModel(norm, eps, box)")
        if trades_beta is not None and not trades_beta > 0:
            raise ArgumentError(
                "trades_beta", trades_beta, "a number above 0, or None", "The TRADES paper uses 1 to 6."
            )
        own_climb = isinstance(attack, (LossAttack, ThreatModel)) or attack is None
        if loss is None and isinstance(attack, LossAttack):
            loss = attack.loss
        self.loss = loss_at_hand(loss, module)
        self.trades_beta, self.inputs, self.label = trades_beta, inputs, label
        self.normalization = Normalization.of(normalization)
        self.reading: Reading | None = None
        self.unread: str | None = None
        self.asks = loss is None and maximise == "step"
        built = attack if own_climb else build_attack(attack, module)
        self.threat = _agree(built, threat_model)
        self.note = None if own_climb else attack_note(built)
        self.attack: Any = None if own_climb else built
        self._torchattacks = any(c.__module__.split(".")[0] == "torchattacks" for c in type(self.attack).__mro__)
        self.model: nn.Module = module if own_climb else getattr(built, "model", module)
        climb = read_climb(built)
        self._own = LossAttack(self.threat, self.loss, climb.alpha, climb.steps or 10, climb.random_start)
        self.why_own: str | None = "no torchattacks attack was given" if own_climb else self._why_own()
        self._one_logit: bool | None = None

    @property
    def gradients(self) -> int:
        """What an epoch against it costs per sample: its steps, and the training step."""
        return self._own.steps + 1

    def _why_own(self) -> str | None:
        if not self._torchattacks:  # somebody's own attack under an explicit threat model: taken at its word
            return None
        if self.trades_beta is not None and not is_tpgd(self.attack):
            return "the TRADES divergence is maximised, which this attack does not do"
        if self.trades_beta is None and not is_cross_entropy(self.loss):
            return "the loss is not plain cross-entropy over classes, the only one that torchattacks maximises"
        if self.threat.box != (0.0, 1.0):
            return "torchattacks clamps inputs to [0, 1], which is not the box of this threat model"
        return None

    @torch.compiler.disable
    def read(self, module: nn.Module, batch: Any) -> None:
        """Take the loss, the input and the labels from the module's own step, once; ``unread`` says why where that cannot be."""
        if not self.asks or not has_step(module):
            return
        self.asks = False
        try:
            reading = read_batch(
                module,
                batch,
                inputs=self.inputs,
                label=self.label,
                normalization=self.normalization,
                ready=True,
                fixed=True,
            )
        except SkippedBatchError:
            self.asks = True
        except UnsuitableError as error:
            if self.normalization is not None:  # nothing else would undo it
                raise
            if not _has_forward(module):
                raise UnsuitableError(
                    "The module has no forward(x) giving logits, which is what an attack attacks where the step itself cannot be "
                    f"read; define it. {error}"
                ) from error
            self.unread = str(error)
            self._fall_back(batch)
        else:
            self.adopt(reading)

    def _fall_back(self, batch: Any) -> None:
        """To cross-entropy, where the module's ``criterion`` gives no loss of a row."""
        try:
            x, y, _ = self.split(batch)
            with torch.no_grad(), attack_scope(self.model):
                per_sample(self.loss, self.logits(x), y)
        except Exception:  # of somebody's criterion
            self.loss = self._own.loss = F.cross_entropy

    def adopt(self, reading: Reading) -> None:
        """Raise the loss that was read from now on."""
        self.asks = False
        self.reading, self.loss, self._own.loss = reading, reading.loss, reading.loss
        if self.why_own is None and self._torchattacks and self.trades_beta is None and not reading.plain:
            self.why_own = (
                "the inputs come normalised, and perturbations are of the data"
                if reading.normalization is not None
                else f"it raises cross-entropy of forward's output, training_step minimises {in_words(reading.identity)}"
            )

    def split(self, batch: Any) -> tuple[Tensor, Tensor, Callable[[Tensor], Any]]:
        """Inputs, labels and what puts other inputs in their place, as the step takes a batch (of validation too, where its
        structure is the same).
        """
        if self.reading is not None and self.reading.layout.fits(batch):
            return self.reading.split(batch)
        return split_batch(batch, self.inputs, self.label)

    @torch.compiler.disable
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial inputs for ``x`` (same shape, dtype, device), whatever the autograd mode around the call.

        Every submodule's mode and every parameter's ``.grad`` are as they were, also after an exception.
        """
        with attack_scope(self.model if self.reading is None else self.reading.module):
            x, y = x.detach().clone(), y.detach().clone()  # tensors made under inference_mode cannot enter autograd
            if self.why_own is None and self._torchattacks:
                self._look(x, y)
            if self.why_own is not None:
                return self._climb(x, y)
            check_box(x, self.threat)
            if hasattr(self.attack, "set_device"):
                self.attack.set_device(x.device)
            try:
                with asking_gradients():
                    out: Tensor = self.attack(x, y)
            except IndexError as error:  # of the library: classes or dimensions that the data have not
                name, hint = type(self.attack).__name__, ""
                if name == "AutoAttack":
                    hint = " Its targeted parts take nine other classes."
                raise UnsuitableError(
                    f"{name} cannot attack this batch (inputs {tuple(x.shape)}, labels {tuple(y.shape)}): "
                    f"{type(error).__name__}: {error}.{hint} Pass an attack that can, or threat_model=ThreatModel(norm, eps) "
                    "alone for a climb of the step's own loss."
                ) from error
            return out.detach().to(x.dtype)

    def _look(self, x: Tensor, y: Tensor) -> None:
        """Learn from the first batch what torchattacks cannot do with it."""
        if self._one_logit is None:
            with torch.no_grad():
                self._one_logit = one_logit(self.logits(x))
        if self._one_logit:
            self.why_own = "the model gives one logit, and torchattacks maximises cross-entropy over classes"
        elif self.trades_beta is None and (y.dim() != 1 or y.is_floating_point()):
            self.why_own = "the labels are no class indices"
        elif self.threat.ball.euclidean and x.dim() != 4:
            self.why_own = f"torchattacks' L2 attacks need images (N, C, H, W), the inputs are {x.dim()}-dimensional"

    def _climb(self, x: Tensor, y: Tensor) -> Tensor:
        if self.trades_beta is None:
            return self._own(self.logits, x, y)
        with torch.no_grad():
            clean = self.logits(x)
        climb = LossAttack(self.threat, self.loss, self._own.alpha or None, self._own.steps, random_start=True)
        return climb.maximise(self.logits, x, lambda logits: divergence(clean, logits))

    def logits(self, x: Tensor) -> Tensor:
        """What the attacked model gives for ``x``, in whatever mode it is.

        Raises:
            UnsuitableError: it is not one tensor.
        """
        out = self.model(x) if self.reading is None else self.reading.logits(x)
        if not isinstance(out, Tensor):
            raise UnsuitableError(
                f"The model's forward returns {type(out).__name__}; an attack needs one tensor of logits. Return the "
                "logits alone from forward, or build the attack on the submodule that gives them."
            )
        return out


def loss_at_hand(loss: Loss | None, module: nn.Module) -> Loss:
    """What is given, or the module's ``criterion``; one that gives no loss of a row matters not where a step is to be read."""
    try:
        return resolve_loss(loss, module)
    except ArgumentError:
        if loss is not None or not has_step(module):
            raise
        return F.cross_entropy


def _has_forward(module: nn.Module) -> bool:
    """Whether forward is the user's own."""
    return type(module).forward.__module__.split(".")[0] not in ("torch", "lightning", "pytorch_lightning")


def divergence(clean: Tensor, adversarial: Tensor) -> Tensor:
    """KL(clean || adversarial) of the predicted distributions, per sample (n,); Bernoulli for one logit."""
    if one_logit(clean):
        p, q = clean.reshape(-1), adversarial.reshape(-1)
        clean, adversarial = torch.stack([-p / 2, p / 2], 1), torch.stack([-q / 2, q / 2], 1)
    p, q = clean.log_softmax(1), adversarial.log_softmax(1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(1)


def _agree(attack: Any, threat: ThreatModel | None) -> ThreatModel:
    """The threat model; norm and eps must be the attack's own where the attack can be read."""
    if attack is None:
        assert threat is not None  # checked by the caller
        return threat
    if threat is None:
        return ThreatModel.from_attack(attack)
    try:
        of_attack = ThreatModel.from_attack(attack, threat.box)
    except ArgumentError:
        if getattr(attack, "normalization_used", None) is not None or getattr(attack, "targeted", False) is True:
            raise
        return threat
    if of_attack.norm != threat.norm or not math.isclose(of_attack.eps, threat.eps, rel_tol=1e-6):
        raise ArgumentError(
            "threat_model",
            threat,
            f"the attack's own norm and radius, {of_attack.norm!r} and {of_attack.eps:g}",
            "Change one of the two, so that unlearning speaks of the perturbations that were trained on.",
        )
    return threat
