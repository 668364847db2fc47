"""Tests the HTML report: complete, self-contained, correct, and safe with any text."""

import base64
import gzip
import hashlib
import io
import itertools
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from contnet.report.curves import Line, Plot, by_iteration, running_median, series
from contnet.report.page import (
    ContactSheet,
    Curves,
    Facts,
    Gallery,
    Matrix,
    Notes,
    Table,
    Thumbnail,
    Tiles,
    write_page,
)
from contnet.report.pictures import Box, ReportImage, place_tag, shrink

CLASS_NAMES = ("circle", "<b>square</b>")
VOID = {"meta", "link", "br", "img", "hr", "input"}
SUMMARY = {"command": "train_net.py A 'b' \"c\" & <d>", "box AP": 61.2345, "seed": 17}

pytestmark = pytest.mark.numpy1


class Page(HTMLParser):
    """Reads all tags with attributes, and the text; fails if tags are not properly nested."""

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
        if not self.open or self.open[-1] not in ("style", "script"):
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


ROWS = {i: {"total_loss": 3.0 - i / 50, "loss_cls": 1.5} for i in range(60)}
ROWS[29]["bbox/AP"] = 33.4567
ROWS[59] |= {"bbox/AP": 61.2345, "bbox/APl": float("nan")}
COLUMNS = ["iteration", "total_loss", "loss_cls", "bbox/AP", "bbox/APl"]


def curves(rows=ROWS, columns=COLUMNS, title="Losses"):
    lines = [Line(key, *series(rows, key)) for key in columns[1:]]
    return Curves("Curves", [Plot(title, "iteration", "loss", lines)], columns, list(rows.items()))


def sections(**changes):
    parts = {
        "tiles": Tiles({"box AP": "61.2", "last loss": "1.820"}),
        "facts": Facts("The run", SUMMARY),
        "curves": curves(),
        "gallery": Gallery("Images", CLASS_NAMES, images()),
    }
    return list({**parts, **changes}.values())


def write(path, title="A run <of> ours & more", **changes):
    return write_page(path, title, sections(**changes))


@pytest.fixture
def html(tmp_path):
    return write(tmp_path / "report.html").read_text(encoding="utf-8")


def plots_of(html):
    """Yields the JSON of each plot."""
    for text in re.findall(r'<script type="application/json">(.*?)</script>', html):
        yield json.loads(text)


def test_returns_its_path_and_makes_the_folder(tmp_path):
    path = tmp_path / "new" / "report.html"
    assert write(str(path)) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_parses_as_one_document(html):
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert [len(page.all(tag)) for tag in ("html", "head", "body", "main", "h1")] == [1] * 5
    assert page.all("html")[0]["lang"] == "en"


def without_scripts(html):
    return re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


def test_is_self_contained(html):
    page = without_scripts(html)
    assert "http://" not in page and "https://" not in page
    assert not re.search(r"@import|<link|<iframe|url\((?!#)", page)
    for tag, attributes in Page(html).tags:
        assert tag != "script" or "src" not in attributes
        for key in ("href", "xlink:href", "src"):
            assert attributes.get(key, "#").startswith(("#", "data:image/jpeg;base64,"))


def policy_of(html):
    (policy,) = Page(html).all("meta", **{"http-equiv": "Content-Security-Policy"})
    return policy["content"]


def test_forbids_itself_the_network_and_foreign_scripts(html):
    policy = policy_of(html)
    assert "default-src 'none'" in policy and "eval" not in policy
    (scripts,) = re.findall("script-src ([^;]*)", policy)
    run = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert scripts == " ".join(f"'sha256-{each}'" for each in hashes) and len(run) == 2


def test_a_page_without_curves_and_galleries_runs_no_script(tmp_path):
    thumbnail = Thumbnail("a", "images/a b.jpg", np.zeros((4, 4, 3), np.uint8), "two boxes")
    html = write_page(tmp_path / "p", "T", [ContactSheet("Images", [thumbnail])]).read_text()
    assert "<script" not in html and policy_of(html).endswith("script-src 'none'")
    assert Page(html).all("a", href="images/a%20b.jpg")


