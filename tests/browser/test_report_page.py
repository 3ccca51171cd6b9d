"""report.html in a real browser: complete, usable on a phone and in the dark, and quiet on the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_sample

from pytest_roll_vllm import pages
from pytest_roll_vllm.pages.columns import WORDS

SAMPLES = pytest.mark.parametrize("sample", [report_sample.single, report_sample.several, report_sample.hostile])

# For every text that can be seen, its contrast with what is behind it, by the formula of WCAG 2.
CONTRAST = """
() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const luminance = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour[3] === 1) return colour;
      if (colour[3] !== 0) throw new Error("half transparent: " + element.outerHTML.slice(0, 80));
    }
    throw new Error("the page has no background");
  };
  const seen = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const [a, b] = [parse(getComputedStyle(element).color), behind(element)].map(luminance);
    seen.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.data.trim().slice(0, 40)]);
  }
  return seen;
}
"""


def shown_rows(page: Any) -> list[str]:
    """Return the ids of the contracts that the matrix shows."""
    return page.eval_on_selector_all(
        "tr[data-contract]", "rows => rows.filter(r => r.checkVisibility()).map(r => r.dataset.contract)"
    )


def with_outcome(document: dict[str, Any], *outcomes: str, runs: slice = slice(None)) -> list[str]:
    """Return the ids of the contracts with one of the outcomes in one of the runs."""
    columns = pages.columns([document])[runs]
    return sorted({id for one in columns for id, contract in one.contracts.items() if contract["outcome"] in outcomes})


@SAMPLES
@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_nothing_is_wider_than_the_screen(show: Callable[..., Any], sample: Callable[[], Any], width: int) -> None:
    page = show(sample(), width=width)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@SAMPLES
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_read(show: Callable[..., Any], sample: Callable[[], Any], dark: bool) -> None:
    page = show(sample(), dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    for button in page.query_selector_all("button"):
        if "passed" not in button.inner_text():
            button.click()
    texts = page.evaluate(CONTRAST)
    assert len(texts) > 50
    assert [text for text in texts if text[0] < 4.5] == []


def test_dark_is_dark_and_light_is_light(show: Callable[..., Any]) -> None:
    def brightness(dark: bool) -> int:
        page = show(report_sample.single(), dark=dark)
        return int(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))

    assert brightness(dark=True) < 60
    assert brightness(dark=False) > 200


def test_the_matrix_is_complete(show: Callable[..., Any]) -> None:
    document = report_sample.several()
    columns = pages.columns([document])
    page = show(document)
    heads = page.locator(".matrix thead th").all_inner_texts()
    assert heads == ["contract", *(one.label for one in columns)]
    rows = page.eval_on_selector_all(
        "tr[data-contract]",
        "rows => rows.map(r => [r.dataset.contract, ...[...r.cells].slice(1).map(c => c.innerText)])",
    )
    ids = sorted({id for one in columns for id in one.contracts})
    assert [row[0] for row in rows] == ids
    for id, *cells in rows:
        for column, cell in zip(columns, cells, strict=True):
            outcome = column.outcome(id)
            assert cell.endswith(WORDS[outcome].lower() if outcome else "not selected")


def test_filter_by_outcome(show: Callable[..., Any]) -> None:
    document = report_sample.several()
    page = show(document)
    page.click("button[data-outcome='failed']")
    assert shown_rows(page) == with_outcome(document, "failed")
    page.click("button[data-outcome='could not run']")
    assert shown_rows(page) == with_outcome(document, "failed", "could not run")
    assert page.inner_text("#shown") == f"{len(shown_rows(page))} of 36 contracts"
    details = page.eval_on_selector_all(
        "#details > details", "all => all.filter(one => one.checkVisibility()).map(one => one.dataset.contract)"
    )
    assert details == shown_rows(page)
    page.click("button[data-outcome='failed']")
    page.click("button[data-outcome='could not run']")
    assert len(shown_rows(page)) == 36


def test_filter_by_run(show: Callable[..., Any]) -> None:
    document = report_sample.several()
    page = show(document)
    page.select_option("#run", label="0.11.0-cpu")
    assert len(shown_rows(page)) == 35  # it has not selected one
    assert page.locator(".matrix thead th:visible").all_inner_texts() == ["contract", "0.11.0-cpu"]
    page.click("button[data-outcome='failed']")
    assert shown_rows(page) == with_outcome(document, "failed", runs=slice(2, 3))


def test_search(show: Callable[..., Any]) -> None:
    page = show(report_sample.several())
    page.fill("#search", "LORA safe")
    assert shown_rows(page) == ["lora-safe"]
    page.fill("#search", "no answer in 60")  # what only the details say
    assert shown_rows(page) == ["env-ranks-agree", "env-safe"]
    page.press("#search", "Enter")
    assert shown_rows(page) == ["env-ranks-agree", "env-safe"]
    page.fill("#search", "nothing of the kind")
    assert shown_rows(page) == []
    assert page.locator(".matrix tbody:visible").count() == 0


def test_a_contract_leads_to_its_details(show: Callable[..., Any]) -> None:
    page = show(report_sample.several())
    assert not page.evaluate("document.getElementById('contract-sl-safe').open")
    page.click("tr[data-contract='sl-safe'] a")
    page.wait_for_function("document.getElementById('contract-sl-safe').open")
    assert page.locator("#contract-sl-safe summary").is_visible()
    box = page.locator("#contract-sl-safe").bounding_box()
    assert 0 <= box["y"] < 800


def test_failures_are_open_and_say_what_to_do(show: Callable[..., Any]) -> None:
    document = report_sample.single()
    page = show(document)
    opened = page.eval_on_selector_all("#details > details[open]", "all => all.map(one => one.dataset.contract)")
    assert opened == with_outcome(document, "failed", "could not run")
    text = page.inner_text("#contract-wu-failed")
    for wanted in ("vLLM 0.12.0 (vllm), cuda, engine V1", "rank 1", "Left contains 3 more items", "Again:"):
        assert wanted in text
    assert document["contracts"]["wu-failed"]["again"] in text


def test_hostile_texts_stay_texts(show: Callable[..., Any]) -> None:
    page = show(report_sample.hostile())
    assert page.evaluate("window.hit") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    first = page.locator("tr[data-contract] a").nth(1)
    assert report_sample.HOSTILE in first.inner_text()
    first.click()  # its anchor is one, in spite of all
    assert page.evaluate("document.querySelector('details:target') !== null")


def test_without_script_everything_is_there(show: Callable[..., Any]) -> None:
    page = show(report_sample.several(), script=False)
    assert page.locator("tr[data-contract]:visible").count() == 36
    assert not page.locator(".filter").is_visible()


def test_keyboard_reaches_filter_and_details(show: Callable[..., Any]) -> None:
    page = show(report_sample.single())
    page.focus("button[data-outcome='failed']")
    page.keyboard.press("Space")
    assert shown_rows(page) == ["wu-failed"]
    assert page.get_attribute("button[data-outcome='failed']", "aria-pressed") == "true"


def test_the_page_is_one_file(show: Callable[..., Any], tmp_path: Path) -> None:
    show(report_sample.single())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
