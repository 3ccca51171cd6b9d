"""Writes contracts.md: every contract of the suite, the tests that prove it, and the saboteurs that prove the tests.

``python docs/generate_contracts.py`` writes the page; with ``--check`` it only says whether the page is up to date.
Imports the modules of the suite as they are in this checkout, which takes neither vLLM nor torch.
"""

from __future__ import annotations

import argparse
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "contracts.md"
COMMAND = "python docs/generate_contracts.py"

sys.path.insert(0, str(ROOT))  # the suite of this checkout, not an installed one

if TYPE_CHECKING:
    from pytest_roll_vllm.contracts import Contract
    from tests.saboteurs import Saboteur

INTRO = f"""\
# The contracts

<!-- Written by {COMMAND}; do not edit. -->

A contract is one sentence that a rollout engine must keep. The tests prove it; the saboteurs, engines that are
broken on purpose, prove that the tests can fail: on each of them, the contracts it names must fail
(`tox run -e proof0.12.0-cpu`).

The columns "versions" and "backends" say what a contract concerns, not what it was verified on; for that see the
[support table](../README.md#support). To run one contract by its id:
`pytest --pyargs conformance -m 'vllm_contract(id="wu-a-b-a")'`.
"""


@dataclass
class Entry:
    """A contract and the names of its test functions."""

    contract: Contract
    tests: list[str] = field(default_factory=list)


def suite() -> dict[str, dict[str, Entry]]:
    """Return the contracts by id, for each module of the suite that has any."""
    import conformance

    names = sorted(module.name for module in pkgutil.iter_modules(conformance.__path__))
    modules = {name: _entries(f"conformance.{name}") for name in names if name.startswith("test_")}
    return {name: entries for name, entries in modules.items() if entries}


def saboteurs() -> Mapping[str, Saboteur]:
    """Return the saboteurs by name."""
    from tests.saboteurs import SABOTEURS

    return SABOTEURS


def page() -> str:
    """Return the text of the page."""
    parts = [INTRO]
    for name, entries in suite().items():
        parts.append(f"## {name}\n\n{_summary(import_module(f'conformance.{name}'))}\n")
        parts.append(
            _table(("id", "sentence", "versions", "backends", "tests", "saboteurs"), map(_row, entries.values()))
        )
    parts.append("## The saboteurs\n")
    rows = ((f"`{one.name}`", _damage(one), _codes(one.fails)) for _, one in sorted(saboteurs().items()))
    parts.append(_table(("saboteur", "what is broken", "contracts that must fail"), rows))
    return "\n".join(parts)


def _entries(module: str) -> dict[str, Entry]:
    from pytest_roll_vllm.contracts import Contract

    entries: dict[str, Entry] = {}
    for name, marks in _tests(import_module(module)):
        arguments = next((mark.kwargs for mark in marks if mark.name == "vllm_contract"), None)
        if arguments is not None:
            contract = Contract(**arguments)
            entries.setdefault(contract.id, Entry(contract)).tests.append(name)
    return entries


def _tests(scope: Any, outer: tuple[Any, ...] = (), prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the name and the marks, the closest first, of every test of a module or class."""
    for name, value in vars(scope).items():
        marks = (*getattr(value, "pytestmark", ()), *outer)
        if inspect.isclass(value) and name.startswith("Test"):
            yield from _tests(value, marks, f"{name}::")
        elif inspect.isfunction(value) and name.startswith("test_"):
            yield prefix + name, marks


def _row(entry: Entry) -> tuple[str, ...]:
    contract = entry.contract
    breakers = sorted(one.name for one in saboteurs().values() if contract.id in one.fails)
    return (
        f"`{contract.id}`",
        contract.sentence,
        f"`{contract.versions}`",
        ", ".join(contract.backends),
        _codes(entry.tests),
        _codes(breakers),
    )


def _damage(one: Saboteur) -> str:
    from tests.saboteurs.worker import BREAKAGES

    return _summary(BREAKAGES.get(one.name, one.breakage))


def _summary(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n\n")[0].replace("\n", " ")


def _codes(names: Iterable[str]) -> str:
    return "<br>".join(f"`{name}`" for name in names)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.relative_to(ROOT)} is not up to date; write it again: {COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