def test_references_resolve_and_ids_are_unique(html):
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    references = re.findall(r"""(?:href="#|url\(#)([^")]+)""", without_scripts(html))
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
    """Names of files, classes, views, metrics and facts may be any text."""
    views = {HOSTILE: [Box((4, 5, 30, 40), 0)], f"no {HOSTILE}": []}
    blank = np.zeros((48, 64, 3), np.uint8)
    key = f"loss_{HOSTILE}"
    html = write(
        tmp_path / "report.html",
        title=HOSTILE,
        gallery=Gallery(
            HOSTILE,
            [HOSTILE],
            [ReportImage(HOSTILE, blank, views, HOSTILE, [HOSTILE], [HOSTILE])],
            HOSTILE,
        ),
        curves=curves({1: {key: 1.0}}, ["iteration", key], HOSTILE),
        facts=Facts("Facts", {HOSTILE: HOSTILE}),
        table=Table(HOSTILE, [HOSTILE, HOSTILE], [(HOSTILE, [HOSTILE])], HOSTILE),
        matrix=Matrix(HOSTILE, HOSTILE, [HOSTILE], [HOSTILE], np.ones((1, 1)), HOSTILE),
        notes=Notes(HOSTILE, [HOSTILE]),
    ).read_text()
    page = Page(html)
    assert [a for a in page.all("script") if a] == [{"type": "application/json"}]
    assert html.count("<script>") == html.count("</script>") - 1 == 2
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    labels = [attributes["aria-label"] for attributes in page.all("svg", class_="picture")]
    assert labels == [f"{HOSTILE} of {HOSTILE}: {HOSTILE}", f"no {HOSTILE} of {HOSTILE}: none"]
    assert page.all("section")[0]["aria-label"] == HOSTILE
    assert key in page.text  # in the table
    assert page.words().count(HOSTILE) >= 20


# Terminal escapes, another reading direction, text that is not valid, invalid TeX, and length.
UNSEEN = "cat\x1b[2J\x00\u202egpj\ud800\n$x_{$ 猫"


def test_no_text_hides_or_breaks_the_page(tmp_path):
    boxes = [Box((4, 5, 30, 40), 0), Box((4, 5, 30, 40), 1)]
    long = "y" * 10**7
    blank = np.zeros((48, 64, 3), np.uint8)
    page = write(
        tmp_path / "report.html",
        title=UNSEEN,
        gallery=Gallery("Images", [UNSEEN, long], [ReportImage(long, blank, {UNSEEN: boxes})]),
        curves=curves({1: {UNSEEN: 1.0, long: 1.0}}, ["iteration", UNSEEN, long]),
        facts=Facts("Facts", {UNSEEN: UNSEEN, long: long}),
    )
    html = without_scripts(page.read_bytes().decode())
    assert len(html) < 10**6
    assert all(char.isprintable() or char == "\n" for char in html)
    shown = r"cat\x1b[2J\x00\u202egpj\ud800\n$x_{$ 猫"
    assert f"<h1>{shown}</h1>" in html and f">{shown}</button>" in html


