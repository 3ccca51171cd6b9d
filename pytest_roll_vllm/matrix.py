"""The table at the end of a session with several versions: contract groups by version. Nothing has a side effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pytest_roll_vllm.outcomes import OUTCOMES, Outcome

WORDS: dict[Outcome, str] = {
    "passed": "ok",
    "failed": "FAILED",
    "known gap": "gap",
    "expected skip": "skip",
    "not applicable": "n/a",
    "could not run": "not run",
}


def group(contract: str) -> str:
    """Return the group of a contract: the first word of its id."""
    return contract.partition("-")[0]


def matrix(columns: Mapping[str, Mapping[str, Outcome]]) -> list[tuple[str, list[Outcome]]]:
    """Return the lines of the table, each with the outcomes that occur in it.

    Args:
        columns: The outcome of each contract, for each version.
    """
    groups = sorted({group(id) for outcomes in columns.values() for id in outcomes})
    rows = [(name, [_of(outcomes, name) for outcomes in columns.values()]) for name in groups]
    rows.append(("all", [[*outcomes.values()] for outcomes in columns.values()]))
    cells = [["contracts", *columns], *([name, *map(_cell, found)] for name, found in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    occurring: list[list[Outcome]] = [[], *([one for some in found for one in some] for _, found in rows)]
    return list(zip(lines, occurring, strict=True))


def _of(outcomes: Mapping[str, Outcome], name: str) -> list[Outcome]:
    return [outcome for id, outcome in outcomes.items() if group(id) == name]


def _cell(outcomes: Sequence[Outcome]) -> str:
    counts = Counter(outcomes)
    return ", ".join(f"{counts[outcome]} {WORDS[outcome]}" for outcome in OUTCOMES if counts[outcome]) or "-"
