"""Tests the pages in a real browser: no errors, keyboard, light and dark mode, phone."""

import re
import shutil

import numpy as np
import pytest
from boxes import make_boxes, make_run

from contnet.commands.report import main
from contnet.prediction.outputs import write_contact_sheet
from contnet.report.curves import Line, Plot
from contnet.report.page import Curves, Thumbnail, write_page

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, PROGRAMS)), None)
PHONE, SCREEN = 390, 1200  # pixels
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>alert(1)</script>"
# JavaScript for the view of the first plot's figure.
VIEW = """const drawing = document.querySelectorAll(".drawing")[0];
const view = [...Bokeh.index.roots].find(each => drawing.contains(each.el)).child_views[0];"""


def wait_until(page, condition):
    """Replaces ``wait_for_function``, which needs eval in the page."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def of_view(page, expression):
    """Evaluates an expression of ``view``, the view of the first plot."""
    return page.evaluate(f"() => {{ {VIEW} return {expression}; }}")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, or in most containers.
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def show(browser):
    """Opens a page, and fails at the end if it logged an error or made a request."""
    opened, said = [], []

    def open_page(path, width=SCREEN, scheme="light", scripts=True):
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            java_script_enabled=scripts,
        )
        opened.append(context)
        page = context.new_page()
        page.on("console", lambda each: said.append(f"{each.type}: {each.text}"))
        page.on("pageerror", lambda each: said.append(str(each)))
        page.on("request", lambda each: said.append(each.url))
        page.goto(path.as_uri())
        if scripts:
            wait_until(page, "[...document.querySelectorAll('button')].every(each => !each.hidden)")
        return page

    yield open_page
    for context in opened:
        context.close()
    said = [each for each in said if not re.match(r"file:|data:|log: .*log level", each)]
    assert not said


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Writes the page of two runs."""
    pytest.importorskip("hotcoco")
    root = tmp_path_factory.mktemp("browser")
    truth = make_boxes(root)
    runs = [str(make_run(root / name, truth)) for name in ("run", "again")]
    assert main([*runs, "--output", str(root / "report.html")]) == 0
    return root / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_fits_and_is_drawn(show, report, width, scheme):
    page = show(report, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    plots = page.locator(".drawing")
    assert plots.count() >= 6
    for index in range(plots.count()):
        figure = plots.nth(index).locator(".bk-Figure")
        assert figure.count() == 1 and figure.bounding_box()["width"] > 0.7 * width / 3
    sizes = page.eval_on_selector_all(
        "main *:not(svg *)", "all => all.map(each => parseFloat(getComputedStyle(each).fontSize))"
    )
    assert min(sizes) >= 12


def luminance(colour):
    values = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind(show, report, scheme):
    page = show(report, scheme=scheme)
    pairs = page.eval_on_selector_all(
        "h1, h2, h3, p, td, th, button, select, option, output, figcaption, summary, .legend li",
        """all => all.map(each => {
          const behind = [];
          for (let at = each; at; at = at.parentElement) {
            behind.push(getComputedStyle(at).backgroundColor);
          }
          const solid = behind.find(colour => /^rgb\\(/.test(colour));
          return [getComputedStyle(each).color, solid, each.outerHTML.slice(0, 60)];
        })""",
    )
    assert len(pairs) > 100
    for text, behind, what in pairs:
        low, high = sorted([luminance(text), luminance(behind)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, what


def test_axes_follow_the_scheme(show, report):
    page = show(report, scheme="light")
    colour = "view.model.left[0].major_label_text_color"
    assert of_view(page, colour) == "#1c1d21"
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(300)
    assert of_view(page, colour) == "#ececf0"


def test_curves_by_keyboard(show, report):
    page = show(report)
    plot = page.locator(".plot").first
    line = plot.locator("button.line").first
    line.focus()
    assert line.get_attribute("aria-pressed") == "true"
    visible = "view.model.renderers.filter(r => r.tags[0] === 0).map(r => r.visible)"
    assert of_view(page, visible) == [True, True]  # the line and its points
    page.keyboard.press("Space")
    assert line.get_attribute("aria-pressed") == "false"
    assert of_view(page, visible) == [False, False]
    axis = "view.model.left[0].type"
    assert of_view(page, axis) == "LinearAxis"
    plot.locator("button.scale").focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert of_view(page, axis) == "LogAxis"
    assert of_view(page, visible) == [False, False]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_range_fits_the_lines_that_are_shown(show, report, scale):
    page = show(report)
    plot = page.locator(".plot").first
    if scale == "log":
        plot.locator("button.scale").click()
        page.wait_for_timeout(300)
    end = "view.model.y_range.end"
    assert 1.6 < of_view(page, end) < 2.1  # the total loss falls from 1.62
    for index in (0, 1):
        plot.locator("button.line").nth(index).click()
    page.wait_for_timeout(300)
    assert of_view(page, end) < 1.6  # the class losses fall from 0.9


def point_at(page, x, y):
    """Points at a position in the first plot; returns the tooltip's text."""
    canvas = page.locator(".drawing").first
    canvas.scroll_into_view_if_needed()
    scales = "[view.frame.x_scale, view.frame.y_scale]"
    left, top = of_view(page, f"{scales}.map((s, i) => s.compute([{x}, {y}][i]))")
    canvas.hover(position={"x": left, "y": top})
    page.wait_for_timeout(300)
    return " ".join(page.locator(".bk-tooltip-row-value").all_inner_texts())


def test_values_are_told_where_one_points(show, report):
    told = point_at(show(report), 59, 0.82)
    assert "total_loss" in told and "59" in told and "0.82" in told


def test_gallery_by_keyboard(show, report):
    page = show(report)
    gallery = page.locator(".gallery").first
    shown = lambda: gallery.locator(".pair:visible h3").all_inner_texts()  # noqa: E731
    assert len(shown()) == 6
    gallery.locator("button.error").first.focus()
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    kind = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert (kind, shown()) == ("both", ["4.png"])
    assert gallery.locator("output").inner_text() == "1 of 6 images"
    gallery.locator("button.error").first.focus()
    page.keyboard.press("Space")
    gallery.locator("select").focus()
    page.keyboard.press("d")  # dog
    page.keyboard.press("Enter")
    assert sorted(shown()) == ["2.png", "4.png", "6.png"]


def test_without_scripts_everything_is_there(show, report):
    page = show(report, scripts=False)
    assert page.locator(".pair:visible").count() == 12
    assert not page.locator(".filters").first.is_visible()
    page.locator("summary", has_text="numbers").first.click()
    assert page.locator("table", has_text="total_loss").first.is_visible()


def test_names_are_text_in_plots_too(show, tmp_path):
    line = Line(HOSTILE, [0, 1, 2], [1, 1, 1])
    section = Curves("C", [Plot(HOSTILE, HOSTILE, HOSTILE, [line])], ["x"], [])
    page = show(write_page(tmp_path / "p.html", "untouched", [section]))
    assert "onerror" in point_at(page, 1, 1)
    assert page.title() == "untouched"


@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_the_contact_sheet_fits(show, tmp_path, width):
    names = ["a.jpg", "b" * 80 + ".jpg", HOSTILE]
    picture = np.full((200, 320, 3), 90, np.uint8)
    thumbnails = [Thumbnail(name, "images/a.jpg", picture, "1 person, 12 cars") for name in names]
    facts = {"model": "/a/very/long/path/" * 8, "images": 3}
    page = show(write_contact_sheet(tmp_path, "What was found", facts, thumbnails), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img").count() == 3
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "A"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
