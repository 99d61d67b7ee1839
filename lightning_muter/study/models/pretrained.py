"""Any torchvision or timm classifier as a backbone, with weights from a file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_muter.errors import ArgumentError, CorruptFileError
from lightning_muter.study.models.base import Classifier


class PretrainedBackbone(Classifier):
    """A torchvision or timm network without its last linear layer, and a new head.

    Args:
        name: e.g. ``"resnet18"``.
        library: "torchvision", or "timm" (install ``lightning-muter[timm]``).
        weights: file with the network's state dict (``.pt``/``.pth``, read with ``weights_only=True``, or
            ``.safetensors``), or a dict holding it under ``state_dict`` or ``model``; its last layer is unused.
        options_of_network: further keywords of the network's constructor.
        frozen: freeze the backbone at once.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        num_classes: int,
        *,
        name: str = "resnet18",
        library: Literal["torchvision", "timm"] = "torchvision",
        weights: str | Path | None = None,
        options_of_network: Mapping[str, Any] | None = None,
        frozen: bool = False,
        **options: Any,
    ) -> None:
        network = build_network(name, library, dict(options_of_network or {}))
        last_name, last = last_linear(network)
        if weights is not None:
            load_weights(network, Path(weights), ignore=last_name)
        replace_module(network, last_name, nn.Identity())
        super().__init__(network, last.in_features, num_classes, **options)
        self.save_hyperparameters()
        if frozen:
            self.freeze_backbone()


def build_network(name: str, library: str, options: dict[str, Any]) -> nn.Module:
    """The network with random weights; nothing is downloaded."""
    if library == "torchvision":
        models = importlib.import_module("torchvision.models")
        if name not in models.list_models(module=models):
            raise ArgumentError(
                "name", name, "a classifier of torchvision.models", "See torchvision.models.list_models()."
            )
        return models.get_model(name, weights=None, **options)
    if library == "timm":
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise ArgumentError(
                "library", library, "an installed library", "pip install 'lightning-muter[timm]'."
            ) from error
        if name not in timm.list_models():
            raise ArgumentError("name", name, "a model of timm", "See timm.list_models().")
        return timm.create_model(name, pretrained=False, **options)
    raise ArgumentError("library", library, "'torchvision' or 'timm'")


def last_linear(network: nn.Module) -> tuple[str, nn.Linear]:
    """Name and layer of the last linear layer in order of definition."""
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ArgumentError(
            "name", type(network).__name__, "a network that ends in nn.Linear", "Choose another architecture."
        )
    return found[-1]


def replace_module(network: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in the place of the one of this dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)


def load_weights(network: nn.Module, path: Path, *, ignore: str) -> None:
    """Load a state dict, the layer ``ignore`` aside; no code in the file is run.

    Raises:
        ArgumentError: no such file, or missing, unexpected or wrongly shaped entries (all listed).
        CorruptFileError: the file cannot be read as weights.
    """
    if not path.is_file():
        raise ArgumentError("weights", str(path), "an existing file", "Download the weights first.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CorruptFileError(
            f"{path} cannot be read as weights ({type(error).__name__}: {error}). Fetch it again."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CorruptFileError(f"{path} holds no state dict of tensors. Save `network.state_dict()`.")
    wanted = {k: v for k, v in network.state_dict().items() if not k.startswith(ignore + ".")}
    given = {k.removeprefix("module."): v for k, v in state.items()}
    given = {k: v for k, v in given.items() if not k.startswith(ignore + ".")}
    problems = [f"missing {k}" for k in wanted if k not in given]
    problems += [f"unexpected {k}" for k in given if k not in wanted]
    problems += [
        f"{k} has shape {tuple(given[k].shape)} instead of {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape
    ]
    if problems:
        shown = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        raise ArgumentError(
            "weights", str(path), "the state dict of this network", f"{len(problems)} differences: {shown}."
        )
    network.load_state_dict(given, strict=False)
