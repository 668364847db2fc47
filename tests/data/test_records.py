"""Tests that records are read from their file with the same values and types."""

import math
import pickle

import numpy as np
import pytest
from annotated import described
from detectron2.structures import BoxMode

from contnet.data.pipeline.records import RecordFile, Records, write_records

VALUES = {
    "floats": [0.1, -0.0, 1e300, 5e-324],
    "not finite": [math.inf, -math.inf],
    "no floats": [],
    "whole numbers": [0, -1, 2**63 - 1, -(2**63), 2**63, 2**64],
    "a long number": 20230515123456789012345,
    "mixed numbers": [1, 2.0, True],
    "nothing": None,
    "a tuple": (1.5, 2.5, 3.5, 4.5),
    "a tuple in a tuple": (1, ("a", [2.0])),
    "a box mode": BoxMode.XYWH_ABS,
    "a crowd": {"size": [48, 64], "counts": b"a\x00\xff"},
    "keys that are numbers": {3: 0, 7: {1: "one"}},
    "umlauts": "ümlaut/ß.jpg",
    "a name that is no text": "caf\udce9.jpg",
    "polygons": [[1.0, 2.0, 3.0], [1, 2, 3], [1.0, 2]],
}


def write(path, values) -> RecordFile:
    records = [{"width": 4, "height": 3, "value": value} for value in values]
    write_records(path, records, {"ids": [1, 2**70]}, ["a.jpg", "caf\udce9.jpg"])
    return RecordFile(path)


@pytest.mark.parametrize("kind", VALUES)
def test_values_keep_their_types(tmp_path, kind):
    file = write(tmp_path / "records", [VALUES[kind], None, VALUES[kind]])
    expected = {"width": 4, "height": 3, "value": VALUES[kind]}
    assert described(file[0]) == described(file[2]) == described(expected)
    assert file[1]["value"] is None


def test_a_number_that_is_none_stays_so(tmp_path):
    (value,) = write(tmp_path / "records", [[math.nan]])[0]["value"]
    assert math.isnan(value)


def test_facts_and_names_stay(tmp_path):
    file = write(tmp_path / "records", [1, 2])
    assert described(file.facts) == described({"ids": [1, 2**70]})
    assert file.names == ["a.jpg", "caf\udce9.jpg"]


@pytest.mark.parametrize("value", [np.zeros(3), np.float32(1), {1, 2}, object()])
def test_what_cannot_be_packed_is_refused(tmp_path, value):
    with pytest.raises(TypeError):
        write(tmp_path / "records", [value])
    assert not list(tmp_path.iterdir())


def test_a_pickle_is_as_small_as_a_path(tmp_path):
    records = Records([write(tmp_path / "records", range(5000))], usable=False)
    state = pickle.dumps(records)
    assert len(state) < 1000
    assert pickle.loads(state)[4999] == records[4999]
