"""Tests damaged shards: all images are unchanged, or the errors are reported."""

import shutil

import pytest
from damage import damaged, damaged_json, outcome
from hypothesis import given
from hypothesis import strategies as st
from imagenet import make_imagenet

from contnet.data.datasets.classification import ClassificationSource, read_set
from contnet.data.datasets.shard_writer import make_shards
from contnet.data.datasets.shards import read_manifest
from contnet.data.findings import ERROR, Findings
from contnet.data.pipeline.images import read_image


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = make_imagenet(tmp_path_factory.mktemp("drawn"), classes=3, train=3, val=1)
    make_shards(root / "imagenet" / "train", root / "train", samples_per_shard=5, workers=1)
    return root / "train"


def _read(folder) -> tuple[dict, list[str]]:
    """Returns the labels of a set's images by key, and the errors of the set."""
    findings = Findings()
    content = read_set(ClassificationSource(str(folder)), findings)
    for record in content.records:
        outcome(lambda record=record: read_image(record))
    return {each["image_id"]: each["label"] for each in content.records}, findings.lines(ERROR)


@pytest.mark.parametrize("suffix", [".tar", ".npz", ".json", ".txt"])
@given(st.data())
def test_damaged_shards(made, tmp_path_factory, suffix, data):
    whole, errors = _read(made)
    assert len(whole) == read_manifest(str(made))["images"] and not errors
    folder = tmp_path_factory.getbasetemp() / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)  # including times, by which the index checks the shards
    path = sorted(folder.glob(f"*{suffix}"))[0]
    how = damaged_json if suffix == ".json" else damaged
    path.write_bytes(data.draw(how(path.read_bytes())))
    found, errors = _read(folder)
    # A changed label or name cannot be detected, but no image may be left out.
    assert errors or len(found) == len(whole), f"{len(found)} of {len(whole)} images"
    assert errors or suffix == ".tar" or found == whole