def test_sections_in_any_order_and_number(tmp_path):
    """A page has the given sections: here those of a classifier, with two galleries."""
    blank = np.zeros((12, 12, 3), np.uint8)
    views = {"shown": [], "again": [Box((1, 1, 9, 9), 1)], "painted": blank}
    galleries = [
        Gallery(heading, ["cat", "dog"], [ReportImage(heading, blank, each)])
        for heading, each in (("Right", {}), ("Wrong", views))
    ]
    parts = [*galleries, curves(), Facts("Facts", {"epochs": 2}), Tiles({"top-1": "41.0"})]
    html = write_page(tmp_path / "page.html", "A classifier", parts).read_text()
    page = Page(html)
    assert re.findall("<h2>(.*?)</h2>", html) == ["Right", "Wrong", "Curves", "Facts"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert [a["href"] for a in page.all("use") if "href" in a] == ["#image-2-0"]
    assert [a["alt"] for a in page.all("img")] == ["Right", "painted of Wrong"]
    assert "top-1 41.0" in page.words()
    assert page.all("li", style="background:#56b4e9") and "cat" not in page.words()


def test_a_matrix_is_shaded_by_shares_of_the_row(tmp_path):
    counts = np.array([[3, 1], [0, 0]])
    matrix = Matrix("Confusion", "truth", ["cat", "dog"], ["cat", "dog"], counts)
    html = write_page(tmp_path / "p", "T", [matrix]).read_text()
    assert re.findall("<td(.*?)>(.*?)</td>", html) == [
        (' style="--share:75%"', "3"),
        (' style="--share:25%"', "1"),
        ("", "0"),
        ("", "0"),
    ]


def test_images_know_what_they_are_found_by(tmp_path):
    blank = np.zeros((12, 12, 3), np.uint8)
    found = [
        ReportImage("a", blank, {}, classes=["dog", "cat"], errors=["missed"]),
        ReportImage("b", blank, {}, classes=["cat"], errors=["both", "missed"]),
    ]
    html = write_page(tmp_path / "p", "T", [Gallery("G", [], found)]).read_text()
    page = Page(html)
    assert [a["data-classes"].split() for a in page.all("section")] == [["1", "0"], ["0"]]
    assert [a["data-errors"].split() for a in page.all("section")] == [["0"], ["1", "0"]]
    assert re.findall("<option.*?>(.*?)\n?<", html) == ["all", "cat", "dog"]
    kinds = re.findall("<button[^>]*error[^>]*>(.*?)</button>", html)
    assert kinds == ["all", "missed", "both"]


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


def test_wrong_boxes_have_broken_outlines(tmp_path):
    boxes = [Box((4, 5, 30, 40), 0, 0.9, wrong=True), Box((4, 5, 30, 40), 0, 0.8)]
    item = ReportImage("x", np.zeros((48, 64, 3), np.uint8), {"Found": boxes})
    html = write_page(tmp_path / "p", "T", [Gallery("G", ["cat"], [item])]).read_text()
    assert len(Page(html).all("rect", class_="wrong")) == 1 and "cat 0.90, wrong at" in html


def test_images_are_made_smaller_with_their_proportions():
    image = np.zeros((400, 1000, 3), np.uint8)
    smaller, scale = shrink(image, 480)
    assert smaller.shape == (192, 480, 3) and scale == 0.48
    assert shrink(smaller, 480) == (smaller, 1.0)


def test_numbers_and_facts_are_said(html):
    words = Page(html).words()
    for text in ("box AP 61.2", "last loss 1.820", "seed 17", "61.23"):
        assert text in words


def test_all_values_are_listed(html):
    body = html[html.index('<table class="numbers">') :]
    rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("<tr>")[1:62]]
    assert rows[0] == COLUMNS
    assert rows[1] == ["0", "3", "1.5", "", ""]
    assert rows[30] == ["29", "2.42", "1.5", "33.46", ""]
    assert rows[60] == ["59", "1.82", "1.5", "61.23", "nan"]


def arrays_of(plot):
    """Returns x and y of the plot's sources."""
    found = []

    def look(value):
        if isinstance(value, dict):
            if value.get("name") == "ColumnDataSource":
                entries = dict(value["attributes"]["data"]["entries"])
                found.append({k: decode(v) for k, v in entries.items()})
            for below in value.values():
                look(below)
        elif isinstance(value, list):
            for below in value:
                look(below)

    def decode(array):
        data = gzip.decompress(base64.b64decode(array["array"]["data"]))
        return np.frombuffer(data, array["dtype"]).tolist()

    look(plot)
    return found


def test_curves_have_all_finite_values(html):
    (plot,) = plots_of(html)
    arrays = arrays_of(plot)
    assert len(arrays) == 4  # two figures of the same data
    assert arrays[0]["x"] == list(range(60))
    assert np.allclose(arrays[0]["y"], [3.0 - i / 50 for i in range(60)])
    assert arrays[2]["x"] == [29, 59] and arrays[3]["x"] == []
    names = re.findall("<button[^>]*line[^>]*>(.*?)</button>", html)
    assert names == COLUMNS[1:]


def test_long_curves_are_thinned_with_the_last_value(tmp_path):
    line = Line("a", range(100_000), range(100_000))
    section = Curves("C", [Plot("P", "x", "y", [line])], [], [], most=500)
    html = write_page(tmp_path / "p", "T", [section]).read_text()
    ((points,),) = map(arrays_of, plots_of(html))
    assert len(points["x"]) == 500 and points["x"][0] == 0 and points["x"][-1] == 99_999


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
def test_wrong_images(array):
    with pytest.raises(ValueError, match="expected a uint8 image"):
        Gallery("G", CLASS_NAMES, [ReportImage("x", array, {})])


@pytest.mark.parametrize("index", [-1, 2])
def test_unknown_class(index):
    found = [Box((0, 0, 4, 4), index, 0.5)]
    item = ReportImage("x", np.zeros((8, 8, 3), np.uint8), {"Detections": found})
    with pytest.raises(ValueError, match="has no name"):
        Gallery("G", CLASS_NAMES, [item])
