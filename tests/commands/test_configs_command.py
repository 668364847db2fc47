"""Tests tools/configs.py: every shipped config is listed and resolved, every key explained."""

import os

import pytest
import yaml
from leaves import CONFIGS, LEAVES

from contnet.commands.configs import list_configs, main
from contnet.config import load_config
from contnet.config.differences import read_values
from contnet.config.nodes import flatten
from contnet.config.values import CHOICES, COUNTS, RANGES
from contnet.launch.preflight_config import CHOICES as MODEL_CHOICES
from contnet.launch.preflight_config import PARTS, load_checked_config

FCOS, PLAIN = (str(CONFIGS / f"{name}.yaml") for name in ("fcos_contm", "fcos_plain_contm"))


def printed(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main([*argv]) == 0
    return capsys.readouterr().out


def test_every_config_is_listed_with_what_it_is():
    rows = {
        os.path.relpath(row[0], CONFIGS).removesuffix(".yaml"): row[1:] for row in list_configs()
    }
    assert sorted(rows) == LEAVES
    systems = {
        "mask_rcnn_contm_3x": ("Mask R-CNN", "contnet_m"),
        "faster_rcnn_r50": ("Faster R-CNN", "resnet50"),
        "retinanet_contb": ("RetinaNet", "contnet_b"),
        "fcos_conts": ("FCOS", "contnet_s"),
        "cityscapes/pspnet_r50": ("PSPNet", "resnet50"),
        "imagenet/deit_s_strong": ("classifier", "deit_small_patch16_224"),
    }
    assert {name: rows[name][:2] for name in systems} == systems
    assert rows["mask_rcnn_contm_3x"][2:] == ("270000 it., 16 images", "coco_2017_train")


def test_words_filter(capsys):
    lines = printed(capsys, "list", "FCOS", "contnet_m", "plain").splitlines()
    assert len(lines) == 2 and "fcos_plain_contm" in lines[1]


@pytest.mark.parametrize("name", LEAVES)
def test_every_config_is_resolved(name, tmp_path, capsys):
    """The output of ``show``, with and without ``--changed``, loads as the same config."""
    file = str(CONFIGS / f"{name}.yaml")
    cfg = load_checked_config(file, ["SOLVER.BASE_LR", "0.5"])
    for options in ([], ["--changed"]):
        text = printed(capsys, "show", file, *options, "SOLVER.BASE_LR", "0.5")
        (tmp_path / "again.yaml").write_text(text)
        again = load_config(str(tmp_path / "again.yaml"))
        assert read_values(again.dump(), cfg) == read_values(cfg.dump(), cfg) and "&id" not in text
    assert len(text.splitlines()) < 120 and "_BASE_" not in text


def test_changed_values_differ_from_the_defaults(capsys):
    content = yaml.safe_load(printed(capsys, "show", FCOS, "--changed"))
    assert content["MODEL"]["META_ARCHITECTURE"] == "FCOS"
    assert "IMS_PER_BATCH" not in content["SOLVER"]  # 16 in the file, as in the defaults


def test_two_configs_differ_key_by_key(capsys):
    *lines, last = printed(capsys, "diff", FCOS, PLAIN).splitlines()
    assert "MODEL.FCOS.BOX_LOSS giou -> iou" in lines
    one, other = (dict(flatten(cfg, cfg)) for cfg in map(load_checked_config, (FCOS, PLAIN)))
    assert [line.split()[0] for line in lines] == sorted(k for k in one if one[k] != other[k])
    assert last.endswith(f" {len(lines)}")
    assert printed(capsys, "diff", FCOS, FCOS).splitlines() == ["keys that differ: 0"]


def test_every_key_is_explained(capsys):
    cfg = load_config(FCOS)
    known = dict(flatten(cfg, cfg))
    parts = printed(capsys, "explain", *known).split("\n\n")
    assert [part.split("\n")[0] for part in parts] == list(known)
    facts = [" ".join(part.split()) for part in parts]
    assert all(" default: " in each and " legal: " in each for each in facts)


@pytest.mark.parametrize("key", sorted({**CHOICES, **COUNTS, **RANGES, **MODEL_CHOICES, **PARTS}))
def test_the_checked_values_are_told(key, capsys):
    legal = " ".join(printed(capsys, "explain", key).split("legal:")[1].split())
    if key in RANGES:
        assert RANGES[key] in legal
    elif key in COUNTS:
        assert f"whole number from {COUNTS[key]}" in legal
    else:
        choices = {**CHOICES, **MODEL_CHOICES, **PARTS}[key]
        names = [name for name, _ in choices] if key in PARTS else list(choices)
        assert all(str(name) in legal for name in names)


def test_a_group_lists_its_keys(capsys):
    text = printed(capsys, "explain", "SOLVER.EMA")
    assert "ENABLED False" in text and "DECAY 0.9999" in text


def test_a_misspelt_key_names_the_nearest(capsys):
    assert main(["explain", "MODEL.CONTNET.TAP"]) == 2
    assert "MODEL.CONTNET.TAPS" in capsys.readouterr().err
