"""Rows: the snapshot is of what was trained on, known by what the loader reaches and by content; or it is refused."""

from __future__ import annotations

import concurrent.futures
import copy
import threading
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_muter import MUterCallback, Snapshot, ThreatModel, WideSnapshot, cli, refresh, take_snapshot, unlearn
from lightning_muter.errors import RequestError, UnsuitableError
from lightning_muter.model.rows import RowHashes, reachable, reached_by_iterating
from lightning_muter.preflight.data import inspect_loaders
from lightning_muter.preflight.trained_rows import TrainedRows

X = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, (X[:, 0] > 0.5).long())
THREAT = ThreatModel("l2", 0.03, None)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, weight_decay=1e-2)


class Pairs(Sampler):
    """A batch sampler of one's own: the first thirty rows."""

    def __iter__(self):
        return iter([[i, i + 1] for i in range(0, 30, 2)])

    def __len__(self):
        return 15


class Halves(Sampler):
    """Another half each time."""

    def __iter__(self):
        return iter(torch.randperm(60)[:30].tolist())

    def __len__(self):
        return 30


def fit(loader, muter=None, net=None, **options):
    muter, net = muter or MUterCallback(threat_model=THREAT, verbose=False), net or Net()
    checkpoint = options.pop("ckpt_path", None)
    more = {"ckpt_path": checkpoint, "weights_only": True} if checkpoint else {}
    options = {"max_epochs": 2, "enable_checkpointing": False, **options}
    trainer = L.Trainer(
        callbacks=[muter, *options.pop("callbacks", [])], logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", **options,
    )  # fmt: skip
    if isinstance(loader, L.LightningDataModule):
        trainer.fit(net, datamodule=loader, **more)
    else:
        trainer.fit(net, loader, **more)
    return muter, net, trainer


