"""Tests tools/report.py on small runs: the content of the page, and what is left out."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest
from boxes import KINDS_BY_IMAGE, make_boxes, make_run
from conftest import QUICK, SMALL
from detectron2.data import DatasetCatalog, MetadataCatalog
from leaves import CONFIGS, SYSTEMS, TINY

from contnet.commands.report import main
from contnet.launch.main import main as train


class Page(HTMLParser):
    """The tables and the text of a page, by heading."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text()
        self.words, self.tables = {"": ""}, {}
        self.heading, self.tags = "", []
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "h2":
            self.heading = ""
        if tag == "table":
            self.tables[self.heading] = []
        if tag == "tr":
            self.tables[self.heading].append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag):
        while self.tags and self.tags.pop() != tag:
            pass

    def handle_data(self, data):
        if not self.tags or self.tags[-1] in ("script", "style"):
            return
        if self.tags[-1] == "h2":
            self.heading = data
        if self.tags[-1] in ("td", "th"):
            self.tables[self.heading][-1][-1] += data
        words = self.words.get(self.heading, "")
        self.words[self.heading] = " ".join(f"{words} {data}".split())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Makes the small set and two runs on it; the second one finds everything."""
    root = tmp_path_factory.mktemp("report")
    truth = make_boxes(root)
    objects = json.loads(truth.read_text())["annotations"]
    perfect = [(each["image_id"], each["category_id"], each["bbox"], 0.9) for each in objects]
    make_run(root / "run", truth)
    make_run(root / "perfect", truth, perfect, **{"SOLVER.BASE_LR": 0.25})
    return root


def report(*runs, options=()):
    output = runs[0] / "report.html"
    assert main([*map(str, runs), "--output", str(output), *options]) == 0
    if "boxes" in DatasetCatalog:  # other tests have a different set with this name
        DatasetCatalog.remove("boxes")
        MetadataCatalog.remove("boxes")
    return Page(output)


@pytest.fixture(scope="module")
def page(data):
    pytest.importorskip("hotcoco")
    return report(data / "run")


@pytest.fixture(scope="module")
def both(data):
    pytest.importorskip("hotcoco")
    return report(data / "run", data / "perfect", options=["--resamples", "50"])


def test_final_and_best_in_the_papers_columns(page):
    heading, final, best = page.tables["Results: boxes"]
    assert heading == ["evaluation", "iterations", "bbox AP", "bbox APl"]
    assert final == ["final", "100", "30.00", "n/a"]
    assert best == ["best", "50", "35.00", "n/a"]
    assert page.tables["By class: boxes"][1:] == [
        ["cat", "20.00", "20.00"],
        ["dog", "40.00", "40.00"],
    ]


def test_errors_are_those_counted_by_hand(page):
    rows = {row[0]: (row[1], row[3]) for row in page.tables["Errors by kind: boxes"][1:]}
    one = ("1", "1")
    assert rows == {
        **dict.fromkeys(("class", "location", "both", "duplicate", "missed"), one),
        "background": ("2", "1"),
    }
    assert page.tables["Confusion: run"] == [
        ["truth \\ predicted", "cat", "dog", "background"],
        ["cat", "2", "1", "2"],
        ["dog", "0", "2", "0"],
        ["background", "3", "1", "0"],
    ]


def test_precision_over_recall(page):
    table = page.tables["Precision and recall: boxes"]
    assert table[0] == ["recall", "all classes, IoU 0.5", "all classes, IoU 0.75"]
    # Cats, by score: 0.95 right, 0.9 right, 0.8 duplicate, 0.7 low, 0.55 corner: recall 2 of 5.
    # Dogs: 0.97 and 0.95 right, then 0.9, 0.6 and 0.2 wrong: recall 2 of 2.
    values = {row[0]: row[1] for row in table[1:]}
    assert values["0.0"] == values["0.4"] == "1"
    assert values["0.5"] == values["1.0"] == "0.5"
    # Of 101 levels of recall, cats reach 41, dogs all.
    assert page.words["Boxes of the last evaluation: boxes"].endswith(
        f"AP of run {(41 / 101 + 1) * 50:.2f} AP50 of run 70.30 AP75 of run 70.30"
    )


def test_images_are_found_by_their_errors(page):
    names = re.findall(
        r'<section class="pair" aria-label="(\d)\.png"[^>]*data-errors="([\d ]*)"', page.text
    )
    kinds = re.findall(r'<button[^>]*error[^>]*data-index="\d+">(.*?)</button>', page.text)
    found = {int(name): " ".join(kinds[int(i)] for i in places.split()) for name, places in names}
    assert found == KINDS_BY_IMAGE
    assert names[0][0] == "4" and names[-1][0] == "6"  # the worst first, the best last
    # Cats of 2, 3 and 4; the duplicate, the dogs of 2 and 4, the low cat, the corner.
    assert page.text.count(' class="wrong"') == 3 + 5


def test_curves_have_their_numbers(page):
    rows = page.tables["Curves"]
    assert rows[0] == ["iteration", "total_loss", "time", "bbox/AP", "loss_cls", "lr"]
    assert rows[-1] == ["99", "0.02", "0.5", "30.00", "0.505", "0.01"]


def test_the_page_is_small(page):
    without_pictures = re.sub('data:image/jpeg;base64,[^"]*', "", page.text)
    assert len(without_pictures) < 2e6


def test_two_runs_beside_each_other(both):
    assert both.tables["Config differences"] == [
        ["key", "run", "perfect"],
        ["SOLVER.BASE_LR", "0.001", "0.25"],
    ]
    rows = dict(both.tables["Difference from run: boxes"])
    value, interval = rows["AP"].split(", 95 % ")
    lower, upper = map(float, interval.split(" to "))
    assert value == "+29.7" and 0 < lower < 29.7 < upper
    assert "50 times" in both.words["Difference from run: boxes"]
    assert re.findall("<button[^>]*line[^>]*>(.*?)</button>", both.text)[:2] == [
        "run: total_loss",
        "perfect: total_loss",
    ]
    assert {"Confusion: run", "Confusion: perfect"} <= set(both.tables)


def test_without_the_data_set_curves_and_tables_stay(tmp_path):
    truth = make_boxes(tmp_path)
    run = make_run(tmp_path / "run", truth)
    truth.unlink()
    page = report(run)
    assert page.tables["Results: boxes"][1][2] == "30.00" and "Curves" in page.tables
    reason = page.words["Detections: boxes"]
    assert (
        str(truth) in reason and "left out" in reason and "Errors by kind: boxes" not in page.words
    )


def test_without_images_the_numbers_stay(tmp_path):
    pytest.importorskip("hotcoco")
    truth = make_boxes(tmp_path)
    run = make_run(tmp_path / "run", truth)
    for image in tmp_path.glob("*.png"):
        image.unlink()
    page = report(run)
    assert page.tables["Errors by kind: boxes"][1][1] == "1"
    assert "6 images cannot be shown" in page.words["Worst and best images: run"]


def test_without_predictions_it_says_how_to_get_them(tmp_path):
    run = make_run(tmp_path / "run", make_boxes(tmp_path))
    (run / "inference/boxes/coco_instances_results.json").unlink()
    page = report(run)
    assert "--eval-only" in page.words["Predictions: boxes"]
    assert page.tables["Results: boxes"][1][2] == "30.00"


def test_predictions_of_another_data_set_are_left_out(tmp_path):
    truth = make_boxes(tmp_path)
    run = make_run(tmp_path / "run", truth, [(77, 3, [1, 1, 5, 5], 0.5)])
    assert "other images or classes" in report(run).words["Detections: boxes"]


def test_without_hotcoco_it_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    page = report(make_run(tmp_path / "run", make_boxes(tmp_path)))
    assert "contnet[analysis]" in page.words["Left out: boxes"]
    assert page.tables["Precision and recall: boxes"][1][1] == "1"
    assert "Errors by kind: boxes" not in page.words


def test_where_hotcoco_differs_it_is_not_used(tmp_path):
    """pycocotools counts an object with the annotation id 0 as missed."""
    pytest.importorskip("hotcoco")
    truth = make_boxes(tmp_path)
    content = json.loads(truth.read_text())
    content["annotations"][0]["id"] = 0
    truth.write_text(json.dumps(content))
    page = report(make_run(tmp_path / "run", truth))
    assert "annotation id 0" in page.words["Left out: boxes"]
    assert "Errors by kind: boxes" not in page.words


def test_a_run_that_has_found_nothing(tmp_path):
    pytest.importorskip("hotcoco")
    page = report(make_run(tmp_path / "run", make_boxes(tmp_path), []))
    rows = {row[0]: row[1] for row in page.tables["Errors by kind: boxes"][1:]}
    assert rows == {**dict.fromkeys(rows, "0"), "missed": "7"}
    assert page.tables["Confusion: run"][1][1:] == ["0", "0", "5"]


def test_a_run_at_its_beginning(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 0, "total_loss": NaN}\n')
    page = report(tmp_path)
    assert "no evaluation" in page.words["Results"]
    assert "config.yaml" in page.words["Predictions: left out"]


def test_what_is_not_standard_is_said(tmp_path):
    """The page warns for each run, and about runs that were measured on different data."""
    runs = [tmp_path / "one", tmp_path / "other"]
    protocol = {"standard": False, "deviations": ["300 detections of an image count, not 100"]}
    for run, digest in zip(runs, "ab", strict=True):
        data = tmp_path / digest
        data.mkdir()
        make_run(run, make_boxes(data))
        file = run / "results.json"
        records = json.loads(file.read_text())
        more = {**protocol, "protocol": {"dataset_sha256": digest}}
        file.write_text(json.dumps([{**record, **more} for record in records]))
    words = report(runs[0]).words["Warnings: boxes"]
    assert "300 detections" in words and "different versions" not in words
    words = report(*runs).words["Warnings: boxes"]
    assert "one" in words and "other" in words and "different versions" in words


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert main([str(tmp_path), "--images", "0"]) == 2
    assert main([str(tmp_path), "--score", "7"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


@pytest.mark.parametrize("name", ["cityscapes/pspnet_contti", "imagenet/contti_strong"])
def test_what_a_training_leaves_is_enough(name, cityscapes_root, imagenet_here, tmp_path):
    small = QUICK if name.startswith("imagenet") else SMALL
    words = [*small, *TINY, *SYSTEMS[name][0].split(), "MODEL.CLASSIFIER.NUM_CLASSES", "7"]
    config = str(CONFIGS / f"{name}.yaml")
    options = ["SOLVER.MAX_ITER", "3", "OUTPUT_DIR", str(tmp_path / "run")]
    assert not train(["--config-file", config, *words, *options])
    assert not (tmp_path / "run" / "report.html").exists()  # without REPORT.ENABLED
    page = report(tmp_path / "run", options=["--images", "1"])
    (result,) = (words for heading, words in page.words.items() if "last evaluation" in heading)
    (record,) = json.loads((tmp_path / "run" / "results.json").read_text())
    metrics = record["metrics"]
    if "imagenet" in name:
        assert f"top-1 of run {metrics['classification']['top1']:.4g}" in result
        assert page.text.count('<section class="pair"') >= 2
    else:
        value = float(result.rpartition(" ")[2])
        assert value == pytest.approx(metrics["sem_seg"]["IoU"], abs=0.01)
        assert page.text.count('alt="Prediction of ') == 2
    assert "Left out" not in page.text
