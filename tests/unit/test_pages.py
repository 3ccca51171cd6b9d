"""The pages say what the report says, all of it, and nothing in it can harm them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_sample
from report_sample import HOSTILE

from pytest_roll_vllm import pages
from pytest_roll_vllm.matrix import WORDS
from pytest_roll_vllm.pages.__main__ import main
from pytest_roll_vllm.pages.columns import Column
from pytest_roll_vllm.pages.text import clean, link

SAMPLES = pytest.mark.parametrize("sample", [report_sample.single, report_sample.several, report_sample.hostile])
WRITERS = pytest.mark.parametrize("write", [pages.html, pages.markdown])

# Attributes that hold text; all others are ours.
_FREE = {"value", "datetime", "href", "data-contract", "aria-label", "content", "id", "data-outcome"}


class Elements(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@SAMPLES
@WRITERS
def test_everything_is_on_the_page(
    sample: Callable[[], dict[str, Any]], write: Callable[[Sequence[Column]], str]
) -> None:
    columns = pages.columns([sample()])
    page = write(columns)
    text = re.sub(r"\s+", " ", Elements(page).text if write is pages.html else _unescaped(page))
    for column in columns:
        for id, one in column.contracts.items():
            for wanted in (_words(id), one["sentence"], one["reason"] if one["outcome"] != "passed" else ""):
                assert re.sub(r"\s+", " ", clean(wanted)).strip() in text
        for facts in (column.facts, column.packages, column.variables, column.settings):
            for name, value in facts.items():
                for part in (name, value) if value else ():
                    assert re.sub(r"\s+", " ", clean(part)).strip() in text
        for patch in column.patches.values():
            assert re.sub(r"\s+", " ", clean(patch["why"])).strip() in text


def _words(id: str) -> str:
    return id.partition("<")[0]  # Markdown shows ids as code, in which some characters stand for others


def _unescaped(page: str) -> str:
    return re.sub(r"\\([^a-zA-Z0-9\s])", r"\1", page).replace("&amp;", "&").replace("&#64;", "@")


def test_hostile_texts_make_no_elements() -> None:
    plain, spoiled = (
        Elements(pages.html(pages.columns([one()]))) for one in (report_sample.single, report_sample.hostile)
    )
    assert spoiled.text.count("window.hit=1") > 50
    # The same elements as of the harmless report, but for links, of which hostile references get none.
    assert {tag for tag, _ in spoiled.found} <= {tag for tag, _ in plain.found}
    assert [tag for tag, _ in spoiled.found].count("script") == 1
    for _, attributes in spoiled.found:
        assert not any(name.startswith("on") or name == "src" or name == "style" for name in attributes)
        assert not any(HOSTILE[:9] in str(value) for name, value in attributes.items() if name not in _FREE)
        assert re.match(r"#|https://github\.com/", attributes.get("href") or "#")


def test_hostile_texts_make_no_markdown() -> None:
    page = pages.markdown(pages.columns([report_sample.hostile()]))
    lines = re.sub(r"(`{3,})\n.*?\n\1", "", page, flags=re.DOTALL).splitlines()  # blocks of code
    for line in lines:
        prose = re.sub(r"`[^`]*`", "", line.replace("\\\\", "").replace("\\`", ""))
        assert not re.search(r"(?<!\\)<(?!https://github\.com)[a-z/]", prose), line
        assert not re.search(r"(?<!\\)\]\(javascript", prose), line
    tables = [line for line in lines if line.startswith("| ")]
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert set(columns) == {3, 4}  # a single run: facts have two cells, the matrix three


def test_a_block_of_code_cannot_be_left() -> None:
    assert pages.markdown.__module__
    from pytest_roll_vllm.pages.markdown import block

    assert block("a\n````\nb").splitlines() == ["`````", "a", "````", "b", "`````"]


def test_matrix_of_html_has_every_outcome() -> None:
    columns = pages.columns([report_sample.several()])
    cells = [
        (attributes["data-column"], attributes["data-outcome"])
        for tag, attributes in Elements(pages.html(columns)).found
        if tag == "td" and "data-column" in attributes
    ]
    ids = sorted({id for column in columns for id in column.contracts})
    assert len(cells) == 36 * 4
    assert cells == [(str(n), column.outcome(id) or "") for id in ids for n, column in enumerate(columns)]


def test_matrix_of_markdown_has_every_outcome() -> None:
    columns = pages.columns([report_sample.several()])
    page = pages.markdown(columns)
    for id in {id for column in columns for id in column.contracts}:
        outcomes = [column.outcome(id) for column in columns]
        row = next(line for line in page.splitlines() if line.startswith(f"| `{id}` | After"))
        assert [cell.strip("* ") for cell in row.split("|")[3:-1]] == [WORDS[one] if one else "-" for one in outcomes]


@WRITERS
def test_failures_come_with_all_that_is_needed(write: Callable[[Sequence[Column]], str]) -> None:
    page = write(pages.columns([report_sample.single()]))
    text = Elements(page).text if write is pages.html else page
    assert "vLLM 0.12.0 (vllm), cuda, engine V1" in _unescaped(text)
    assert "rank: 1" in text or "rank 1, " in text
    assert "Left contains 3 more items, first extra item: 'q'" in text
    assert 'vllm_contract(id="wu-failed")\'' in text
    assert 'vllm_contract(id="wu-passed")\'' not in text


def test_page_of_several_reports() -> None:
    first, second = report_sample.single(), report_sample.single()
    second["contracts"].pop("wu-failed")
    columns = pages.columns([first, second, report_sample.several()])
    assert [one.label for one in columns][:3] == ["0.12.0-cuda", "0.12.0-cuda (2)", "0.8.4-cpu-reference"]
    assert columns[1].outcome("wu-failed") is None
    assert "not selected" in pages.html(columns)


def test_reports_of_earlier_versions_lack_keys() -> None:
    report = report_sample.single()
    del report["patches"], report["environment"]
    for one in report["contracts"].values():
        del one["again"]
        for test in one["tests"]:
            del test["detail"], test["ranks"]
    columns = pages.columns([report])
    assert "wu-failed" in pages.html(columns)
    assert "wu-failed" in pages.markdown(columns)


def test_a_run_that_could_not_start_has_a_column() -> None:
    report = report_sample.several()
    nothing = dict.fromkeys(("vllm", "torch", "python", "device", "environment"))
    report["runs"][0] |= {**nothing, "problem": "no network", "patches": []}
    columns = pages.columns([report])
    assert "no network" in pages.html(columns)
    assert "no network" in pages.markdown(columns)


@WRITERS
def test_a_report_without_contracts(write: Callable[[Sequence[Column]], str]) -> None:
    empty = {**report_sample.single(), "contracts": {}, "patches": [], "notes": {}}
    assert "no contracts were tested" in write(pages.columns([empty]))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "the schema is None"),
        ([], "the schema is None"),
        ({"schema": "pytest-roll-vllm/report/3"}, "use the version that wrote the report, or a later one"),
        ({"schema": "pytest-roll-vllm/report/1"}, "not whole"),
    ],
)
def test_what_is_no_report_is_refused(document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pages.columns([document])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report_sample.single()))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "report.md"), str(tmp_path / "report.html")]
    assert main([str(tmp_path), str(tmp_path / "report.json"), "--output", str(tmp_path / "both")]) == 0
    assert "0.12.0-cuda (2)" in (tmp_path / "both/report.md").read_text()


@pytest.mark.parametrize("content", ["", "{}", None])
def test_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    assert f"cannot make pages of {path}" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("reference", "address"),
    [
        ("vllm-project/vllm#22197", "https://github.com/vllm-project/vllm/issues/22197"),
        ("https://example.org/a", "https://example.org/a"),
        ("alibaba/ROLL worker.py: '0.10.2' < '0.8.5'", ""),
        ("javascript:alert(1)", ""),
        ('https://x" onclick="y', ""),
        ("vllm#1", ""),
    ],
)
def test_links(reference: str, address: str) -> None:
    assert link(reference) == address