PARTS = {
    "subset random": (lambda: DataLoader(DATA, 16, sampler=SubsetRandomSampler(range(40)), drop_last=True), 40),
    "list": (lambda: DataLoader(DATA, 16, sampler=list(range(40))), 40),
    "own batches": (lambda: DataLoader(DATA, batch_sampler=Pairs()), 30),
    "whole batches": (
        lambda: DataLoader(DATA, sampler=BatchSampler(SubsetRandomSampler(range(40)), 16, False), batch_size=None), 40,
    ),
    "own whole batches": (lambda: DataLoader(DATA, sampler=Pairs(), batch_size=None), 30),
    "weighted": (lambda: DataLoader(DATA, 16, sampler=WeightedRandomSampler([1.0] * 50 + [0.0] * 10, 60)), 50),
    "drop_last": (lambda: DataLoader(DATA, 16, drop_last=True), 48),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Unlearning, before the fit")
@pytest.mark.parametrize("name", PARTS)
def test_rows_that_the_loader_does_not_reach_are_in_no_sum(name):
    make, reached = PARTS[name]
    muter, net, _ = fit(make())
    snapshot = muter.snapshot
    assert snapshot.absent == list(range(reached, 60))
    assert (snapshot.n_total, snapshot.n_retained) == (60, reached)
    alone = copy.deepcopy(net)
    other = take_snapshot(
        alone, Subset(DATA, range(reached)), threat_model=THREAT, weight_decay=1e-2, polish=0, progress=False
    )
    # the same up to the rounding of the weights, which were polished in double precision
    torch.testing.assert_close(snapshot.gradient, other.gradient, rtol=0, atol=1e-5)
    torch.testing.assert_close(snapshot.hessian.blocks, other.hessian.blocks, rtol=1e-4, atol=1e-5)
    with pytest.raises(RequestError, match=r"\[59\] were never trained on"):
        muter.unlearn(net, [3, 59])
    one = muter.unlearn(net, [3, 20], retain=DATA, refine=1)
    two = unlearn(alone, other, [3, 20], Subset(DATA, range(reached)), retain=Subset(DATA, range(reached)), refine=1)
    torch.testing.assert_close(net.head.weight, alone.head.weight, rtol=1e-4, atol=1e-5)
    assert one.n_retained == two.n_retained == reached - 2
    assert len(muter.retained(DATA)) == reached - 2


def test_absent_rows_live_through_files_and_refresh(tmp_path):
    muter, net, _ = fit(DataLoader(DATA, 16, sampler=SubsetRandomSampler(range(40))))
    muter.save(tmp_path / "a.muter.snapshot")
    back = Snapshot.load(tmp_path / "a.muter.snapshot")
    assert back.absent == list(range(40, 60))
    unlearn(net, back, [1], DATA)
    new = refresh(net, back, DATA, progress=False)
    assert (new.n_retained, new.forgotten, new.absent) == (39, [1], back.absent)
    unlearn(net, new, [2], DATA)
    assert new.n_retained == 38


@pytest.mark.filterwarnings("ignore:The weights are not stationary")
def test_a_wider_scope_reads_the_reached_rows_alone():
    broken = TensorDataset(torch.cat([X[:40], torch.full((20, 4), torch.nan)]), DATA.tensors[1])
    muter = MUterCallback("all", threat_model=THREAT, verbose=False)
    muter, net, _ = fit(DataLoader(DATA, 16, sampler=SubsetRandomSampler(range(40))), muter)
    assert isinstance(muter.snapshot, WideSnapshot)
    assert muter.unlearn(net, [3], data=broken).n_retained == 39


def test_all_rows_where_all_can_be_reached():
    for options in ({"shuffle": True}, {}, {"shuffle": True, "drop_last": True}):
        assert reachable(DataLoader(DATA, 16, **options)) is None
    muter, net, _ = fit(DataLoader(DATA, 20, shuffle=True), max_epochs=-1, max_steps=1)
    assert muter.snapshot.absent == []
    assert muter.unlearn(net, [50]).forgotten == [50]


@pytest.mark.filterwarnings("ignore:Unlearning, before the fit")
@pytest.mark.parametrize(
    "options", [{"overfit_batches": 2}, {"limit_train_batches": 2}, {"max_epochs": -1, "max_steps": 2}]
)
def test_limits_in_a_fixed_order_reach_the_first_rows(options):
    muter, _, _ = fit(DataLoader(DATA, 10), **options)
    assert muter.snapshot.absent == list(range(20, 60))


class Reloaded(L.LightningDataModule):
    """Loaders made anew in each epoch, of other rows or of copies of the same."""

    def __init__(self, same):
        super().__init__()
        self.same, self.epoch = same, 0

    def train_dataloader(self):
        rows = range(30) if self.same else range(30 * self.epoch, 30 * self.epoch + 30)
        self.epoch += 1
        return DataLoader(TensorDataset(X[list(rows)].clone(), DATA.tensors[1][list(rows)]), 10)


def test_loaders_of_other_rows_are_refused_and_copies_of_the_same_are_not():
    with pytest.warns(UserWarning, match="made anew every 1 epochs"):
        muter, net, _ = fit(Reloaded(True), reload_dataloaders_every_n_epochs=1)
    assert muter.unlearn(net, [1]).n_retained == 29
    net = Net()
    with (
        pytest.warns(UserWarning, match="made anew every 1 epochs"),
        pytest.warns(UserWarning, match=r"30 of the 60 different rows that were trained on are not in the last"),
    ):
        muter, *_ = fit(Reloaded(False), net=net, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(UnsuitableError, match=r"take_snapshot\(model, dataset"):
        muter.unlearn(net, [1])


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("rows", [range(30), range(30, 60), range(20)])
def test_a_resumed_run_with_another_split_is_refused(rows, tmp_path):
    saved = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    *_, first = fit(DataLoader(Subset(DATA, range(30)), 10, shuffle=True), max_epochs=1, **saved)
    path = first.checkpoint_callback.best_model_path
    again = DataLoader(TensorDataset(X[list(rows)], DATA.tensors[1][list(rows)]), 10)
    if rows == range(30):
        muter, net, _ = fit(again, ckpt_path=path, **saved)
        assert muter.unlearn(net, [1]).n_retained == 29
    else:
        with pytest.warns(UserWarning, match=r"had trained on 30 rows, this one on \d0, and they are not the same"):
            fit(again, ckpt_path=path, **saved)


@pytest.mark.filterwarnings("ignore:Unlearning, before the fit")
def test_hooks_that_change_batches_and_a_sampler_that_does_not_tell():
    class Moving(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 2, batch[1]

    with pytest.warns(UserWarning, match=r"cannot be told.*take_snapshot"):
        muter, *_ = fit(DataLoader(DATA, 16, sampler=Halves()), net=Moving())
    assert muter.snapshot is None


@pytest.mark.filterwarnings("ignore:Unlearning, before the fit")
def test_what_was_seen_counts_where_a_sampler_takes_others_each_time():
    seen = []

    class Watched(Net):
        def on_train_batch_start(self, batch, _):
            seen.append(batch[0])

    muter, *_ = fit(DataLoader(DATA, 15, sampler=Halves()), net=Watched())
    rows = {tuple(r.tolist()) for r in torch.cat(seen)}
    assert muter.snapshot.n_retained == len(rows) < 60
    assert {tuple(X[i].tolist()) for i in muter.snapshot.retained_positions} == rows


def test_a_fit_without_steps_keeps_the_snapshot_and_one_with_steps_does_not(tmp_path):
    muter, net, trainer = fit(DataLoader(DATA, 20))
    before = muter.snapshot
    trainer.fit(net, DataLoader(DATA, 20))  # nothing is left to train
    assert muter.snapshot is before
    assert muter.unlearn(net, [1]).forgotten == [1]
    trainer.fit_loop.max_epochs = 3
    with pytest.raises(RequestError, match="forgotten rows"):
        trainer.fit(net, DataLoader(DATA, 20))
    trainer.fit(net, DataLoader(muter.retained(DATA), 20))
    assert muter.snapshot is not before
    assert muter.snapshot.n_total == 59


def test_a_trial_run_takes_no_snapshot():
    net = Net()
    with pytest.warns(UserWarning, match="fast_dev_run"):
        muter, *_ = fit(DataLoader(DATA, 20), net=net, fast_dev_run=True)
    with pytest.raises(UnsuitableError, match=r"fast_dev_run.*Fit without it"):
        muter.unlearn(net, [1])


# -- the pieces ---------------------------------------------------------------------------------------------------


def test_hashes_are_of_content_alone():
    x, y = torch.randn(9, 3, 5), torch.arange(9)
    seen = RowHashes()
    for batch in ((x[:4], y[:4]), (x[4:], y[4:])):
        seen.add(batch)
    assert seen.positions([(x.flip(0), y.flip(0))]) == (list(range(9)), 0)
    assert torch.equal(seen.hashes({"a": x, "b": y}), seen.hashes({"a": x.clone(), "b": y, "name": ["n"] * 9}))
    other = x.clone()
    other[2, 1, 3] += 1e-6
    assert seen.positions([(other, y)]) == ([0, 1, 3, 4, 5, 6, 7, 8], 1)
    assert seen.positions([(x, y + (y == 5))]) == ([0, 1, 2, 3, 4, 6, 7, 8], 1)  # the label belongs to the row
    assert seen.positions([(x[:, :, [1, 0, 2, 3, 4]], y)])[0] == []  # and the order of its numbers


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.int32, torch.float64, torch.complex64]
)
def test_hashes_of_any_dtype(dtype):
    x = (torch.arange(24).reshape(6, 4) % 7 % 3).to(dtype)
    seen = RowHashes()
    seen.add([x[:3]])
    assert set(seen.positions([[x]])[0]) >= {0, 1, 2}


def test_long_rows_are_hashed_in_parts(monkeypatch):
    x = torch.randn(7, 100)
    whole = RowHashes().hashes([x])
    monkeypatch.setattr("lightning_muter.model.rows._AT_ONCE", 250)
    assert torch.equal(RowHashes().hashes([x]), whole)


def test_batches_without_tensors_tell_nothing():
    seen = RowHashes()
    seen.add({"text": ["a"]})
    assert not seen.readable


def test_iterating_tells_for_samplers_that_repeat_themselves():
    assert reached_by_iterating(DataLoader(DATA, batch_sampler=Pairs())) == list(range(30))
    assert reached_by_iterating(DataLoader(DATA, sampler=list(range(60)))) is None
    with pytest.raises(LookupError):
        reached_by_iterating(DataLoader(DATA, sampler=Halves()))
    with pytest.raises(LookupError):
        reachable(DataLoader(ConcatDataset([DATA, DATA]), batch_sampler=Pairs()))
    assert reachable(DataLoader(DATA, 7, sampler=RandomSampler(DATA, replacement=True))) is None


class Split(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(DATA, 16, sampler=SubsetRandomSampler(range(40)))


class Unknown(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(DATA, 16, sampler=Halves())


def test_the_command_takes_the_rows_that_the_loader_reaches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Net().state_dict(), "pytorch-lightning_version": L.__version__}, "a.ckpt")
    command = ["snapshot", "--model", f"{__name__}.Net", "--ckpt_path", "a.ckpt", "--trainer.accelerator", "cpu"]
    command += ["--trainer.logger", "false", "--threat_model.norm", "l2", "--threat_model.eps", "0.03", "--data"]
    assert cli.main([*command, f"{__name__}.Unknown", "--out", "b.ckpt"]) == 1
    assert "Halves yields other rows each time" in capsys.readouterr().err
    assert cli.main([*command, f"{__name__}.Split"]) == 0
    assert Snapshot.load("a.muter.snapshot").absent == list(range(40, 60))
    unlearning = ["unlearn", "--model", f"{__name__}.Net", "--data", f"{__name__}.Split", "--ckpt_path", "a.ckpt"]
    unlearning += ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--forget.indices"]
    assert cli.main([*unlearning, "[3,50]"]) == 1
    assert cli.main([*unlearning, "[3]"]) == 0
    assert "39 are retained" in capsys.readouterr().out


class Team:
    """Processes as threads: what :class:`Shards` does with torch.distributed."""

    def __init__(self, world):
        self.world, self._barrier, self._said = world, threading.Barrier(world, timeout=20), [None] * world

    def member(self, rank):
        def gather(value):
            self._said[rank] = value
            self._barrier.wait()
            found = list(self._said)
            self._barrier.wait()
            return found

        return SimpleNamespace(rank=rank, world=self.world, gather=gather, share=lambda p: list(p[rank :: self.world]))


@pytest.mark.parametrize("kind", ["same", "part", "other rows", "other order", "other length"])
def test_processes_with_other_rows_or_another_order_are_refused(kind, monkeypatch):
    halves = {
        "same": (DATA, DATA),
        "part": (DATA, DATA),
        "other rows": (Subset(DATA, range(30)), Subset(DATA, range(30, 60))),
        "other order": (DATA, Subset(DATA, torch.randperm(60).tolist())),
        "other length": (DATA, Subset(DATA, range(50))),
    }[kind]
    team, here = Team(2), threading.local()
    monkeypatch.setattr("lightning_muter.preflight.trained_rows.Shards.current", lambda: here.shards)

    def work(rank):
        here.shards = team.member(rank)
        dataset = halves[rank]
        sampler = list(range(40)) if kind == "part" else DistributedSampler(dataset, 2, rank)
        loader = DataLoader(dataset, 10, sampler=sampler)
        trainer = SimpleNamespace(
            train_dataloader=loader, world_size=2, precision_plugin=SimpleNamespace(convert_input=lambda batch: batch)
        )
        rows = TrainedRows(trainer, Net())
        for batch in loader:
            rows.batch(batch)
        return rows.positions()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work, rank) for rank in range(2)]
    if kind.startswith("other"):
        for future in futures:
            with pytest.raises(UnsuitableError, match=r"other processes|datasets of \[50, 60\] rows"):
                future.result()
    else:
        assert [f.result() for f in futures] == [None if kind == "same" else list(range(40))] * 2


def test_a_split_by_sampler_is_noted_before_the_fit():
    (found,) = inspect_loaders([DataLoader(DATA, 16, sampler=SubsetRandomSampler(range(40)))])
    assert found.level == "note"
    assert "reaches 40 of 60 samples" in found.what
