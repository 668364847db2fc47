"""Tests that each of our keys has its own comment, which explains it."""

import linecache

import pytest
from detectron2.config import defaults, get_cfg

from contnet.config import add_contnet_config, keys
from contnet.config.comments import find_definition, read_definitions
from contnet.config.nodes import flatten

CFG = get_cfg()
add_contnet_config(CFG)
KEYS = dict(flatten(CFG, CFG))
OURS = sorted(set(KEYS) - set(dict(flatten(get_cfg(), get_cfg()))) | {*read_definitions(keys)})


@pytest.mark.parametrize("key", OURS)
def test_every_key_of_ours_has_a_meaning(key):
    found = find_definition(key)
    assert found.ours and found.comment
    assert f"cfg.{key} = " in linecache.getline(found.file, found.line)


def test_every_key_is_found():
    assert [key for key in KEYS if find_definition(key) is None] == []


def test_the_key_of_an_extension_is_not():
    assert find_definition("MODEL.TOY.WIDTH") is find_definition("INPUT.CROP.TOY") is None


@pytest.mark.parametrize(
    ("key", "first", "last"),
    [
        # Over several lines; also behind the code; a group that lists its keys; below a rule.
        ("MODEL.WEIGHTS", "Path (a file path", "in the model zoo."),
        ("INPUT.MASK_FORMAT", "The ground truth mask", 'alternative: "bitmask"'),
        ("INPUT.CROP.ENABLED", "`True` if cropping", "training"),
        ("DATASETS", "Dataset", "Dataset"),
        # No comment of its own, below a key that has one.
        ("MODEL.MASK_ON", "", ""),
    ],
)
def test_comments_of_detectron2(key, first, last):
    comment = find_definition(key).comment
    assert comment.startswith(first) and comment.endswith(last) and bool(comment) == bool(first)
    assert not find_definition(key).ours


def test_the_comment_of_one_key_is_not_the_next_ones():
    found = read_definitions(defaults)
    assert found["VERSION"].comment and found["MODEL"].comment == ""
