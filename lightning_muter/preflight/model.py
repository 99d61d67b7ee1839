"""What a module's layers and parameters mean for unlearning, and how large its snapshot will be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_muter.adversarial.threat_model import ThreatModel
from lightning_muter.model.head import Head
from lightning_muter.preflight.findings import Finding, Level
from lightning_muter.snapshot.size import DEFAULT_CAP, dense_bytes, without_matrix


def inspect_layers(module: nn.Module) -> list[Finding]:
    """Layers that behave differently in eval mode or have no second derivative."""
    out: list[Finding] = []
    kinds: dict[str, tuple[Level, Any, str]] = {
        "BatchNorm": ("note", nn.modules.batchnorm._BatchNorm, "uses its running statistics, which are not unlearned"),
        "Dropout": ("note", nn.modules.dropout._DropoutNd, "is switched off while curvature is computed"),
        "RNN": ("warning", nn.RNNBase, "fails under vmapped derivatives"),
    }
    for kind, (level, types, behaviour) in kinds.items():
        names = [n for n, m in module.named_modules() if isinstance(m, types) and getattr(m, "p", 1) != 0]
        if names:
            advice = "" if level == "note" else "Keep it out of the scope, or use another layer."
            out.append(Finding(level, f"{kind} ({_few(names)}) {behaviour}.", advice))
    return out


def inspect_outside(module: nn.Module, names: Iterable[str], optimizers: Iterable[Any] | None = None) -> list[Finding]:
    """Parameters that are trained (by ``optimizers``, where given) and that unlearning will not touch."""
    inside, named = set(names), list(module.named_parameters())
    trained = {id(p) for _, p in named}
    if optimizers is not None:
        trained = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    outside = [n for n, p in named if p.requires_grad and id(p) in trained and n not in inside]
    if not outside:
        return []
    return [
        Finding(
            "warning",
            f"{len(outside)} parameters outside the scope ({_few(outside)}) are trained on the same data and keep "
            "what they learnt from forgotten samples.",
            "Freeze them (requires_grad=False) after training them on data that is never forgotten, or use scope='all'.",
            "--trainer.callbacks.scope all",
        )
    ]


def predict_bytes(
    head: Head, n: int, inputs: int, threat: ThreatModel | None = None, linear: bool | None = None
) -> int:
    """Size of a dense snapshot: p x p sums in float64, and stored maximisers where there is a backbone.

    ``p = K (f + 1)``; maximisers take two bits per input (linf vertices) or two bytes (l2, half precision) per sample.
    """
    size = dense_bytes(head)
    stored = not linear if linear is not None else head.name != ""
    if threat is not None and threat.eps > 0 and stored:
        size += n * ((inputs + 3) // 4) if threat.ball.separable else n * inputs * 2
    return size


def inspect_size(
    head: Head, n: int, inputs: int, threat: ThreatModel | None = None, cap: int = DEFAULT_CAP
) -> list[Finding]:
    """Predicted size of the snapshot against the cap; of a head whose sums alone exceed it nothing large is stored."""
    large = without_matrix(head, cap)
    if large is not None:
        advice = (
            "Put a narrow layer before the head, or raise the cap, for requests that read the rows to forget alone."
        )
        return [Finding("warning", large, advice, f"--trainer.callbacks.size_cap {dense_bytes(head)}")]
    size = predict_bytes(head, n, inputs, threat)
    if size <= cap:
        return [Finding("note", f"The snapshot will take about {size / 2**20:.1f} MiB.")]
    return [
        Finding(
            "error",
            f"A snapshot with the maximisers of {n} samples would take {size / 2**30:.1f} GiB (cap {cap / 2**30:g} GiB).",
            "Use scope='all' or patterns, which store none, or raise the cap.",
            f"--trainer.callbacks.size_cap {size} (or --trainer.callbacks.scope all)",
        )
    ]


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
