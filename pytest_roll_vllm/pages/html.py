"""The report as one HTML page, which needs nothing but itself.

Elements are made by :func:`tag`, which escapes every text that it is given. The page's policy allows its own style and
script by their digests, and nothing else: no other script, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from html import escape
from importlib import resources
from itertools import groupby
from typing import Any

from pytest_roll_vllm.pages.columns import OUTCOMES, WORDS, Column, Outcome, contracts, group, state, totals
from pytest_roll_vllm.pages.text import clean, link

_SLOWEST = 12
_ATTENTION: tuple[Outcome, ...] = ("failed", "could not run")
_EXPECTED: tuple[Outcome, ...] = ("known gap", "expected skip")
_SYMBOLS: dict[Outcome, str] = {
    "passed": "✓",
    "failed": "✗",
    "known gap": "△",
    "expected skip": "⊘",
    "not applicable": "○",
    "could not run": "?",
}


class Markup(str):
    """HTML, in contrast to text."""


def tag(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """Return an element; children that are no :class:`Markup` are text.

    Args:
        name: The name of the element.
        children: What it contains; ``None`` is left out.
        attributes: Their names have ``_`` for ``-``, and may end with one; ``None`` and ``False`` leave one out.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            parts.append(key if value is True else f'{key}="{escape(clean(value))}"')
    inner = "".join(one if isinstance(one, Markup) else escape(clean(one)) for one in children if one is not None)
    return Markup(f"<{' '.join(parts)}>{inner}</{name}>" if name not in ("meta", "input") else f"<{' '.join(parts)}>")


