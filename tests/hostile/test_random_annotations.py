"""Tests damaged annotation files: the doctor and training must agree."""

import itertools
import json

import pytest
from conftest import REPOSITORY, SMALL
from damage import changed, damaged, outcome, run_command
from hypothesis import given
from hypothesis import strategies as st

from contnet.commands.doctor import diagnose, main
from contnet.data.findings import ERROR
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.loader import build_train_loader
from contnet.launch.arguments import build_run_settings, configure, parse_arguments
from contnet.launch.preflight import check_inputs

pytest_plugins = ["drawn_set"]

LEAF = str(REPOSITORY / "configs" / "mask_rcnn_contti.yaml")
_numbers = itertools.count()


def _train(argv: list[str]) -> list[int]:
    """Runs the steps before training, and returns the image ids of a few batches."""
    settings = build_run_settings(parse_arguments(argv))
    check_inputs(settings)
    dicts = load_dataset_dicts(settings.cfg, settings.cfg.DATASETS.TRAIN, train=True)
    batches = itertools.islice(build_train_loader(settings.cfg, dicts, seed=1), 4)
    return [image["image_id"] for batch in batches for image in batch]


def _check_verdict(argv: list[str]) -> None:
    status, said = run_command(main, *argv)
    images, refused = outcome(lambda: _train([*argv, *SMALL]))
    assert images or refused
    if status and not refused:
        # Training only warns of likely mistakes.
        cfg, _ = configure(LEAF, argv[2:])
        found = diagnose(cfg, workers=1)
        assert not any(each.lines(ERROR) for each in found.values()), said
    assert status or not refused, f"the doctor has nothing against it:\n{said}\n{refused}"


@pytest.mark.parametrize("how", ["bytes", "values"])
@given(st.data())
def test_the_doctor_agrees_with_training(drawn, tmp_path_factory, how, data):
    name = f"drawn{next(_numbers)}"
    whole = (drawn / "annotations" / "instances_train.json").read_bytes()
    file = tmp_path_factory.getbasetemp() / f"{name}.json"
    if how == "bytes":
        file.write_bytes(data.draw(damaged(whole)))
    else:
        file.write_text(json.dumps(data.draw(changed(json.loads(whole)))))
    sets = [[name, str(file), str(drawn / "train")]]
    options = ["DATASETS.REGISTER", str(sets), "DATASETS.TRAIN", f"('{name}',)"]
    _check_verdict(["--config-file", LEAF, *options, "DATASETS.TEST", "()"])
