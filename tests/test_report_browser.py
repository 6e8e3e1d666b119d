"""The pages in Chromium, the network off: nothing fails, they open at once, and hover, filters, order, keys, themes,
paper and small screens work."""

import re
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_comparison_page import full
from test_report import HOSTILE, as_large_as_smollm2, make_report, untransformed

from phasequant.report import write_comparison, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install chromium or google-chrome"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is missing: pip install playwright"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """A function: file → its page, drawn; fails at the end on any request to the network, error or warning."""
    wrong: list[str] = []
    contexts = []

    def go(file: Path, width: int = 1280, dark: bool = False) -> Any:
        scheme = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(file.as_uri())
        page.wait_for_function("document.documentElement.dataset.ready !== undefined", timeout=10_000)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(make_report(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(with_verdicts(), tmp_path_factory.mktemp("compare"))


def with_verdicts() -> dict[str, Any]:
    """A comparison whose rows have intervals, verdicts, a second text and tasks."""
    result = full()
    words = ("better", "worse", "undecided")
    for index, row in enumerate(result["rows"]):
        for figure in row.get("figures", {}).values():
            mean = figure["ppl"]
            against = {"mean": 0.01 * index, "error": 0.01, "low": -0.1, "high": 0.1, "verdict": words[index % 3]}
            known = {"interval": {"low": 0.9 * mean, "high": 1.1 * mean}, "against": against}
            score = {"value": 0.5, "error": 0.02, "metric": "acc", "against": against}
            figure |= {**known, "texts": {"/a/b/c4.txt": {"ppl": mean, **known}}, "tasks": {"piqa": score}}
    first = {"value": 0.7, "error": 0.01, "metric": "acc", "against": None}
    original = {**result["original"], "tasks": {"piqa": first}}
    return {**result, "baseline": "quarot/uniform", "original": original, "tasks": {"names": ["piqa"], "limit": 9}}


def drawn(page: Any) -> list[str]:
    return page.eval_on_selector_all("[data-chart] > svg", "all => all.map(svg => svg.parentNode.dataset.chart)")


@pytest.mark.parametrize("made", [make_report, untransformed, as_large_as_smollm2])
def test_every_chart_is_drawn_at_once(tmp_path: Path, visit: Any, made: Any) -> None:
    file = write_page(made(), tmp_path)
    page = visit(file)  # the browser is warm now
    start = time.monotonic()
    again = visit(file)
    assert time.monotonic() - start < 3
    assert float(again.evaluate("document.documentElement.dataset.ready")) < 3000
    assert page.evaluate("document.documentElement.dataset.errors") == ""
    assert len(drawn(page)) == page.locator("[data-chart]").count() >= 9
    assert page.locator("[data-chart] > svg path.line").count() > 5


def test_hover_shows_the_tokens_text(report: Path, visit: Any) -> None:
    page = visit(report)
    chart = page.locator("#chart-spiking > svg")
    chart.scroll_into_view_if_needed()
    cell = chart.locator("rect").nth(3)  # the fourth token of the first row
    cell.hover()
    assert page.locator("#tip").is_visible()
    told = page.locator("#tip").inner_text()
    assert HOSTILE[3] in told and "0:3" in told and "0 qkv" in told and "3 × the median" in told and "channel 7" in told
    assert page.locator("#tip img").count() == 0
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_hover_shows_the_reason_of_every_8(report: Path, visit: Any) -> None:
    page = visit(report)
    page.locator("#chart-plan rect.b1").first.hover()
    assert page.locator("#tip").is_visible()
    assert page.locator("#tip").inner_text() == "block 0, down: 8 bits\n<i>rank 1</i>"


def test_keys_read_a_chart_aloud(report: Path, visit: Any) -> None:
    page = visit(report)
    page.locator("#chart-plan").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "End", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.locator("#spoken").inner_text().startswith("block 1, down: 4 bits")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.locator("#chart-norm").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#spoken").inner_text() == "all tokens, after block 0: 40"


def test_tab_reaches_every_control_and_chart(report: Path, visit: Any) -> None:
    page = visit(report)
    reached, name = [], "el => el.id || el.dataset.state || el.dataset.by || el.tagName"
    for _ in range(160):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(f"({name})(document.activeElement)"))
        if reached[-1] == "BODY":
            break
    assert {"theme", "first", "bits", "gsr", "side", "rows", "policy", "group", "text", "SUMMARY"} <= set(reached)
    assert {f"chart-{chart}" for chart in drawn(page)} <= set(reached)
    assert page.evaluate("document.activeElement.matches(':focus-visible') || document.activeElement === document.body")


def test_controls_change_charts(report: Path, visit: Any) -> None:
    page = visit(report)
    tall = page.locator("#chart-spiking > svg").bounding_box()["height"]
    page.select_option("[data-state=rows]", "raised")
    labels = page.locator("#chart-spiking text.tick.end").all_text_contents()
    assert [label for label in labels if re.match(r"\d+ ", label)] == ["0 down", "2 qkv"]
    assert page.locator("#chart-spiking > svg").bounding_box()["height"] < tall
    before = page.locator("#chart-plan rect.b1").count()
    page.select_option("[data-state=policy] >> nth=0", "uniform")
    assert before == 1 and page.locator("#chart-plan rect.b1").count() == 0
    switches = page.locator("[data-state=policy]")
    assert {switch.input_value() for switch in switches.all()} == {"uniform"} and switches.count() == 2
    assert page.locator("section[data-policy=uniform]").is_visible()


def test_filters_hide_rows_and_headers_sort(report: Path, visit: Any) -> None:
    page = visit(report)
    rows = page.locator("section[data-policy]:visible tbody tr")
    status = page.locator("section[data-policy]:visible .status")
    assert rows.count() == 2 and status.inner_text() == "2 rows"
    box = page.locator("section[data-policy]:visible [data-filters]")
    box.locator("[data-by=bits]").select_option("8")
    assert [row.is_visible() for row in rows.all()] == [True, False]
    assert status.inner_text() == "1 of 2 rows"
    box.locator("[data-by=bits]").select_option("")
    box.locator("[data-by=text]").fill("by HAND")
    assert [row.is_visible() for row in rows.all()] == [False, True]
    box.locator("[data-by=text]").fill("")
    header = page.locator("section[data-policy]:visible th button").first
    header.press("Enter")
    header.press("Enter")
    assert [row.locator("td").first.inner_text() for row in rows.all()] == ["2", "0"]
    assert header.locator("xpath=..").get_attribute("aria-sort") == "descending"
    assert page.locator("#spoken").inner_text() == "sorted by block, descending"


CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    const part = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return {y: 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b), a};
  };
  const ground = (el) => {
    for (; el; el = el.parentElement) {
      const found = light(getComputedStyle(el).backgroundColor);
      if (found.a > 0.99) return found.y;
    }
  };
  const wrong = [];
  for (const el of document.querySelectorAll("body *")) {
    const own = [...el.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !el.checkVisibility() || el.closest(".hidden, .skip, script, .cell")) continue;
    const svg = el instanceof SVGElement, style = getComputedStyle(el);
    const a = light(svg ? style.fill : style.color).y, b = ground(svg ? el.closest("div") : el);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) wrong.push([el.tagName, el.className.baseVal ?? el.className, el.textContent.slice(0, 30), ratio]);
  }
  return wrong;
}"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("which", ["report", "comparison"])
def test_text_stands_out_in_both_themes(request: pytest.FixtureRequest, visit: Any, which: str, dark: bool) -> None:
    page = visit(request.getfixturevalue(which), dark=dark)
    assert page.evaluate(CONTRAST) == []
    page.locator("#theme").click()
    assert page.evaluate(CONTRAST) == []
    assert page.locator("#theme").inner_text() == ("Dark theme" if dark else "Light theme")


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_a_phone_scrolls_down_only(request: pytest.FixtureRequest, visit: Any, which: str) -> None:
    page = visit(request.getfixturevalue(which), width=360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    narrow = page.eval_on_selector_all(
        "h1, h2, p, td, th, .step", "all => all.filter(el => el.checkVisibility() && el.clientWidth && "
        "!el.matches('.hidden') && el.textContent.trim().length > 3 && el.clientWidth < 18).map(el => el.outerHTML)"
    )  # fmt: skip
    assert narrow == []


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_paper_is_white_and_without_controls(request: pytest.FixtureRequest, visit: Any, which: str) -> None:
    page = visit(request.getfixturevalue(which), dark=True)
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRAST) == []
    assert not any(page.locator("select, nav, #theme").evaluate_all("all => all.map(el => el.checkVisibility())"))
    assert len(page.pdf(prefer_css_page_size=True)) > 10_000