def html(found: Sequence[Column], *, title: str = "Contracts of rollout engines") -> str:
    """Return the page.

    Args:
        found: The columns.
        title: Its heading.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title}: {state(found)}"),
        Markup(f"<style>{style}</style>"),
    )
    body = tag(
        "body",
        tag("header", tag("h1", title), *_headline(found)),
        tag("main", *_sections(found)),
        Markup(f"<script>{script}</script>"),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


# -- sections -----------------------------------------------------------------------------------------------


def _headline(found: Sequence[Column]) -> Iterator[Markup]:
    counts = totals(found)
    worst = next((one for one in (*_ATTENTION, *_EXPECTED) if counts[one]), "passed" if sum(counts.values()) else "")
    yield tag("p", state(found), class_="state", data_outcome=worst)
    targets = (
        tag("li", tag("code", one.label), " ", tag("span", f"{one.target}, model {one.run['model']}")) for one in found
    )
    yield tag("ul", *targets, class_="targets")
    for one in found:
        for problem in one.problems:
            yield tag("p", tag("code", one.label), " ", problem, class_="problem", data_outcome="could not run")
    date, suite = found[0].run["date"] if found else "", found[0].facts["suite"] if found else ""
    yield tag(
        "p",
        f"{suite}, ",
        tag("time", str(date).replace("T", " ").replace("+00:00", " UTC"), datetime=date),
        class_="quiet",
    )


def _sections(found: Sequence[Column]) -> Iterator[Markup]:
    attention = list(_attention(found))
    if attention:
        yield _section("attention", "Needs attention", tag("ul", *attention, class_="attention"))
    yield _section("contracts", "Contracts", _filter(found), _matrix(found))
    yield _section("details", "Details", *_details(found))
    patches = sorted({name for one in found for name in one.patches})
    if patches:
        rows = [_patch_row(found, name) for name in patches]
        yield _section("patches", "Patches", _table(["patch", *(one.label for one in found)], rows))
    yield _section("timings", "Timings", *_timings(found))
    yield _section("environment", "Environment", *_environment(found))


def _section(id: str, heading: str, *children: Markup) -> Markup:
    return tag("section", tag("h2", heading, id=f"{id}-heading"), *children, id=id, aria_labelledby=f"{id}-heading")


def _attention(found: Sequence[Column]) -> Iterator[Markup]:
    """Yield what gave no good answer, the worst first; what several columns say alike, once."""
    same: dict[tuple[Outcome, str, str], list[str]] = {}
    for column in found:
        for id, one in column.contracts.items():
            if one["outcome"] in _ATTENTION:
                same.setdefault((one["outcome"], id, one["reason"]), []).append(column.label)
    for (outcome, id, reason), labels in sorted(same.items(), key=lambda item: _ATTENTION.index(item[0][0])):
        where = (part for label in labels for part in (Markup(" "), tag("code", label)))
        name = tag("a", id, href=f"#{_anchor(id)}")
        yield tag("li", _badge(outcome), " ", name, " on", *where, tag("div", reason, class_="reason"))


def _filter(found: Sequence[Column]) -> Markup:
    counts = totals(found)
    buttons = (
        tag(
            "button",
            _SYMBOLS[outcome],
            f" {outcome} ",
            tag("b", str(counts[outcome])),
            type="button",
            aria_pressed="false",
            data_outcome=outcome,
        )
        for outcome in OUTCOMES
        if counts[outcome]
    )
    options = [tag("option", "all runs", value="")]
    options += [tag("option", one.label, value=str(index)) for index, one in enumerate(found)]
    run = tag("select", *options, id="run", aria_label="Show one run") if len(found) > 1 else None
    search = tag("input", type="search", id="search", placeholder="Find a contract", aria_label="Find a contract")
    outcomes = tag("div", *buttons, class_="outcomes", role="group", aria_label="Show only these outcomes")
    shown = tag("output", id="shown", for_="search", aria_live="polite")
    return tag("form", search, run, outcomes, shown, class_="filter", hidden=True)  # the script shows it


def _matrix(found: Sequence[Column]) -> Markup:
    heads = (tag("th", one.label, scope="col", data_column=str(index)) for index, one in enumerate(found))
    bodies = []
    for name, members in groupby(contracts(found).items(), key=lambda item: group(item[0])):
        heading = tag("tr", tag("th", name, scope="rowgroup", colspan=len(found) + 1), class_="group")
        bodies.append(tag("tbody", heading, *(_row(found, id, one) for id, one in members)))
    head = tag("thead", tag("tr", tag("th", "contract", scope="col"), *heads))
    return tag("div", tag("table", head, *bodies, class_="matrix"), class_="scroll", tabindex="0")


def _row(found: Sequence[Column], id: str, one: Mapping[str, Any]) -> Markup:
    cells = []
    for index, column in enumerate(found):
        outcome = column.outcome(id)
        content = _badge(outcome, short=True) if outcome else tag("span", "not selected", class_="quiet")
        cells.append(tag("td", content, data_column=str(index), data_outcome=outcome or ""))
    name = tag("a", id, href=f"#{_anchor(id)}")
    head = tag("th", name, tag("span", one["sentence"], class_="sentence"), scope="row")
    return tag("tr", head, *cells, data_contract=id)


def _details(found: Sequence[Column]) -> Iterator[Markup]:
    for id, one in contracts(found).items():
        outcomes = [column.outcome(id) for column in found]
        worst = next((outcome for outcome in (*_ATTENTION, *_EXPECTED) if outcome in outcomes), None)
        declared = tag(
            "p",
            f"Concerns vLLM {one['versions']} on {', '.join(one['backends'])}.",
            *_references(one["references"]),
            class_="quiet",
        )
        summary = tag(
            "summary", tag("code", id), *(_badge(outcome) for outcome in dict.fromkeys(outcomes) if outcome is not None)
        )
        runs = (_run(column, index, id) for index, column in enumerate(found) if id in column.contracts)
        yield tag(
            "details",
            summary,
            tag("p", one["sentence"], class_="sentence"),
            declared,
            *runs,
            id=_anchor(id),
            data_contract=id,
            open=worst in _ATTENTION,
        )


def _references(references: Iterable[str]) -> Iterator[Markup]:
    for reference in references:
        address = link(reference)
        yield Markup(" ")
        yield tag("a", reference, href=address, rel="noreferrer") if address else tag("span", reference)


def _run(column: Column, index: int, id: str) -> Markup:
    one = column.contracts[id]
    facts = [_badge(one["outcome"]), Markup(" "), tag("b", column.target)]
    ranks = sorted({rank for test in one["tests"] for rank in test.get("ranks", ())})
    if ranks:
        facts.append(tag("span", f", rank {', '.join(map(str, ranks))}"))
    facts.append(tag("span", f", {_seconds(one['seconds'])}", class_="quiet"))
    reason = tag("p", one["reason"], class_="reason") if one["reason"] else None
    tests = tag("ul", *(tag("li", *_test(test)) for test in one["tests"]), class_="tests")
    again = one.get("again") if one["outcome"] in _ATTENTION else None
    command = tag("p", "Again: ", tag("code", again, class_="command")) if again else None
    return tag("div", tag("p", *facts), reason, tests, command, class_="run", data_column=str(index))


def _test(test: Mapping[str, Any]) -> Iterator[Markup]:
    yield tag("code", test["nodeid"])
    yield tag("span", f" {test['outcome']}, {_seconds(test['seconds'])}", class_="quiet")
    if test.get("detail"):
        yield tag("pre", test["detail"], tabindex="0")


def _patch_row(found: Sequence[Column], name: str) -> list[Markup]:
    patch = next(one.patches[name] for one in found if name in one.patches)
    address = next(iter(re.findall(r"https?://[^\s,)]+", patch["upstream"])), "")
    upstream = tag("a", patch["upstream"], href=link(address), rel="noreferrer") if link(address) else None
    cells = [
        tag(
            "th",
            tag("code", name),
            tag("span", patch["why"], class_="sentence"),
            tag("span", tag("code", patch["target"]), class_="quiet"),
            tag("span", upstream or patch["upstream"], class_="quiet"),
            scope="row",
        )
    ]
    for one in found:
        counts = one.patches[name]["processes"] if name in one.patches else None
        lines = [f"{outcome} in {count} processes" for outcome, count in (counts or {}).items()]
        cells.append(tag("td", "not for this release" if counts is None else "; ".join(lines) or "for this release"))
    return cells


def _timings(found: Sequence[Column]) -> Iterator[Markup]:
    def seconds(one: Column, id: str) -> float:
        return float(one.contracts[id]["seconds"]) if id in one.contracts else 0.0

    slowest = sorted(contracts(found), key=lambda id: -max(seconds(one, id) for one in found))[:_SLOWEST]
    longest = max((seconds(one, id) for one in found for id in slowest), default=0.0)
    rows = [
        [
            tag("th", tag("a", id, href=f"#{_anchor(id)}"), scope="row"),
            *(tag("td", _seconds(seconds(one, id)), _bar(seconds(one, id), longest)) for one in found),
        ]
        for id in slowest
    ]
    total = [tag("th", "all tests of contracts", scope="row"), *(tag("td", _seconds(one.seconds)) for one in found)]
    yield _table(["slowest contracts", *(one.label for one in found)], [total, *rows])
    for one in found:
        for subject, values in one.notes.items():
            items = (tag("li", f"{count} x ", tag("code", value)) for value, count in values.items())
            summary = tag("summary", f"{subject} on ", tag("code", one.label), f": {sum(values.values())}")
            yield tag("details", summary, tag("ul", *items, class_="notes"))


def _bar(seconds: float, longest: float) -> Markup:
    width = round(100 * seconds / longest, 1) if longest else 0
    bar = tag("rect", width=width, height="4")
    return tag("svg", bar, viewBox="0 0 100 4", preserveAspectRatio="none", class_="bar", aria_hidden="true")


def _environment(found: Sequence[Column]) -> Iterator[Markup]:
    for name, facts in (
        ("run", [one.facts for one in found]),
        ("package", [one.packages for one in found]),
        ("variable", [one.variables for one in found]),
        ("setting", [one.settings for one in found]),
    ):
        keys = dict.fromkeys(key for some in facts for key in some)
        rows = [
            [tag("th", key, scope="row"), *(tag("td", some.get(key, "")) for some in facts)]
            for key in keys
            if any(some.get(key) for some in facts)
        ]
        if rows:
            yield _table([name, *(one.label for one in found)], rows, class_="facts")
    for command in dict.fromkeys(str(one.run["command"]) for one in found):
        yield tag("p", tag("code", command, class_="command"))


# -- parts --------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[Markup]], **attributes: str) -> Markup:
    head = tag("thead", tag("tr", *(tag("th", one, scope="col") for one in header)))
    body = tag("tbody", *(tag("tr", *row) for row in rows))
    return tag("div", tag("table", head, body, **attributes), class_="scroll", tabindex="0")


def _badge(outcome: Outcome, *, short: bool = False) -> Markup:
    symbol = tag("span", _SYMBOLS.get(outcome, ""), aria_hidden="true")
    word = WORDS.get(outcome, outcome).lower() if short else outcome
    return tag("span", symbol, f" {word}", class_="badge", data_outcome=outcome)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _anchor(id: str) -> str:
    return f"contract-{re.sub(r'[^A-Za-z0-9.-]', lambda one: f'_{ord(one[0]):x}_', id)}"


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
