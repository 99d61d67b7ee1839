"""Snapshots on disk: round trips to the last bit, damage, tampering under a valid hash, faults between any two writes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_muter.curvature.response.choose import NoResponse, Unconstrained
from lightning_muter.errors import ArgumentError, CorruptFileError, MismatchError, MuterError
from lightning_muter.snapshot.snapshot import Snapshot
from lightning_muter.snapshot.stored import KIND, key_path
from lightning_muter.snapshot.take import take_snapshot
from lightning_muter.storage import atomic as files
from lightning_muter.storage.container import read_container, write_container
from lightning_muter.storage.fingerprint import DigestKey
from tests.cases import THREATS, Case, case
from tests.faults import WatchedOs, listing, no_space
from tests.heads import forget_from, head_of, snapshot_of, state

CASES = [
    ("linear-softmax-bias", {}),
    ("affine-softmax-weighted", {"threat_model": THREATS["linf-box"]}),
    ("smooth-softmax-bias", {"tolerance": 0.05}),
    ("linear-softmax-bias", {"response": Unconstrained(7, "inputs"), "curvature": "ggn"}),
    ("linear-smoothing", {"response": "none", "curvature": "fisher"}),
]


def _same(a: Snapshot, b: Snapshot) -> None:
    (fields, first), (others, second) = a.encoded(), b.encoded()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    assert fields == others


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_a_loaded_snapshot_unlearns_as_the_one_in_memory(tmp_path, name, kwargs):
    one = case(name)
    snapshot = snapshot_of(one, **({"threat_model": THREATS["l2"]} | kwargs))
    path = tmp_path / "a.muter.snapshot"
    snapshot.save(path)
    loaded = Snapshot.load(path)
    _same(snapshot, loaded)
    assert repr(loaded.response) == repr(snapshot.response)
    assert path.stat().st_size < snapshot.nbytes + 20_000
    if isinstance(snapshot.response, Unconstrained):
        return  # its system is indefinite
    other = copy.deepcopy(one)
    forget_from(one, snapshot, [3, 5], retain=one.dataset, refine=1)
    forget_from(other, loaded, [3, 5], retain=other.dataset, refine=1)
    assert torch.equal(head_of(one), head_of(other))
    _same(snapshot, loaded)
    loaded.save(path)
    again = Snapshot.load(path)
    _same(snapshot, again)
    assert again.forgotten == [3, 5]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Case, Snapshot, Any]:
    one = case("linear-softmax-bias")
    snapshot = snapshot_of(one, THREATS["l2"])
    path = tmp_path_factory.mktemp("stored") / "a.muter.snapshot"
    snapshot.save(path)
    return one, snapshot, path


def test_the_key_lies_beside_it_for_its_owner_alone(stored):
    _, snapshot, path = stored
    key = key_path(path)
    assert key.name == "a.muter.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert DigestKey.load(key).key_id == snapshot.key_id
    assert key.read_bytes() not in path.read_bytes()


def test_keys_that_are_lost_or_others(stored, tmp_path):
    one, _, path = stored
    lonely = tmp_path / "b.muter.snapshot"
    lonely.write_bytes(path.read_bytes())
    loaded = Snapshot.load(lonely)
    with pytest.raises(MismatchError, match=r"key .* not at hand"):
        forget_from(one, loaded, [3])
    DigestKey.generate().keep(key_path(lonely))
    with pytest.raises(MismatchError, match=r"sealed with key .*backup"):
        Snapshot.load(lonely)
    with pytest.raises(MismatchError, match="another key"):
        Snapshot.load(path).save(lonely)
    assert lonely.read_bytes() == path.read_bytes()


def _tensor(name: str, change: Any) -> Any:
    def alter(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return alter


def _meta(**new: Any) -> Any:
    return lambda meta, tensors: meta.update(new)


def _fields(**new: Any) -> Any:
    return lambda meta, tensors: meta["fields"].update(new)


def _response(name: Any, module: str = "lightning_muter", **settings: Any) -> Any:
    return _fields(response={"name": name, "module": module, "settings": settings})


TAMPERED = {
    "weights of another shape": _tensor("theta_ref", lambda t: t[:, :-1]),
    "weights not finite": _tensor("theta_ref", lambda t: t * torch.nan),
    "blocks missing": _tensor("hessian.blocks", lambda t: t[:-1]),
    "hessian not finite": _tensor("hessian.blocks", lambda t: t / 0),
    "gradient of another shape": _tensor("gradient", lambda t: t.flatten()),
    "negative decay": _tensor("decay", lambda t: -t),
    "digests too few": _tensor("digests", lambda t: t[:-1]),
    "forgotten rows out of range": _fields(forgotten=[99]),
    "forgotten rows twice": _fields(forgotten=[1, 1]),
    "forgotten rows that are none": _fields(forgotten=[True]),
    "no weights": lambda meta, tensors: tensors.pop("theta_ref"),
    "a tensor that nothing names": lambda meta, tensors: tensors.update(more=torch.zeros(1)),
    "one tensor named twice": _fields(gradient={"$tensor": "decay"}),
    "no threat model": lambda meta, tensors: meta["fields"].pop("threat_model"),
    "another norm": _fields(threat_model={"norm": "l7", "eps": 0.1, "box": None}),
    "negative eps": _fields(threat_model={"norm": "l2", "eps": -0.1, "box": None}),
    "half a box": _fields(threat_model={"norm": "l2", "eps": 0.1, "box": [0.0]}),
    "no response": _fields(response="l2"),
    "response with other arguments": _response("l2", path="/"),
    "unknown curvature": _fields(curvature="kfac"),
    "another record": _meta(record="WideSnapshot"),
    "an unknown record": _meta(record="os.system"),
    "a field that is none": _fields(shell="true"),
    "a count that is none": _fields(n_total="many"),
    "another count": _fields(n_total=3),
    "inner options unknown": _fields(inner={"shell": "true"}),
    "figures that are none": _fields(figures=3),
    "a later version": _meta(version=99),
}


@pytest.mark.parametrize("alter", TAMPERED.values(), ids=TAMPERED.keys())
def test_tampered_content_with_a_valid_hash_is_refused(stored, tmp_path, alter):
    _, _, path = stored
    meta, tensors = read_container(path, KIND)
    alter(meta, tensors)
    target = tmp_path / "a.muter.snapshot"
    write_container(target, KIND, meta, tensors)
    with pytest.raises(CorruptFileError, match=r"a\.muter\.snapshot.*(backup|new one|release)"):
        Snapshot.load(target)


@pytest.mark.parametrize("name", ["theta_ref", "theta_base", "gradient", "hessian.blocks", "decay", "digests"])
def test_other_dtypes_than_were_written_are_refused(stored, tmp_path, name):
    _, _, path = stored
    meta, tensors = read_container(path, KIND)
    tensors[name] = tensors[name].to(torch.int32)
    write_container(tmp_path / "a.muter.snapshot", KIND, meta, tensors)
    with pytest.raises(CorruptFileError):
        Snapshot.load(tmp_path / "a.muter.snapshot")


@pytest.mark.parametrize("at", [0, 9, 70, -40, -25])
def test_damage_is_found_before_anything_is_read(stored, tmp_path, at):
    _, _, path = stored
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    (tmp_path / "b.muter.snapshot").write_bytes(content)
    with pytest.raises(CorruptFileError, match="backup"):
        Snapshot.load(tmp_path / "b.muter.snapshot")
    (tmp_path / "b.muter.snapshot").write_bytes(path.read_bytes()[:-17])
    with pytest.raises(CorruptFileError, match="cut short"):
        Snapshot.load(tmp_path / "b.muter.snapshot")


def test_a_full_disk_between_any_two_writes_leaves_the_old_file(stored, tmp_path, monkeypatch):
    one, snapshot, _ = copy.deepcopy(stored)
    path = tmp_path / "a.muter.snapshot"
    snapshot.save(path)
    before = listing(tmp_path)
    forget_from(one, snapshot, [3])
    calls = 0
    for n in range(1, 200):
        watched = WatchedOs(n, no_space)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", watched)
            memory = state(one.net, snapshot)
            try:
                snapshot.save(path)
            except OSError:
                assert state(one.net, snapshot) == memory
                files.recover_folder(tmp_path)
        if watched.count < n:
            break
        calls += 1
        now = listing(tmp_path)
        assert {k: v for k, v in now.items() if not k.startswith(".")}.keys() == before.keys()
        assert now["a.muter.key"] == before["a.muter.key"]
        loaded = Snapshot.load(path)
        assert loaded.forgotten in ([], [3])
        if loaded.forgotten == []:
            assert now["a.muter.snapshot"] == before["a.muter.snapshot"]
        path.write_bytes(before["a.muter.snapshot"])
    assert calls > 8


def test_a_first_save_that_fails_leaves_nothing(stored, tmp_path, monkeypatch):
    _, snapshot, _ = stored

    def fail(*args: Any) -> Any:
        raise OSError(28, "No space left on device (injected)")

    monkeypatch.setattr("lightning_muter.snapshot.stored.atomic_write", fail)
    with pytest.raises(OSError, match="injected"):
        snapshot.save(tmp_path / "a.muter.snapshot")
    assert listing(tmp_path) == {}


def test_a_response_that_was_not_imported_is_named_with_its_module(stored, tmp_path):
    _, _, path = stored
    meta, tensors = read_container(path, KIND)
    _response("mine", "their.project")(meta, tensors)
    target = tmp_path / "a.muter.snapshot"
    write_container(target, KIND, meta, tensors)
    with pytest.raises(MismatchError, match=r"response: 'mine' is not known.*l2.*'their\.project': import"):
        Snapshot.load(target)


def test_a_response_that_cannot_be_restored_is_not_saved(tmp_path):
    class Nameless(Unconstrained):
        pass

    class Forgetful(NoResponse):
        name = "forgetful"

        def __init__(self, power: float = 1.0) -> None:
            pass

    class Function(NoResponse):
        name = "function"

        def __init__(self, function: Any = abs) -> None:
            self.function = function

    snapshot = snapshot_of(case("linear-softmax-bias"), THREATS["l2"])
    for response, why in ((Nameless(), "name of its own"), (Forgetful(), "attributes.*power"), (Function(), "no code")):
        with pytest.raises(ArgumentError, match=rf"response.*{why}"):
            dataclasses.replace(snapshot, response=response).save(tmp_path / "a.muter.snapshot")
    assert listing(tmp_path) == {}


def test_retained_rows_and_their_errors(stored):
    one, snapshot, _ = copy.deepcopy(stored)
    assert snapshot.retained(one.dataset).indices == list(range(16))
    forget_from(one, snapshot, [0, 15])
    assert snapshot.retained(one.dataset).indices == list(range(1, 15))
    with pytest.raises(MismatchError, match=r"dataset.*3 samples.*16"):
        snapshot.retained(torch.utils.data.Subset(one.dataset, [1, 2, 3]))


def test_other_responses_share_maximisers_with_a_snapshot_of_the_same_weights():
    one = case("smooth-softmax-bias")
    first = snapshot_of(one, THREATS["l2"], tolerance=0.05)
    second = snapshot_of(one, THREATS["l2"], tolerance=0.05, like=first, response="none", polish=0)
    assert first.starts is not None
    assert second.starts is not None
    assert torch.equal(first.starts, second.starts)
    assert torch.equal(first.digests, second.digests)
    torch.testing.assert_close(first.gradient, second.gradient, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        one.head.weight.add_(1.0)
    with pytest.raises(MuterError, match="fingerprint"):
        snapshot_of(one, THREATS["l2"], like=first, polish=0)


def test_snapshot_figures_and_settings():
    one = case("linear-softmax-bias")
    before = head_of(one)
    snapshot = snapshot_of(one, THREATS["l2"])
    polish = snapshot.figures["polish"]
    assert polish["status"] == "converged"
    assert polish["stationarity_after"] < 1e-6 < polish["stationarity_before"]
    assert polish["step_norm"] == pytest.approx(float((head_of(one) - before).norm()))
    correct = float((one.net(one.x).argmax(1) == one.y).double().mean())
    assert polish["accuracy_after"] == pytest.approx(correct)
    assert snapshot.figures["counts"]["samples"] == 16
    untouched = case("linear-softmax-bias")
    with pytest.warns(UserWarning, match=r"not stationary.*polish=0"):
        take_snapshot(
            untouched.net, untouched.dataset, threat_model=THREATS["l2"], weight_decay=0.01, polish=0, progress=False
        )
    assert torch.equal(head_of(untouched), before)
    assert snapshot.loss_name == f"torch.nn.functional.{F.cross_entropy.__name__}"
