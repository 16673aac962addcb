"""The report in a browser: it fits, it can be read, and it is quiet."""

import os
import shutil

import pytest

from batchnorm.experiment.report import page
from batchnorm.experiment.results import Results
from report_results import results

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (390, 760, 1160, 1280)
VIEWS = pytest.mark.parametrize("width", WIDTHS)
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
KINDS = pytest.mark.parametrize("kind", ["pair-en", "pair-zh", "four-en", "hostile-zh"])

CONTRASTS = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = color => {
    const [r, g, b] = channels(color).slice(0, 3).map(c => c / 255)
      .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if ((channels(color)[3] ?? 1) === 1) return color;
    }
    throw new Error('no background');
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    const element = walker.currentNode.parentElement;
    if (!text || element.closest('style')) continue;
    const style = getComputedStyle(element);
    const ink = luminance(element.closest('svg') ? style.fill : style.color);
    const paper = luminance(behind(element));
    const [low, high] = [ink, paper].sort((a, b) => a - b);
    found.push({text, contrast: (high + 0.05) / (low + 0.05)});
  }
  return found;
}"""

CHART_TEXTS = """() => [...document.querySelectorAll('svg.chart text')].map(text => {
  const own = text.getBoundingClientRect();
  const chart = text.closest('svg').getBoundingClientRect();
  return {
    text: text.textContent,
    size: parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a,
    outside: Math.max(chart.left - own.left, own.right - chart.right, own.bottom - chart.bottom),
  };
})"""

OVERLAPS = """() => [...document.querySelectorAll('svg.chart')].flatMap(chart => {
  const boxes = [...chart.querySelectorAll('text')]
    .map(text => [text, text.getBoundingClientRect()]);
  return boxes.flatMap(([one, a], at) => boxes.slice(at + 1)
    .filter(([, b]) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom - 2 &&
      b.top + 2 < a.bottom - 2)
    .map(([other]) => one.textContent + ' | ' + other.textContent));
})"""

LINE_CONTRASTS = """() => {
  const style = getComputedStyle(document.documentElement);
  return ['--paper', '--line-1', '--line-2', '--line-3', '--line-4', '--link']
    .map(name => style.getPropertyValue(name).trim());
}"""


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is not on the PATH; install it, CI must not skip the page.")
        pytest.skip("chromium is not on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The address of a written page by its kind."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = results(
        ("batchnorm", "none"), layers={"<b>" + "嵌套的很长的名字." * 9: 6, "x" * 200: 40}
    )
    hostile["data"].update(source="y" * 300, stand_in=True)
    told = {
        "pair-en": (results(), "en"),
        "pair-zh": (results(), "zh"),
        "four-en": (results(("batchnorm", "scratch", "torch", "none")), "en"),
        "hostile-zh": (hostile, "zh"),
    }
    for kind, (raw, lang) in told.items():
        page.write(Results.model_validate(raw), folder / f"{kind}.html", lang)
    return {kind: (folder / f"{kind}.html").as_uri() for kind in told}


@pytest.fixture
def visit(browser, pages):
    """Opens a page in a fresh profile; afterwards it must not have complained or loaded."""
    contexts, complaints, requests = [], [], []

    def open_page(kind, width, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(pages[kind])
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert requests
    assert set(requests) <= set(pages.values())


@KINDS
@VIEWS
def test_nothing_is_wider_than_the_window(visit, kind, width):
    tab = visit(kind, width)
    for summary in tab.locator("summary").all():
        summary.click()
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    outside = tab.evaluate(
        """() => [...document.querySelectorAll('main *')]
          .filter(e => !e.closest('.scroll, svg'))
          .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
          .map(e => e.tagName + ' ' + e.className)"""
    )
    assert outside == []


@KINDS
@VIEWS
def test_the_texts_of_charts_can_be_read_and_stay_inside(visit, kind, width):
    found = visit(kind, width).evaluate(CHART_TEXTS)
    assert len(found) > 100
    assert min(found, key=lambda text: text["size"])["size"] >= 11
    assert [text for text in found if text["outside"] > 1] == []


@KINDS
def test_the_texts_of_a_chart_do_not_cover_each_other(visit, kind):
    assert visit(kind, 390).evaluate(OVERLAPS) == []


@pytest.mark.parametrize("kind", ["pair-en", "four-en"])
@SCHEMES
def test_every_text_stands_out_from_its_background(visit, kind, scheme):
    tab = visit(kind, 1280, scheme)
    found = tab.evaluate(CONTRASTS)
    assert len(found) > 300
    assert [text for text in found if text["contrast"] < 4.5] == []


def test_dark_and_light_differ(visit):
    colors = {
        scheme: visit("pair-en", 390, scheme).evaluate("getComputedStyle(document.body).color")
        for scheme in ("light", "dark")
    }
    assert colors["light"] != colors["dark"]


@SCHEMES
def test_every_line_stands_out_from_its_background(visit, scheme):
    paper, *lines = visit("four-en", 1280, scheme).evaluate(LINE_CONTRASTS)
    assert len(set(lines[:4])) == 4
    assert all(contrast(line, paper) >= 4.5 for line in lines)


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(color):
    red, green, blue = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_tables_open_by_keyboard_and_scroll_in_themselves(visit):
    tab = visit("pair-en", 390)
    assert not tab.locator("#curves table").is_visible()
    tab.locator("#curves summary").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#curves table").is_visible()
    assert tab.locator("#curves td").first.inner_text() == "batch norm"
    assert tab.evaluate(
        "() => { const s = document.querySelector('#curves .scroll');"
        " return s.scrollWidth > s.clientWidth && s.tabIndex === 0; }"
    )


@VIEWS
def test_charts_stand_side_by_side_only_where_there_is_room(visit, width):
    tab = visit("pair-en", width)
    boxes = [figure.bounding_box() for figure in tab.locator("#curves figure").all()]
    stacked = boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    assert stacked == (width == 390)


def test_the_links_lead_to_the_sections(visit):
    tab = visit("pair-zh", 390)
    tab.locator("nav a").last.click()
    box = tab.locator("#statistics h2").bounding_box()
    assert 0 <= box["y"] < 844


@VIEWS
def test_numbers_are_never_broken(visit, width):
    broken = visit("four-en", width).evaluate(
        """() => [...document.querySelectorAll('.tile dd, .values span, td')].filter(e => {
          const range = document.createRange();
          range.selectNodeContents(e);
          return new Set([...range.getClientRects()].map(r => r.top)).size > 1;
        }).map(e => e.textContent)"""
    )
    assert broken == []


def test_headings_go_down_in_order(visit):
    levels = visit("pair-en", 1280).evaluate(
        "() => [...document.querySelectorAll('h1,h2,h3')].map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
