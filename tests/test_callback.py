"""MUterCallback under real trainers: existing modules, tabular data, one logit, files, logs, interruptions."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchattacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_muter import AdversarialTraining, AdversarialTrainingMixin, MUterCallback, Snapshot, ThreatModel
from lightning_muter.adversarial.climb import LossAttack
from lightning_muter.errors import MismatchError, RequestError, UnsuitableError
from tests.faults import listing
from tests.fits import Plain, cancer, l2_attack, loader_of, short_trainer, table
from tests.heads import state

NET = [("linear", torch.float64), ("linear", torch.float32), ("frozen", torch.float64)]


class Mixed(AdversarialTrainingMixin, Plain):
    def configure_attack(self) -> Any:
        return LossAttack(ThreatModel("l2", 0.2), steps=3)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("kind", "dtype"), NET)
def test_plain_module_on_tabular_data(tmp_path, k, kind, dtype):
    torch.manual_seed(0)
    data, module, muter = table(dtype), Plain(k, kind).to(dtype), MUterCallback(verbose=False, budget=None)
    eps = 0.2 if kind == "linear" else 0.02  # against 0.2 these few features are best not used at all
    short_trainer(tmp_path, l2_attack(eps), muter).fit(module, loader_of(data))
    snapshot = muter.snapshot
    assert snapshot is not None
    assert snapshot.stationarity < (1e-5 if dtype == torch.float64 else 1e-3)
    assert snapshot.threat_model == ThreatModel("l2", eps)
    assert snapshot.response.name == "l2"
    assert (snapshot.n_total, snapshot.decay.unique().item()) == (160, pytest.approx(1e-2))
    result = muter.unlearn(module, [3, 17, 96], retain=data, refine=2)
    assert result.stationarity_before is not None
    assert result.stationarity_after is not None
    assert result.stationarity_after < 0.05 * result.stationarity_before
    assert muter.retained(data).indices == [i for i in range(160) if i not in (3, 17, 96)]
    snapshot.check_model(module)
    if kind == "linear":  # and it is nearly the minimiser of what is left
        assert result.bound is not None
        other, again = Plain(k, kind).to(dtype), MUterCallback(verbose=False, threat_model=ThreatModel("l2", 0.2))
        short_trainer(tmp_path, again, epochs=1).fit(other, loader_of(muter.retained(data)))
        distance = float((other.net.weight - module.net.weight).detach().norm())
        assert distance < (0.05 if dtype == torch.float64 else 0.2) * max(result.step_norm, 1e-3)
    assert not list(tmp_path.rglob("*.muter*"))


def test_torchattacks_on_images_and_the_mixin(tmp_path):
    class Images(AdversarialTrainingMixin, Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(25, 2))

        def configure_attack(self) -> Any:
            return torchattacks.PGD(self, eps=0.03, alpha=0.01, steps=3)

    torch.manual_seed(0)
    x, y = cancer()
    data = TensorDataset(x[:, :25].reshape(-1, 1, 5, 5).float(), y)
    module, muter = Images(), MUterCallback(verbose=False, dirpath=tmp_path)
    trainer = short_trainer(tmp_path, muter)
    trainer.fit(module, loader_of(data))
    assert muter.snapshot is not None
    assert muter.snapshot.threat_model == ThreatModel("linf", 0.03)
    assert muter.snapshot.response.name == "linf"
    before = listing(tmp_path)
    result = module.unlearn([5, 6])
    assert result.forgotten == muter.snapshot.forgotten == [5, 6]
    assert listing(tmp_path) == before  # in memory, until it is saved
    muter.save()
    after = listing(tmp_path)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"model.muter.ckpt", "model.muter.snapshot"}  # one transaction, entered in the ledger
    assert "model.muter.ledger" in after


def test_files_and_logs(tmp_path):
    torch.manual_seed(0)
    data, module = table(), Mixed().double()
    logger = CSVLogger(tmp_path / "logs")
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    muter = MUterCallback(verbose=False)
    short_trainer(tmp_path, muter, checkpoints, logger=logger, enable_checkpointing=True, log_every_n_steps=1).fit(
        module, loader_of(data)
    )
    own = Path(checkpoints.last_model_path)
    files = {p.name for p in own.parent.iterdir()}
    assert {"last.ckpt", "last.muter.ckpt", "last.muter.snapshot", "last.muter.key"} <= files
    saved = torch.load(own.parent / "last.muter.ckpt", weights_only=True)
    plain = torch.load(own, weights_only=False)
    assert torch.equal(saved["state_dict"]["net.weight"], module.net.weight)
    assert not torch.equal(plain["state_dict"]["net.weight"], module.net.weight)  # from before the polish
    loaded = Snapshot.load(own.parent / "last.muter.snapshot")
    loaded.check_model(module)
    assert loaded.key is not None
    stale = Mixed().double()
    stale.load_state_dict(plain["state_dict"])
    with pytest.raises(MismatchError, match=r"\.muter\.ckpt"):
        loaded.check_model(stale)
    logger.save()
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    for figure in ("muter/stationarity", "muter/seconds", "muter/bytes", "muter/polish_step_norm"):
        assert figure in text, figure


@pytest.mark.parametrize(
    ("optimizer", "decay", "text"), [("sgd", 0.0, "Weight decay is 0"), ("adamw", 1e-2, "AdamW decouples")]
)
def test_a_fit_survives_what_cannot_be_unlearned_and_unlearn_says_why(tmp_path, optimizer, decay, text):
    module, muter = Mixed(optimizer=optimizer, decay=decay).double(), MUterCallback(verbose=False, dirpath=tmp_path)
    trainer = short_trainer(tmp_path, muter, epochs=1)
    with pytest.warns(UserWarning, match=text):
        trainer.fit(module, loader_of(table()))
    assert trainer.state.finished
    assert muter.snapshot is None
    assert not list(tmp_path.rglob("*.muter*"))
    with pytest.raises(UnsuitableError, match=text) as first:
        muter.unlearn(module, [3])
    with pytest.raises(UnsuitableError) as second:
        module.unlearn([3])
    assert str(first.value) == str(second.value)


def test_a_given_decay_settles_it(tmp_path):
    module, muter = Mixed(optimizer="adamw").double(), MUterCallback(verbose=False, weight_decay=5e-3)
    short_trainer(tmp_path, muter, epochs=1).fit(module, loader_of(table()))
    assert muter.snapshot is not None
    assert muter.snapshot.decay.unique().item() == 5e-3
    assert muter.unlearn(module, [1]).n_retained == 159


def test_a_loss_given_to_the_adversary_is_the_one_that_is_unlearned_in(tmp_path):
    class Bare(Plain):
        def __init__(self) -> None:
            super().__init__(1)
            del self.criterion

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].to(batch[0]))

    loss = F.binary_cross_entropy_with_logits
    module = Bare().double()
    muter = MUterCallback(verbose=False, loss=None)
    attack = AdversarialTraining(LossAttack(ThreatModel("l2", 0.2), loss, steps=3), loss=loss)
    muter.loss = loss
    short_trainer(tmp_path, attack, muter, epochs=1).fit(module, loader_of(table()))
    assert muter.unlearn(module, [1]).forgotten == [1]


def test_training_on_forgotten_rows_is_refused_for_ever(tmp_path):
    torch.manual_seed(0)
    data, module, muter = table(), Mixed().double(), MUterCallback(verbose=False)
    short_trainer(tmp_path, muter, epochs=1).fit(module, loader_of(data))
    muter.unlearn(module, [3, 17])
    assert muter.snapshot is not None
    before = state(module, muter.snapshot)

    def refused(dataset: Dataset[Any]) -> None:
        with pytest.raises(RequestError, match=r"train_dataloader.*forgotten rows.*retained"):
            short_trainer(tmp_path, muter, epochs=1).fit(module, loader_of(dataset))

    refused(data)
    refused(Subset(data, [3, 4, 5]))
    assert state(module, muter.snapshot) == before
    kept = muter.retained(data)
    short_trainer(tmp_path, muter, epochs=1).fit(module, loader_of(kept))
    assert muter.snapshot.n_total == 158
    refused(data)  # the list outlives the snapshot
    muter.unlearn(module, [3])  # position 3 of what was retained: row 4
    refused(kept)
    assert 4 not in muter.retained(data).indices
    assert len(muter.retained(data)) == 157
    # and a resumed run: the list comes from the checkpoint, the dataset is another object
    resumed = MUterCallback(verbose=False)
    resumed.load_state_dict(muter.state_dict())
    muter = resumed
    refused(table())
    other, rows = table(), [i for i in range(160) if i not in (3, 4, 17)]
    short_trainer(tmp_path, resumed, epochs=1).fit(module, loader_of(Subset(other, rows)))
    refused(other)


def test_fits_without_a_step_or_with_an_interruption_say_so(tmp_path):
    module, muter = Mixed().double(), MUterCallback(verbose=False)
    with pytest.raises(UnsuitableError, match="No snapshot was taken yet"):
        muter.unlearn(module, [3])
    short_trainer(tmp_path, muter, epochs=0).fit(module, loader_of(table()))
    with pytest.raises(UnsuitableError, match=r"made no step.*take_snapshot"):
        muter.unlearn(module, [3])

    class Impatient(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            short_trainer(tmp_path, muter, Impatient(), epochs=1).fit(module, loader_of(table()))
    finally:
        signal.signal(signal.SIGINT, handler)
    with pytest.raises(UnsuitableError, match=r"ended with KeyboardInterrupt.*take_snapshot"):
        muter.unlearn(module, [3])
    assert module.training_step is not None
    short_trainer(tmp_path, muter, epochs=1).fit(module, loader_of(table()))  # and the next fit is as good as any
    assert muter.unlearn(module, [3]).forgotten == [3]


def test_a_backbone_trained_on_the_same_data_is_said_loudly(tmp_path):
    module, muter = Mixed(kind="tanh").double(), MUterCallback(verbose=False, polish=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        short_trainer(tmp_path, muter, epochs=1).fit(module, loader_of(table()))
    texts = [str(w.message) for w in caught]
    assert any("outside the scope" in t and "before the fit starts" in t for t in texts)
    assert any("Head scope leaves 2 trainable parameters" in t for t in texts)
    with pytest.warns(UserWarning, match="Head scope leaves 2"):
        result = muter.unlearn(module, [3])
    assert any("Freeze" in w for w in result.warnings)


def test_batches_of_dictionaries(tmp_path):
    class Named(Dataset[Any]):
        def __len__(self) -> int:
            return 160

        def __getitem__(self, i: int) -> dict[str, Any]:
            x, y = cancer()
            return {"x": x[i], "y": y[i], "id": f"user-{i}"}

    torch.manual_seed(0)
    module, muter = Mixed().double(), MUterCallback(verbose=False)
    short_trainer(tmp_path, muter).fit(module, loader_of(Named()))
    torch.manual_seed(0)
    other, plain = Mixed().double(), MUterCallback(verbose=False)
    short_trainer(tmp_path, plain).fit(other, loader_of(table()))
    muter.unlearn(module, [3, 9], retain=Named())
    plain.unlearn(other, [3, 9], retain=table())
    torch.testing.assert_close(module.net.weight, other.net.weight, rtol=1e-9, atol=1e-10)


def test_files_of_a_fit_appear_together_or_not_at_all(tmp_path, monkeypatch):
    torch.manual_seed(0)
    data = table()
    muter = MUterCallback(verbose=False, dirpath=tmp_path / "files")
    short_trainer(tmp_path, muter, epochs=1).fit(Mixed().double(), loader_of(data))
    before = listing(tmp_path / "files")
    assert set(before) == {"model.muter.ckpt", "model.muter.snapshot", "model.muter.key"}

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device (injected)")

    monkeypatch.setattr("lightning_muter.snapshot.snapshot.Snapshot.writer", lambda self: fail)
    with pytest.raises(OSError, match="injected"):
        short_trainer(tmp_path, muter, epochs=1).fit(Mixed().double(), loader_of(data))
    assert listing(tmp_path / "files") == before


def test_two_ways_of_attacking_one_module_are_refused(tmp_path):
    with pytest.raises(UnsuitableError, match="twice"):
        short_trainer(tmp_path, l2_attack(), MUterCallback(verbose=False)).fit(Mixed().double(), loader_of(table()))


def test_without_a_threat_model_a_fit_does_not_start(tmp_path):
    module = Plain().double()
    before = module.net.weight.detach().clone()
    with pytest.raises(UnsuitableError, match="threat model"):
        short_trainer(tmp_path, MUterCallback(verbose=False)).fit(module, loader_of(table()))
    assert torch.equal(module.net.weight, before)
