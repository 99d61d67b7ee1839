"""Checkpoints: ordinary for Lightning, free of old influence, and never a way to run code."""

from __future__ import annotations

import io
import os
import pickle
import random
import resource
import struct
import zipfile

import lightning as L
import pytest
import torch

from lightning_muter.deletion import checkpoints
from lightning_muter.errors import ArgumentError, CorruptFileError
from tests.hostile import Evil, mutated, zipped


class Net(L.LightningModule):
    def __init__(self, width=3):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, width)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data = torch.utils.data.TensorDataset(torch.randn(8, 2), torch.arange(8) % 3)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, enable_checkpointing=False, callbacks=[L.pytorch.callbacks.EMAWeightAveraging()]
        if hasattr(L.pytorch.callbacks, "EMAWeightAveraging") else [],
    )  # fmt: skip
    trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=4, num_workers=0))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_a_renewed_checkpoint_is_ordinary_and_remembers_nothing(trained, tmp_path):
    old = checkpoints.load_checkpoint(trained)
    assert "optimizer_states" in checkpoints.remembers(old)
    old["on_save"], old["note"] = {"average": torch.ones(2)}, {"run": 7}
    weights = {name: tensor + 1 for name, tensor in old["state_dict"].items()}
    new, left_out = checkpoints.renewed(old, weights)
    assert "on_save" in left_out
    assert set(left_out) <= {"on_save", "averaging_state", "current_model_state"}  # of Lightning's own weight averaging
    assert set(left_out).isdisjoint(new)
    assert new["note"] == {"run": 7}
    path = tmp_path / "new.ckpt"
    with open(path, "wb") as file:
        checkpoints.checkpoint_writer(new)(file)
    again = checkpoints.load_checkpoint(path)
    assert checkpoints.remembers(again) == []
    assert checkpoints.checkpoint_fingerprint(again) == checkpoints.weight_fingerprint(weights)
    assert checkpoints.checkpoint_fingerprint(again) != checkpoints.checkpoint_fingerprint(old)
    loaded = Net.load_from_checkpoint(path, weights_only=True)
    assert loaded.hparams.width == 3
    assert torch.equal(loaded.layer.weight, old["state_dict"]["layer.weight"] + 1)


def legacy(value):
    return pickle.dumps(value, protocol=2)


HOSTILE = {
    "pickle": lambda: legacy({"state_dict": Evil()}),
    "zip": lambda: zipped({"state_dict": {"w": torch.ones(1)}, "x": Evil()}),
    "other globals": lambda: zipped({"state_dict": {"w": torch.ones(1)}, "x": os.path.join}),
    "no weights": lambda: zipped({"a": 1}),
    "a list": lambda: zipped([1]),
    "no tensors": lambda: zipped({"state_dict": {"w": 1}}),
    "sparse": lambda: zipped({"state_dict": {"w": torch.eye(2).to_sparse()}}),
    "empty": lambda: b"",
    "text": lambda: b"hello" * 100,
    "zip without a pickle": lambda: (buffer := io.BytesIO(), zipfile.ZipFile(buffer, "w").close(), buffer.getvalue())[
        2
    ],
}


def recompressed(content, pickled=None):
    """The same archive, compressed; or with another pickle."""
    buffer, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(content))
    method = zipfile.ZIP_DEFLATED if pickled is None else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as target:
        for entry in source.infolist():
            own = pickled is not None and entry.filename.endswith("data.pkl")
            target.writestr(entry.filename, pickled if own else source.read(entry))
    return buffer.getvalue()


def bombs():
    """Small files that want a lot of memory, or time."""
    plain = zipped({"state_dict": {"w": torch.zeros(1 << 18)}})
    yield "compressed", recompressed(plain)
    yield "stride 0", zipped({"state_dict": {"w": torch.zeros(1).expand(1 << 40)}})
    large = b"\x80\x02}X\x0a\x00\x00\x00state_dictcbuiltins\nbytearray\n\x8a\x06" + b"\xff" * 5 + b"\x00\x85Rs."
    yield "bytearray", recompressed(plain, large)
    yield "legacy", legacy({"state_dict": {}})


@pytest.mark.parametrize(("name", "content"), [*bombs()], ids=lambda value: value if isinstance(value, str) else "")
def test_memory_is_not_taken_because_a_file_says_so(name, content, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptFileError):
        checkpoints.load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_expanded_weights_and_shared_lists_are_read_quickly(tmp_path):
    path = tmp_path / "a.ckpt"
    shared = []
    for _ in range(60):
        shared = [shared, shared]
    path.write_bytes(zipped({"state_dict": {"w": torch.zeros(1).expand(1000)}, "note": shared}))
    assert checkpoints.remembers(checkpoints.load_checkpoint(path)) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_are_refused_and_run_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    path = tmp_path / "a.ckpt"
    path.write_bytes(HOSTILE[name]())
    with pytest.raises(CorruptFileError, match="Restore it from a backup"):
        checkpoints.load_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ArgumentError, match="existing checkpoint"):
        checkpoints.load_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_mutated_checkpoints_end_in_one_error_or_in_weights(trained, tmp_path, count):
    content, draw, refused = trained.read_bytes(), random.Random(0), 0
    path = tmp_path / "a.ckpt"
    for _ in range(count):
        path.write_bytes(mutated(content, draw))
        try:
            checkpoints.checkpoint_fingerprint(checkpoints.load_checkpoint(path))
        except CorruptFileError:
            refused += 1
    assert refused > count / 4
    assert struct.calcsize("P") == 8
