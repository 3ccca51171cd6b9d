"""The report as a page of Markdown, for a repository or the summary of a CI job."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pytest_roll_vllm.pages.columns import OUTCOMES, WORDS, Column, contracts, state, totals
from pytest_roll_vllm.pages.text import bounded, clean, link

_SLOWEST = 10


def markdown(found: Sequence[Column], *, title: str = "Contracts of rollout engines", introduction: str = "") -> str:
    """Return the page.

    Args:
        found: The columns.
        title: Its heading, as plain text.
        introduction: Markdown to stand below the heading.
    """
    counts = ", ".join(f"{count} {outcome}" for outcome, count in totals(found).items() if count)
    parts = [
        f"# {text(title)}",
        introduction.strip(),
        f"**{text(state(found))}**" + (f" ({counts})" if counts else ""),
        *(f"- `{_code(one.label)}`: {text(problem)}" for one in found for problem in one.problems),
        "## Contracts",
        _matrix(found),
        *_failures(found),
        *_patches(found),
        "## Timings",
        _timings(found),
        "## Environment",
        _by_column("", [one.facts for one in found], found),
        _by_column("package", [one.packages for one in found], found),
        _by_column("variable", [one.variables for one in found], found),
        _by_column("setting", [one.settings for one in found], found),
        *dict.fromkeys(block(str(one.run["command"])) for one in found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def text(value: object) -> str:
    """Return text in which nothing is Markdown or HTML, in one line."""
    line = " ".join(clean(value).split())
    escaped = re.sub(r"([\\`*_{}\[\]()#|!~<>])", r"\\\1", line.replace("&", "&amp;"))
    return re.sub(r"^([-+]|\d+(?=\.))", r"\\\1", escaped).replace("@", "&#64;")


def block(value: str) -> str:
    """Return a block of code."""
    code = clean(value)
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", code)), default=0))
    return f"{fence}\n{code}\n{fence}"


def _code(value: object) -> str:
    """Return what may stand between single backticks, in a table, too."""
    return " ".join(clean(value).replace("`", "'").split()).replace("|", "\\|")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _matrix(found: Sequence[Column]) -> str:
    def rows() -> Iterator[list[str]]:
        for id, one in contracts(found).items():
            outcomes = [column.outcome(id) for column in found]
            cells = [f"**{WORDS[o]}**" if o == "failed" else WORDS[o] if o else "-" for o in outcomes]
            yield [f"`{_code(id)}`", text(one["sentence"]), *cells]

    return _table(["contract", "sentence", *(f"`{_code(column.label)}`" for column in found)], rows())


def _failures(found: Sequence[Column]) -> Iterator[str]:
    """Yield what did not pass, the worst first."""
    shown = ("failed", "could not run", "known gap", "expected skip", "not applicable")
    for outcome in sorted((o for o in OUTCOMES if o in shown), key=shown.index):
        some = [(c, one) for c in found for one in c.contracts.values() if one["outcome"] == outcome]
        if not some:
            continue
        yield f"## {outcome.capitalize()}"
        if outcome == "not applicable":
            rows = ([f"`{_code(one['id'])}`", f"`{_code(c.label)}`", text(one["reason"])] for c, one in some)
            yield _table(["contract", "run", "reason"], rows)
            continue
        for column, one in some:
            yield f"### `{_code(one['id'])}` on `{_code(column.label)}`"
            yield f"{text(one['sentence'])}"
            yield "\n".join(_facts(column, one))
            for test in one["tests"]:
                if test.get("detail") and test["outcome"] == outcome:
                    yield f"`{_code(test['nodeid'])}`:\n\n{block(bounded(test['detail']))}"
            if one.get("again") and outcome not in ("known gap", "expected skip"):
                yield f"Run it again:\n\n{block(one['again'])}"


def _facts(column: Column, one: Mapping[str, object]) -> Iterator[str]:
    yield f"- why: {text(one['reason'])}"
    yield f"- on: {text(column.target)}"
    tests: list[Mapping[str, Sequence[int]]] = one["tests"]  # type: ignore[assignment]
    ranks = sorted({rank for test in tests for rank in test.get("ranks", ())})
    if ranks:
        yield f"- rank: {', '.join(map(str, ranks))}"
    references = ", ".join(
        f"[{text(reference)}](<{link(reference)}>)" if link(reference) else text(reference)
        for reference in one["references"]  # type: ignore[attr-defined]
    )
    if references:
        yield f"- see: {references}"


def _patches(found: Sequence[Column]) -> Iterator[str]:
    names = sorted({name for column in found for name in column.patches})
    if names:
        yield "## Patches"
        rows = []
        for name in names:
            why = next(column.patches[name]["why"] for column in found if name in column.patches)
            rows.append([f"`{_code(name)}`", text(why), *(_processes(column, name) for column in found)])
        yield _table(["patch", "without it", *(f"`{_code(column.label)}`" for column in found)], rows)


def _processes(column: Column, name: str) -> str:
    if name not in column.patches:
        return "-"
    counts = column.patches[name]["processes"]
    return ", ".join(f"{count} {text(outcome)}" for outcome, count in counts.items()) or "declared"


def _timings(found: Sequence[Column]) -> str:
    slowest = sorted(contracts(found), key=lambda id: -max(_seconds(one, id) for one in found))[:_SLOWEST]
    rows = [["all tests", *(f"{one.seconds:.1f} s" for one in found)]]
    rows += [[f"`{_code(id)}`", *(f"{_seconds(one, id):.1f} s" for one in found)] for id in slowest]
    return _table(["contract", *(f"`{_code(column.label)}`" for column in found)], rows)


def _seconds(column: Column, id: str) -> float:
    return float(column.contracts[id]["seconds"]) if id in column.contracts else 0.0


def _by_column(name: str, facts: Sequence[Mapping[str, str]], found: Sequence[Column]) -> str:
    """Return a table of facts, each by column; nothing if there are none."""
    keys = [key for key in dict.fromkeys(key for some in facts for key in some) if any(some.get(key) for some in facts)]
    rows = [[text(key), *(text(some.get(key, "")) for some in facts)] for key in keys]
    return _table([name, *(f"`{_code(column.label)}`" for column in found)], rows) if rows else ""