def test_comparison_filters_sorts_and_switches(comparison: Path, visit: Any) -> None:
    page = visit(comparison)
    assert set(drawn(page)) == {"ppl", "gsr", "cost"}
    box = page.locator("[data-filters=all-verdicts]")
    box.locator("[data-by=verdict]").select_option("worse")
    box.locator("[data-by=text]").select_option("c4.txt")
    shown = page.locator("#all-verdicts tbody tr:visible")
    assert 0 < shown.count() < page.locator("#all-verdicts tbody tr").count()
    assert all("worse" in row and "c4.txt" in row for row in shown.all_inner_texts())
    button = page.locator("#all-rows th button", has_text="KV4").first
    column = button.evaluate("el => el.parentNode.cellIndex")
    values = f"rows => rows.map(row => row.cells[{column}]?.dataset.v ?? 'failed')"
    for word in ("ascending", "descending"):
        button.click()
        *numbers, last = page.locator("#all-rows tbody:last-of-type tr").evaluate_all(values)
        assert last == "failed" and len(numbers) == 18
        assert [*map(float, numbers)] == sorted(map(float, numbers), reverse=word == "descending")
        assert button.locator("xpath=..").get_attribute("aria-sort") == word
    page.select_option("[data-state=kv] >> nth=1", "16")
    assert {switch.input_value() for switch in page.locator("[data-state=kv]").all()} == {"16"}
    page.locator("#chart-ppl .dot").last.hover(force=True)
    assert "at KV16" in page.locator("#tip").inner_text() and "95 %" in page.locator("#tip").inner_text()
