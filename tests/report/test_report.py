"""The HTML report: whole, self-contained, honest about its numbers, safe with any text."""

import base64
import io
import itertools
import os
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from PIL import Image

from contnet.report.curves import by_iteration, loss_curve, running_median, score_curve
from contnet.report.detection import write_detection_report
from contnet.report.page import Curves, Facts, Gallery, Tiles, write_page
from contnet.report.pictures import Box, ReportImage, place_tag

CLASS_NAMES = ("circle", "<b>square</b>")
VOID = {"meta", "link", "br", "img", "hr", "input"}
SUMMARY = {"command": "train_net.py A 'b' \"c\" & <d>", "box AP": 61.2345, "seed": 17}

pytestmark = pytest.mark.numpy1


class Page(HTMLParser):
    """All tags with attributes, and the text; raises where tags are not properly nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag, **wanted):
        wanted = {key.rstrip("_"): value for key, value in wanted.items()}
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]

    def words(self):
        return " ".join(" ".join(self.text).split())


def images():
    y, x = np.mgrid[:48, :64]
    ramp = np.stack([3 * x, 4 * y, 128 + 0 * x], axis=-1).astype(np.uint8)
    truth = [Box((4, 5, 30, 40), 0), Box((20.5, 10, 60, 44), 1)]
    found = [Box(np.array([5.0, 6, 31, 39]), 0, 0.876)]
    return [
        ReportImage("one.jpg", ramp, {"Ground truth": truth, "Detections": found}),
        ReportImage('two <&"> .jpg', ramp[::-1, ::-1], {"Ground truth": [], "Detections": []}),
    ]


def metrics():
    lines = []
    for i in range(60):
        lines.append({"iteration": i, "total_loss": 3.0 - i / 50, "loss_cls": 1.5, "lr": 0.0777})
    lines.append({"iteration": 29, "bbox/AP": 33.4567, "bbox/AP50": 71.25})
    last = {"bbox/AP": 61.2345, "bbox/AP50": 88.875, "bbox/APl": float("nan")}
    lines.append({"iteration": 59, **last, "bbox/AP-circle": 64.5})
    return lines


def write(path, **changes):
    arguments = {
        "title": "A run <of> ours & more",
        "images": images(),
        "metrics": metrics(),
        "summary": SUMMARY,
        "class_names": CLASS_NAMES,
    }
    return write_detection_report(path, **{**arguments, **changes})


@pytest.fixture
def html(tmp_path):
    return write(tmp_path / "report.html").read_text(encoding="utf-8")


def test_returns_its_path_and_makes_the_folder(tmp_path):
    path = tmp_path / "new" / "report.html"
    assert write(str(path)) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_parses_as_one_document(html):
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert [len(page.all(tag)) for tag in ("html", "head", "body", "main", "h1")] == [1] * 5
    assert page.all("html")[0]["lang"] == "en"


def test_is_self_contained(html):
    assert "http://" not in html and "https://" not in html
    assert not re.search(r"@import|<script|<link|<iframe|url\((?!#)", html)
    for _, attributes in Page(html).tags:
        assert "src" not in attributes
        for key in ("href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/jpeg;base64,"))


def test_forbids_itself_the_network(html):
    (policy,) = Page(html).all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy["content"]


def test_references_resolve_and_ids_are_unique(html):
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    references = re.findall(r"""(?:href="#|url\(#)([^")]+)""", html)
    assert references and set(references) <= set(ids)


def test_text_is_escaped(html):
    page = Page(html)
    assert "<title>A run &lt;of&gt; ours &amp; more</title>" in html
    assert "A run <of> ours & more" in page.words()
    assert SUMMARY["command"] in page.words()
    assert "<b>square</b>" in page.words() and 'two <&"> .jpg' in page.words()
    assert not page.all("of") and not page.all("b") and not page.all("d")


HOSTILE = """</title></svg><script>alert(1)</script>" onload="alert(1)' onload='alert(1)"""


def test_no_text_becomes_markup(tmp_path):
    """Names of files, classes, views, metrics and facts may be anything."""
    views = {HOSTILE: [Box((4, 5, 30, 40), 0)], f"no {HOSTILE}": []}
    html = write(
        tmp_path / "report.html",
        title=HOSTILE,
        images=[ReportImage(HOSTILE, np.zeros((48, 64, 3), np.uint8), views)],
        metrics=[{"iteration": 1, f"loss_{HOSTILE}": 1.0, f"bbox/AP-{HOSTILE}": 2.0}],
        summary={HOSTILE: HOSTILE},
        class_names=[HOSTILE],
    ).read_text()
    page = Page(html)
    assert not page.all("script")
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    labels = [attributes["aria-label"] for attributes in page.all("svg", class_="picture")]
    assert labels == [f"{HOSTILE} of {HOSTILE}: {HOSTILE}", f"no {HOSTILE} of {HOSTILE}: none"]
    assert page.all("section")[0]["aria-label"] == HOSTILE
    assert f"loss_{HOSTILE}" in page.text  # in the table
    # Title, heading, name and value of the fact, class in its table and in the legend, name of the
    # image, title of the box and its label, captions of the views.
    assert page.words().count(HOSTILE) >= 11


# Escapes of terminals, another reading direction, no valid text, TeX that is none, and length.
UNSEEN = "cat\x1b[2J\x00\u202egpj\ud800\n$x_{$ 猫"


def test_no_text_hides_or_breaks_the_page(tmp_path, recwarn):
    boxes = [Box((4, 5, 30, 40), 0), Box((4, 5, 30, 40), 1)]
    long = "y" * 10**7
    page = write(
        tmp_path / "report.html",
        title=UNSEEN,
        images=[ReportImage(long, np.zeros((48, 64, 3), np.uint8), {UNSEEN: boxes})],
        metrics=[{"iteration": 1, f"loss_{UNSEEN}": 1.0, f"loss_{long}": 1.0}],
        summary={UNSEEN: UNSEEN, long: long},
        class_names=[UNSEEN, long],
    )
    html = page.read_bytes().decode()
    assert len(html) < 10**6
    assert all(char.isprintable() or char == "\n" for char in html)
    shown = r"cat\x1b[2J\x00\u202egpj\ud800\n$x_{$ 猫"
    assert f">loss_{shown}</text>" in html and f"<h1>{shown}</h1>" in html
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


def test_sections_in_any_order_and_number(tmp_path):
    """A page is what it is given: here one of a classifier, with two galleries."""
    rows = {i: {"total_loss": 2.0 - i, "classification/top1": 40.0 + i} for i in range(2)}
    top1 = score_curve(
        rows, ["classification/top1"], ylabel="%", label="Top-1 by iteration", caption="Accuracy."
    )
    truth, wrong = ({"shown": []}, {"shown": [], "again": [Box((1, 1, 9, 9), 1)]})
    blank = np.zeros((12, 12, 3), np.uint8)
    galleries = [
        Gallery(heading, ["cat", "dog"], [ReportImage(heading, blank, views)])
        for heading, views in (("Right", truth), ("Wrong", wrong))
    ]
    curves = Curves("Accuracy", [top1], ["classification/top1"], rows)
    sections = [*galleries, curves, Facts("Facts", {"epochs": 2}), Tiles({"top-1": "41.0"})]
    html = write_page(tmp_path / "page.html", "A classifier", sections).read_text()
    page = Page(html)
    assert re.findall("<h2>(.*?)</h2>", html) == ["Right", "Wrong", "Accuracy", "Facts"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert [a["href"] for a in page.all("use") if "href" in a] == ["#image-2-0"]
    assert "top-1 41.0" in page.words() and "Average precision" not in html
    assert page.all("svg", **{"aria-label": "Top-1 by iteration"})


def test_holds_every_image(html):
    embedded = Page(html).all("image")
    assert len(embedded) == 2
    for item, attributes in zip(images(), embedded, strict=True):
        data = base64.b64decode(attributes["href"].partition(",")[2])
        picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert picture.shape == item.image.shape
        assert np.abs(picture.astype(float) - item.image).mean() < 6


def test_each_image_is_shown_with_truth_and_detections(html):
    labels = [a["aria-label"] for a in Page(html).all("svg", class_="picture")]
    assert labels == [
        "Ground truth of one.jpg: circle, <b>square</b>",
        "Detections of one.jpg: circle 0.88",
        'Ground truth of two <&"> .jpg: none',
        'Detections of two <&"> .jpg: none',
    ]
    captions = re.findall("<figcaption>((?:Ground|Det).*?)</figcaption>", html)
    assert captions[:2] == ["Ground truth: 2 boxes", "Detections: 1 box"]


def test_boxes_are_drawn_where_they_are(html):
    drawn = [a for a in Page(html).all("rect") if "stroke" in a and a["x"] == "20.5"]
    assert [(a["y"], a["width"], a["height"]) for a in drawn] == [("10.0", "39.5", "34.0")]
    assert re.search(r"<title>circle 0\.88 at 5, 6, 31, 39</title>", html)


def test_labels_stay_in_the_image_and_avoid_each_other():
    taken = []
    for _ in range(4):
        place = place_tag(Box((70, 0, 110, 50), 0), (40, 10), (100, 80), taken)
        assert 0 <= place.x <= 60 and 0 <= place.y <= 70
        assert (place.width, place.height) == (40, 10)
        taken.append(place)
    assert len(set(taken[:3])) == 3
    assert not any(a.y < b.y + 10 and b.y < a.y + 10 for a, b in itertools.pairwise(taken))


def test_summary_and_last_numbers_are_said(html):
    words = Page(html).words()
    for text in ("box AP 61.2", "box AP50 88.9", "last loss 1.820", "seed 17", "61.23"):
        assert text in words


def test_all_values_are_listed(html):
    body = html[html.index('<table class="numbers">') :]
    rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("<tr>")[1:62]]
    assert rows[0] == ["iteration", "total_loss", "loss_cls", "bbox/AP", "bbox/AP50", "bbox/APl"]
    assert rows[1] == ["0", "3", "1.5", "", "", ""]
    assert rows[30] == ["29", "2.42", "1.5", "33.46", "71.25", ""]
    assert rows[60] == ["59", "1.82", "1.5", "61.23", "88.88", "nan"]
    assert "0.0777" not in html


def test_class_scores_are_listed(html):
    assert re.search(r"<th[^>]*>circle</th><td>64.50</td>", html)


def test_curves_are_drawn_and_named(html):
    labels = [a.get("aria-label") for a in Page(html).all("svg")]
    assert labels[:2] == ["Loss against iteration", "Average precision against iteration"]
    for key in ("total_loss", "loss_cls", "bbox/AP", "bbox/AP50", "iteration"):
        assert re.search(f"<text[^>]*>{key}</text>", html)
    assert "currentColor" in html and "#010203" not in html


def test_a_falling_loss_falls_in_the_curve():
    rows = {i: {"total_loss": 5.0 - i / 10} for i in range(40)}
    path = re.search(r'<path d="(M[^"]*)" clip-path[^>]*stroke-width: 2.2', loss_curve(rows).body)
    heights = [float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", path.group(1))]
    assert len(heights) >= 2 and heights == sorted(heights)  # In SVG, y grows downwards.


def test_running_median_ignores_a_spike():
    values = [1.0] * 100
    values[50] = 1000.0
    assert running_median(values) == [1.0] * 100
    assert running_median([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]


def test_later_lines_of_an_iteration_hold():
    lines = [
        {"iteration": 5, "total_loss": 1.0, "lr": 2.0},
        {"iteration": 3, "total_loss": 4.0},
        {"iteration": 5, "total_loss": 0.5},
    ]
    merged = by_iteration(lines)
    assert list(merged.items()) == [(3, {"total_loss": 4.0}), (5, {"total_loss": 0.5, "lr": 2.0})]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"iteration": 0, "total_loss": float("nan")}],
        [{"iteration": 0, "total_loss": float("inf"), "bbox/AP": 0.0}],
        [{"iteration": 9, "bbox/AP": 12.5}],
        [{"iteration": 9, "total_loss": 1.5}],
    ],
)
def test_scarce_metrics(tmp_path, lines):
    html = write(tmp_path / "report.html", metrics=lines, images=[]).read_text()
    page = Page(html)
    has_loss = any("total_loss" in line for line in lines)
    has_ap = any("bbox/AP" in line for line in lines)
    assert len(page.all("svg")) == has_loss + has_ap
    assert "Detections beside" not in html


def test_same_input_same_bytes(tmp_path):
    assert write(tmp_path / "a").read_bytes() == write(tmp_path / "b").read_bytes()


def test_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    write(tmp_path / "report.html")
    assert dict(matplotlib.rcParams) == before


def test_a_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    path = write(tmp_path / "report.html")
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, title="other")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4, 3))]
)
def test_wrong_images(tmp_path, array):
    with pytest.raises(ValueError, match="expected a uint8 image"):
        write(tmp_path / "report.html", images=[ReportImage("x", array, {})])


@pytest.mark.parametrize("index", [-1, 2])
def test_unknown_class(tmp_path, index):
    found = [Box((0, 0, 4, 4), index, 0.5)]
    item = ReportImage("x", np.zeros((8, 8, 3), np.uint8), {"Detections": found})
    with pytest.raises(ValueError, match="has no name"):
        write(tmp_path / "report.html", images=[item])
    assert not list(tmp_path.iterdir())
