"""What is asked to be forgotten: seeded, disjoint, complete, and refused by name where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_muter.errors import ArgumentError
from lightning_muter.study import requests as s
from lightning_muter.study.data import ArrayDataset


@pytest.fixture
def data() -> ArrayDataset:
    y = torch.arange(100) % 4
    return ArrayDataset(torch.zeros(100, 2), y, num_classes=4, ids=[f"s{i}" for i in range(100)])


def test_fractions_are_nested_seeded_and_of_the_right_size(data: ArrayDataset) -> None:
    small, large = s.Fractions([0.01, 0.05]).scenarios(data, seed=3)
    assert (len(small.forgotten(0)), len(large.forgotten(0))) == (1, 5)
    assert set(small.forgotten(0)) <= set(large.forgotten(0))
    assert s.Fractions([0.05]).scenarios(data, seed=3)[0] == large
    assert s.Fractions([0.05]).scenarios(data, seed=4)[0] != large
    assert small.labels == ("1 %",)
    assert len(s.OnePoint().scenarios(data, 0)[0].forgotten(0)) == 1


def test_successive_requests_are_disjoint_and_add_up(data: ArrayDataset) -> None:
    (five,) = s.Successive(5, fraction=0.02).scenarios(data, seed=0)
    assert [len(five.forgotten(j)) for j in range(5)] == [2, 4, 6, 8, 10]
    assert five.labels[-1] == "5 x 2 %"
    assert set(five.forgotten(2)) == set(five.requests[0] + five.requests[1] + five.requests[2])
    (points,) = s.Successive(5, size=1).scenarios(data, seed=0)
    assert points.labels[1] == "2 x 1 point"


def test_whole_class_takes_exactly_that_class(data: ArrayDataset) -> None:
    (whole,) = s.WholeClass(2).scenarios(data, 0)
    assert whole.forgotten(0) == (data.targets == 2).nonzero().flatten().tolist()


def test_records_by_id_file_and_by_column(data: ArrayDataset, tmp_path: Path) -> None:
    ids = tmp_path / "ann.txt"
    ids.write_text("# Ann's records\ns7\n\ns3\ns7\n")
    (by_file,) = s.Records(ids).scenarios(data, 0)
    assert by_file.forgotten(0) == [3, 7]
    assert by_file.labels == ("ann",)
    table = tmp_path / "owners.csv"
    table.write_text("id,owner\ns7,ann\ns8,bob\ns3,ann\n")
    (by_column,) = s.Records(table=table, column="owner", value="ann").scenarios(data, 0)
    assert by_column.forgotten(0) == [3, 7]
    with pytest.raises(ArgumentError, match="column of"):
        s.Records(table=table, column="person", value="ann").scenarios(data, 0)
    with pytest.raises(ArgumentError, match="at least one id"):
        s.Records(table=table, column="owner", value="eve").scenarios(data, 0)
    ids.write_text("s7\nnobody\n")
    with pytest.raises(ArgumentError, match=r"nobody.*such as s0, s1, s2.*1 of 2 are unknown"):
        s.Records(ids).scenarios(data, 0)
    (known,) = s.Records(ids, unknown="skip").scenarios(data, 0)
    assert known.forgotten(0) == [7]
    ids.write_text("nobody\n")
    with pytest.raises(ArgumentError, match="1 of 1 are unknown"):  # nothing would be left to ask for
        s.Records(ids, unknown="skip").scenarios(data, 0)
    with pytest.raises(ArgumentError, match="'refuse' or 'skip'"):
        s.Records(ids, unknown="drop")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="existing file"):
        s.Records(tmp_path / "none.txt").scenarios(data, 0)


def test_impossible_settings_are_refused(data: ArrayDataset, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        s.Fractions([1.0]).scenarios(data, 0)
    with pytest.raises(ArgumentError, match="leave some"):
        s.Successive(10, size=10).scenarios(data, 0)
    with pytest.raises(ArgumentError, match="exactly one"):
        s.Successive(5)
    with pytest.raises(ArgumentError, match="label"):
        s.WholeClass(4).scenarios(data, 0)
    with pytest.raises(ArgumentError, match="exactly one"):
        s.Records()
    with pytest.raises(ArgumentError, match="new in each request"):
        s.Scenario(("a", "b"), ((1,), (1, 2)))
    two = ArrayDataset(torch.zeros(4, 1), torch.tensor([0, 1, 0, 1]), num_classes=2)
    with pytest.raises(ArgumentError, match="3 classes"):
        s.WholeClass(1).scenarios(two, 0)
    every = tmp_path / "all.txt"
    every.write_text("0\n1\n2\n3\n")
    with pytest.raises(ArgumentError, match="leave some"):
        s.Records(every).scenarios(two, 0)


def test_several_settings_in_their_order(data: ArrayDataset) -> None:
    found = s.Several([s.OnePoint(), s.Fractions([0.1, 0.2]), s.WholeClass(0)]).scenarios(data, 1)
    assert [x.labels[0] for x in found] == ["1 point", "10 %", "20 %", "class 0"]
