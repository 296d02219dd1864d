"""Reports in a real browser: light and dark, on a desktop and on a phone."""

import pytest

from hafrm_ds.evaluation.refusal.measures import REFUSALS_FOLDER
from hafrm_ds.evaluation.report.writing import write_comparison_report, write_report
from tests.evaluation.report.chromium import DESKTOP, PHONE, PROGRAM, Chromium
from tests.evaluation.report.folders import (
    write_comparison,
    write_evaluation,
    write_group_run,
    write_refusals,
    write_run,
    write_sweep,
)
from tests.evaluation.report.test_sweep_page import SHARES_AND_SIZES, planted

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed")

OVERFLOWING = """
[...document.querySelectorAll('main *')].filter(each =>
    !each.closest('.scroll, pre, svg') && each.getBoundingClientRect().right > innerWidth + 0.5).length
"""
OVERLAPPING_LABELS = """
[...document.querySelectorAll('svg.chart')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    return boxes.flatMap(([one, a], place) => boxes.slice(place + 1)
        .filter(([_, b]) => a.left < b.right - 1 && b.left < a.right - 1)
        .filter(([_, b]) => a.top < b.bottom - 2 && b.top < a.bottom - 2)
        .map(([other, _]) => `${svg.getAttribute('aria-label').slice(0, 40)}: ${one} / ${other}`));
})
"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('svg.chart text')].map(text =>
    parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a))
"""
CONTRAST = """
(() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const light = colour => {
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const style = getComputedStyle(document.documentElement), card = light(style.getPropertyValue('--card'));
    const ratio = name => {
        const other = light(style.getPropertyValue(name));
        return (Math.max(card, other) + 0.05) / (Math.min(card, other) + 0.05);
    };
    return Object.fromEntries(['--text', '--muted', ...[1, 2, 3, 4, 5, 6, 7, 8].map(n => `--series-${n}`)]
        .map(name => [name, ratio(name)]));
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / name) for name in ("a_run_with_quite_a_long_name_that_goes_on", "two")]
    evaluation, methods = folder / "evaluation", folder / "methods"
    evaluation.mkdir()
    sweep = folder / "sweep"
    write_sweep(sweep, SHARES_AND_SIZES | {"data.train.portion": [":80", ":320"]}, planted)
    write_comparison(methods, {"baseline": [0.6], "haf-alpha0.2-beta0.1": [0.8]}, range(2))
    write_refusals(methods / REFUSALS_FOLDER)
    return (
        write_report(runs[0]),
        write_comparison_report(runs, folder / "both.html"),
        write_report(write_evaluation(evaluation)),
        write_report(methods),
        write_report(sweep),
        write_report(write_group_run(folder / "groups")),
        write_report(write_refusals(folder / "refused")),
    )


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_nothing_overflows_or_overlaps(browser, pages, width, tmp_path):
    for page in pages:
        browser.open(page, width, "light")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(OVERFLOWING) == 0
        assert browser.evaluate(OVERLAPPING_LABELS) == []
        assert browser.evaluate(SMALLEST_TEXT) > 8.5
        columns = "getComputedStyle(document.querySelector('.grid')).gridTemplateColumns.split(' ').length"
        assert browser.evaluate(columns) == (1 if width == PHONE else 3)
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        noted = {event["method"] for event in browser.events}
        assert not noted & {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}
        requested = [
            event["params"]["request"]["url"] for event in browser.events if "request" in event.get("params", {})
        ]
        assert all(url.startswith(("file:", "data:")) for url in requested)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_told_from_its_background(browser, pages, scheme):
    browser.open(pages[0], DESKTOP, scheme)
    is_dark = browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert is_dark == (scheme == "dark")
    contrast = browser.evaluate(CONTRAST)
    assert min(contrast["--text"], contrast["--muted"]) > 4.5  # WCAG 2.2, texts
    assert min(contrast.values()) > 3  # and graphics
    line = "getComputedStyle(document.querySelector('svg.chart [style*=\"series-1\"]')).stroke"
    assert browser.evaluate(line) == ("rgb(86, 180, 233)" if is_dark else "rgb(0, 114, 178)")
