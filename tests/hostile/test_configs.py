"""Tests random configs and command lines: a run can start, or the error is one line."""

import itertools
import os
from functools import cache

import pytest
import yaml
from conftest import REPOSITORY, SMALL
from damage import JUNK, damaged, outcome
from hypothesis import given
from hypothesis import strategies as st

from contnet.config.nodes import flatten
from contnet.launch.arguments import build_run_settings, parse_arguments
from contnet.launch.preflight import check_inputs
from contnet.launch.preflight_config import load_checked_config

pytest_plugins = ["drawn_set"]

LEAVES = ("mask_rcnn_contti", "fcos_contti", "cityscapes/pspnet_contti", "imagenet/contti_strong")
OPTIONS = (
    *("--resume", "--eval-only", "--num-gpus", "--num-machines", "--machine-rank", "--dist-url"),
    *("--config-file", "--resume-from", "--nonsense", "-x", "--", "", "=", "0", "-1", "tcp://x:1"),
)
# Other YAML syntax than values.
SNIPPETS = (
    *(b"!!python/object/apply:os.system ['touch x']", b"&a [*a]", b"<<: *x", b"\t", b"---\n", b"%"),
    *(b"MODEL: {", b"_BASE_: ", b"_BASE_: http://127.0.0.1:9/x.yaml\n", b"_BASE_: /dev/null\n"),
)
_texts = st.one_of(JUNK.map(str), JUNK.map(repr), st.text(max_size=8))
_numbers = itertools.count()


@pytest.fixture(scope="module")
def base(drawn, tmp_path_factory) -> dict[str, dict]:
    """Returns configs on a drawn set, by name."""
    folder = tmp_path_factory.mktemp("configs")
    sets = [
        [s, str(drawn / f"annotations/instances_{s}.json"), str(drawn / s)]
        for s in ("train", "val")
    ]
    data = {"REGISTER": sets, "TRAIN": ["train"], "TEST": ["val"]}
    return {
        leaf: {
            "_BASE_": str(REPOSITORY / "configs" / f"{leaf}.yaml"),
            "DATASETS": data,
            "OUTPUT_DIR": str(folder / "run"),
        }
        for leaf in LEAVES
    }


@cache
def _keys(leaf: str) -> list[str]:
    """Returns all keys of a config."""
    cfg = load_checked_config(str(REPOSITORY / "configs" / f"{leaf}.yaml"))
    return [key for key, _ in flatten(cfg, cfg)]


def _check(*argv: str) -> None:
    """Runs the steps before a run's processes start."""

    def prepare():
        settings = build_run_settings(parse_arguments([str(word) for word in argv]))
        return check_inputs(settings)

    made, refused = outcome(prepare)
    assert made or refused


def _nested(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(into: dict, other: dict) -> dict:
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(into.get(key), dict)
        into[key] = _merge(dict(into[key]), value) if both else value
    return into


def _write(folder, data: bytes) -> str:
    path = folder / f"config{next(_numbers)}.yaml"
    path.write_bytes(data)
    return str(path)


@given(st.data())
def test_values_in_files(base, tmp_path_factory, monkeypatch, data):
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    leaf = data.draw(st.sampled_from(LEAVES))
    config = dict(base[leaf])
    for key in data.draw(st.lists(st.sampled_from(_keys(leaf)), min_size=1, max_size=3)):
        depth = data.draw(st.sampled_from([99, 99, 99, 1, 2]))  # a value, or one for a whole node
        value = data.draw(JUNK)
        config = _merge(config, _nested(".".join(key.split(".")[:depth]), value))
    text = yaml.safe_dump(config).encode(errors="surrogatepass")
    _check("--config-file", _write(tmp_path_factory.getbasetemp(), text), *SMALL[:2])


@given(st.data())
def test_bytes_of_files(base, tmp_path_factory, monkeypatch, data):
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.chdir(folder)
    whole = yaml.safe_dump(base[LEAVES[0]]).encode()
    content = data.draw(damaged(whole))
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(whole)))
        content = whole[:place] + data.draw(st.sampled_from(SNIPPETS)) + whole[place:]
    _check("--config-file", _write(folder, content), *SMALL[:2])
    assert not os.path.exists("x"), "it has run what a config says"


@given(st.data())
def test_command_lines(base, tmp_path_factory, monkeypatch, data):
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    leaf = data.draw(st.sampled_from(LEAVES))
    whole = yaml.safe_dump(base[leaf]).encode()
    argv = ["--config-file", _write(tmp_path_factory.getbasetemp(), whole), *SMALL[:2]]
    word = st.one_of(st.sampled_from(_keys(leaf)), st.sampled_from(OPTIONS), _texts)
    pair = st.tuples(st.sampled_from(_keys(leaf)), _texts).map(list)
    more = data.draw(st.lists(st.one_of(pair, pair, word.map(lambda each: [each])), max_size=3))
    _check(*argv, *itertools.chain(*more))
