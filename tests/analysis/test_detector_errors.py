"""Tests detector errors against counts by hand, and hotcoco against pycocotools."""

import contextlib
import io
import json

import numpy as np
import pytest
from boxes import make_boxes, make_run
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from contnet.analysis.detector_errors import ErrorSettings, count_errors
from contnet.utils.errors import UserError

pytest.importorskip("hotcoco")

RESULTS = "inference/boxes/coco_instances_results.json"


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Counts the errors of the small set's run, and of a run that finds everything."""
    root = tmp_path_factory.mktemp("errors")
    truth = make_boxes(root)
    objects = json.loads(truth.read_text())["annotations"]
    perfect = [(each["image_id"], each["category_id"], each["bbox"], 0.9) for each in objects]
    runs = [make_run(root / "run", truth), make_run(root / "perfect", truth, perfect)]
    files = [str(run / RESULTS) for run in (runs[0], runs[0], runs[1])]
    return count_errors(str(truth), files, ErrorSettings(score=0.5))


def kinds(**counts):
    return {**dict.fromkeys(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), 0), **counts}


def test_errors_by_kind(counted):
    one = kinds(Cls=1, Loc=1, Both=1, Dupe=1, Bkg=1, Miss=1)
    assert counted[0].counts == one | {"Bkg": 2} and counted[0].shown_counts == one
    assert counted[2].counts == kinds()


def test_errors_by_image(counted):
    assert counted[0].image_counts == {
        1: kinds(Dupe=1),
        2: kinds(Cls=1),
        3: kinds(Loc=1),
        4: kinds(Both=1, Miss=1),
        5: kinds(Bkg=1),
        6: kinds(),
    }


def test_confusion_with_the_background(counted):
    assert counted[0].category_ids == [3, 7]
    # Cats: images 1 and 5 are found, 2 is a dog, 3 and 4 are not found. Dogs: both are found.
    # Without an object: a duplicate, a location error and a background error; for dogs the "both".
    assert counted[0].confusion.tolist() == [[2, 1, 2], [0, 2, 0], [3, 1, 0]]
    assert counted[2].confusion.tolist() == [[5, 0, 0], [0, 2, 0], [0, 0, 0]]


def test_what_matches(counted):
    assert counted[0].right == {1: {0}, 4: {1}, 5: {0}, 6: {0}}
    assert counted[0].found == {1, 5, 6, 7}  # annotation ids: cats of 1 and 5, dogs of 4 and 6


def test_calibration(counted):
    # Of ten detections, these have scores from 0.9: 0.9 (right), 0.9 (wrong), 0.95, 0.95, 0.97.
    score, share, number = counted[0].calibration[-1]
    assert (number, share) == (5, 0.8) and score == pytest.approx(0.934)
    wrong = 0.2 + 0.55 + 0.6 + 0.7 + 0.8  # alone in their bins
    expected = (wrong + 5 * (0.934 - 0.8)) / 10
    assert counted[0].calibration_error == pytest.approx(expected)


def test_differences_of_runs(counted):
    first, same, perfect = counted
    assert first.differences == {}
    assert set(same.differences.values()) == {(0.0, 0.0, 0.0)}
    value, lower, upper = perfect.differences["AP"]
    assert value == pytest.approx(100 - first.metrics["AP"])
    assert 0 < lower <= value <= upper


def draw(seed, images=30, empty=()):
    """Draws random truth with crowds, equal scores and empty images, and detections."""
    rng = np.random.default_rng(seed)
    truth = {
        "images": [{"id": i, "width": 300, "height": 300} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"class {i}"} for i in (2, 5, 9)],
        "annotations": [],
    }
    found = []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 5) if image % 7 else 0):
            box = [*rng.uniform(0, 150, 2), *rng.uniform(4, 150, 2)]
            category = int(rng.choice([2, 5]))
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [float(value) for value in box],
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(rng.integers(0, 4)):
                moved = [float(v + rng.normal(0, 6)) for v in box[:2]] + [float(v) for v in box[2:]]
                label = category if rng.random() < 0.8 else 9
                found.append((image, label, moved, float(rng.integers(1, 20) / 20)))
    keys = ("image_id", "category_id", "bbox", "score")
    return truth, [dict(zip(keys, each, strict=True)) for each in found if each[0] not in empty]


def pycocotools(truth, found, limit=100):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.params.maxDets = [1, 10, limit]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats


def test_ap_is_that_of_pycocotools(tmp_path):
    truth, found = draw(1)
    many = [
        {**each, "image_id": 1, "score": each["score"] / 2} for each in found * 3
    ]  # more than 100 for an image and class
    cases = [found, found[:1], draw(2)[1], [*found, *many]]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for number, case in enumerate(cases):
        (tmp_path / f"{number}.json").write_text(json.dumps(case))
    files = [str(tmp_path / f"{number}.json") for number in range(len(cases))]
    counted = count_errors(str(tmp_path / "truth.json"), files, ErrorSettings(resamples=5))
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
    for each, case in zip(counted, cases, strict=True):
        expected = pycocotools(truth, case)
        for name, value in zip(names, expected, strict=False):
            value = np.nan if value < 0 else value
            assert each.metrics[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert counted[0].metrics["AP"] > 10


def test_what_hotcoco_cannot_take(tmp_path):
    truth, _ = draw(1)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text("[{}]")
    with pytest.raises(UserError, match="hotcoco cannot read"):
        count_errors(str(tmp_path / "truth.json"), [str(tmp_path / "found.json")], ErrorSettings())
