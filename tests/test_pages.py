"""Pages of one file: what a reader sees, clicks and is told, in a real browser."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_train.pages import page
from tests.browser import Browser

NAUGHTY = "</script><b>&"
# How many pixels of the first chart have the color of its curve number `arguments[0]`.
PIXELS = """
const canvas = document.querySelector(".chart canvas"), { width, height } = canvas;
const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
copy.drawImage(canvas, 0, 0);
const wanted = color(`--c${arguments[0]}`).match(/\\w\\w/g).map((hex) => parseInt(hex, 16));
const pixels = copy.getImageData(0, 0, width, height).data;
let count = 0;
for (let at = 0; at < pixels.length; at += 4) count += wanted.every((value, i) => pixels[at + i] === value);
return count;
"""
LEGEND = ".legend button:nth-child(1)"


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Browser:
    """A browser with a page of all kinds of parts; x of the curves differ, and one has a gap."""
    steps = np.arange(1, 101)
    curves = [
        page.Curve(NAUGHTY, steps, 1 / steps, "seed 0"),
        page.Curve(NAUGHTY, steps, 2 / steps, "seed 1"),
        page.Curve("rising", [0, 50, 100, 110], [0.5, np.nan, 1.5, 1.75]),
    ]
    picture = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(picture, "PNG")
    rows = [[NAUGHTY, 3, 0.123456], ["b", 12345, None], ["c", 20, float("nan")]]
    made = page.page(
        NAUGHTY,
        page.section("Key figures", page.tiles([("best", 0.98765)]), page.text(NAUGHTY)),
        page.section("Tables", page.table(["name", "count", "value"], rows), page.folded("config", NAUGHTY)),
        page.section("Curves", page.chart("loss", "step", NAUGHTY, curves, markers=[(40, NAUGHTY)])),
        page.section("Bars", page.bars("of classes", [("cat", 0.5), (NAUGHTY, 0.25)], most=1)),
        page.section("Pictures", page.figure(NAUGHTY, picture.getvalue())),
    )
    (tmp_path / "page.html").write_text(made, encoding="utf-8")
    browser.open(tmp_path / "page.html")
    return browser


def test_a_curve_is_hidden_and_shown_by_a_click_on_its_name(opened: Browser) -> None:
    before = opened.run(PIXELS, 0), opened.run(PIXELS, 1)
    assert min(before) > 50
    opened.click(LEGEND)
    assert opened.run(PIXELS, 0) == 0 and opened.run(PIXELS, 1) > 50
    opened.click(LEGEND)
    assert (opened.run(PIXELS, 0), opened.run(PIXELS, 1)) == before
    assert opened.said() == [] and opened.fetched() == []


def test_what_is_given_is_shown_as_text_and_never_run(opened: Browser) -> None:
    shown = opened.run("return document.body.innerText")
    assert opened.run("return document.title") == NAUGHTY
    assert shown.count(NAUGHTY) == 6  # the title, a text, a cell, the legend, a bar and a picture
    assert opened.run("return document.querySelectorAll('main > * b').length") == 2  # of the two bars
    assert opened.run("return document.querySelector('img').naturalWidth") == 20
    for value in ("0.9877", "12,345", "0.1235", "nan", "–"):
        assert value in shown


def test_hover_tells_the_values_of_all_curves_at_a_step(opened: Browser) -> None:
    opened.move(".chart .u-over")  # the middle of 0 to 110, next to which the rising curve has a gap
    told = opened.run("return document.querySelector('.tip').innerText").split("\n")
    assert told[0] == "step 55"
    assert told[1:] == [f"{NAUGHTY} · seed 1", "0.03636", f"{NAUGHTY} · seed 0", "0.01818"]


def test_the_numbers_of_a_curve_are_those_that_were_given_and_are_smoothed_on_request(
    opened: Browser,
) -> None:
    x, one, _, rising = opened.run("return charts[0].u.data")
    assert x == [0, *range(1, 101), 110]
    assert one[1:101] == [float(np.float32(1 / step)) for step in range(1, 101)]
    assert [value for value in rising if value is not None] == [0.5, 1.5, 1.75]
    opened.run("const slider = document.querySelector('.chart input'); slider.value = 0.5; slider.oninput()")
    smooth = opened.run("return charts[0].u.data[2]")
    assert smooth[1] == one[1]
    assert smooth[2] == pytest.approx((0.25 * one[1] + 0.5 * one[2]) / 0.75)


def test_dragging_zooms_and_a_double_click_shows_all(opened: Browser) -> None:
    scale = "const { min, max } = charts[0].u.scales.x; return [min, max]"
    assert opened.run(scale) == [0, 110]
    width = opened.run("return document.querySelector('.u-over').clientWidth")
    opened.drag(".u-over", int(-0.3 * width), int(0.1 * width))
    assert opened.run(scale) == pytest.approx([22, 66], abs=0.5)
    opened.run(
        "document.querySelector('.u-over').dispatchEvent(new MouseEvent('dblclick', { bubbles: true }))"
    )
    assert opened.run(scale) == [0, 110]


def test_a_click_on_a_head_sorts_a_table_by_number(opened: Browser) -> None:
    column = "return [...document.querySelectorAll('tbody tr')].map((row) => row.cells[1].textContent)"
    opened.click("th:nth-child(2)")
    assert opened.run(column) == ["12,345", "20", "3"]
    opened.click("th:nth-child(2)")
    assert opened.run(column) == ["3", "20", "12,345"]


def test_light_and_dark_are_a_button_apart(opened: Browser) -> None:
    brightness = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    first, ink = opened.run(brightness), opened.run("return color('--c0')")
    opened.click("#theme")
    second = opened.run(brightness)
    assert sorted([min(first) > 200, min(second) > 200]) == [False, True]
    assert opened.run("return color('--c0')") != ink and opened.run(PIXELS, 0) > 50  # curves, too


def test_the_browser_refuses_whatever_a_page_would_fetch(opened: Browser) -> None:
    assert opened.said() == []
    opened.run("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/x.png' }))")
    opened.run("return fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert sum("Content Security Policy" in line for line in opened.said()) >= 2


def test_twenty_curves_of_5000_points_are_far_below_5_megabytes() -> None:
    random = np.random.default_rng(0)
    times = [np.cumsum(random.random(5000)) for _ in range(20)]  # no two alike
    curves = [(f"run {number}", x, random.random(5000)) for number, x in enumerate(times)]
    assert len(page.page("twenty", page.chart("loss", "time", "loss", curves))) < 2e6


def test_a_chart_without_points_and_a_table_without_rows_break_nothing(
    browser: Browser, tmp_path: Path
) -> None:
    empty = [page.chart("none", "step", "loss", []), page.chart("empty", "time", "loss", [("a", [], [])])]
    one = page.chart("one", "time", "loss", [("a", [5.0], [0.5]), ("b", [6.0], [np.nan])])
    made = page.page("empty", *empty, one, page.table(["a"], []), page.bars("none", []))
    (tmp_path / "empty.html").write_text(made, encoding="utf-8")
    browser.open(tmp_path / "empty.html")
    assert browser.run("return document.querySelectorAll('canvas').length") == 3
    assert browser.said() == []


def test_a_name_of_a_file_that_is_no_text_can_be_on_a_page() -> None:
    assert b"runs/\\udcff" in page.page("runs/\udcff").encode()
