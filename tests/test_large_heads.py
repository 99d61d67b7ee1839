"""A head whose Hessian does not fit: no matrix of its size is made, and what comes out is as near to retraining."""

from __future__ import annotations

from copy import deepcopy

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_muter import ThreatModel, take_snapshot, unlearn
from lightning_muter.callback import MUterCallback
from lightning_muter.snapshot.snapshot import Snapshot, WideSnapshot

THREAT = ThreatModel("l2", 0.1)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{begin}:UserWarning")
    for begin in (
        "The head has",
        "The scope leaves 2",
        "Head scope leaves 2",
        "The weights are not stationary",
        "Unlearning, before",
    )
]


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation gives."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def rows(n: int, classes: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    centres = torch.rand(classes, 6, generator=generator)
    x = (centres[y] + 0.1 * torch.randn(n, 6, generator=generator)).clamp(0, 1)
    return TensorDataset(x, y)


def network(width: int, classes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, width), nn.SiLU(), nn.Linear(width, classes))


def test_no_tensor_of_the_size_of_the_matrix_is_made() -> None:
    """p = 100 * 201 parameters: 3.0 GiB in float64, above the cap that there is by default."""
    data, model = rows(120, 100), network(200, 100)
    p = sum(t.numel() for t in model[-1].parameters())
    before = model[1].weight.detach().clone()
    with Largest() as seen:
        snapshot = take_snapshot(model, data, threat_model=THREAT, weight_decay=1e-2, progress=False)
        result = unlearn(model, snapshot, [3, 17], data, progress=False)
    assert isinstance(snapshot, WideSnapshot)
    assert snapshot.parameters == ["3.weight", "3.bias"]
    assert any(f"The head has {p} parameters" in w and "3.0 GiB" in w for w in snapshot.warnings)
    assert seen.entries < 100 * p < p * p / 100
    assert result.forgotten == [3, 17]
    assert torch.equal(model[1].weight, before)


def test_it_ends_where_the_matrix_does() -> None:
    data, gone = rows(60, 3), [1, 2, 9, 30]
    options = {"threat_model": THREAT, "weight_decay": 1e-2, "progress": False}
    start = network(5, 3).double()
    data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    stored = take_snapshot(start, data, **options)
    assert isinstance(stored, Snapshot)
    retrained, by_products, by_matrix = deepcopy(start), deepcopy(start), deepcopy(start)
    take_snapshot(retrained, Subset(data, [i for i in range(60) if i not in gone]), **options)
    snapshot = take_snapshot(by_products, data, size_cap=1000, **options)
    assert isinstance(snapshot, WideSnapshot)
    unlearn(by_products, snapshot, gone, data, refine=4, progress=False)
    unlearn(by_matrix, stored, gone, data, progress=False)

    def far(net: nn.Sequential) -> float:
        return float((net[-1].weight - retrained[-1].weight).detach().norm())

    assert far(by_products) < 0.02 * far(start)
    assert far(by_matrix) < 0.2 * far(start)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-2)


def test_the_callback_chooses_it_by_its_cap(tmp_path) -> None:
    data, model = rows(60, 3), Net()
    muter = MUterCallback(threat_model=THREAT, size_cap=1000, verbose=False, dirpath=tmp_path)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[muter], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=20))
    assert isinstance(muter.snapshot, WideSnapshot)
    assert muter.snapshot.parameters == ["net.3.weight", "net.3.bias"]
    result = muter.unlearn(model, [3, 17], data=data)
    assert result.n_retained == 58
    assert sorted(WideSnapshot.load(muter.save()).forgotten) == [3, 17]
