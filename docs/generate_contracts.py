"""Writes contracts.md: every contract of the suite, the tests that prove it, and the saboteurs that prove the tests.

``python docs/generate_contracts.py`` writes the page; with ``--check`` it only says whether the page is up to date.
Collects the suite as it is in this checkout, which takes neither vLLM nor torch.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "contracts.md"
COMMAND = "python docs/generate_contracts.py"

sys.path.insert(0, str(ROOT))  # the suite of this checkout, not an installed one

if TYPE_CHECKING:
    from pytest_roll_vllm.catalogue import Entry, Module
    from tests.saboteurs import Saboteur

INTRO = f"""\
# The contracts

<!-- Written by {COMMAND}; do not edit. -->

A contract is one sentence that a rollout engine must keep. The tests prove it; the saboteurs, engines that are
broken on purpose, prove that the tests can fail: on each of them, the contracts it names must fail
(`tox run -e proof0.12.0-cpu`).

The columns "versions" and "backends" say what a contract concerns, not what it was verified on; for that see the
[support table](../README.md#support). To run one contract by its id:
`pytest --pyargs conformance -m 'vllm_contract(id="wu-a-b-a")'`. `pytest --vllm-contracts` lists them in a terminal.
"""


class _Collector:
    """A plugin for pytest that takes the catalogue of what was collected."""

    found: Mapping[str, Module]

    def pytest_collection_finish(self, session: Any) -> None:
        from pytest_roll_vllm.catalogue import modules

        self.found = modules(session.items)


@cache
def suite() -> Mapping[str, Module]:
    """Return the modules of the suite that have contracts, by name."""
    import pytest

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    collector, output = _Collector(), io.StringIO()
    arguments = ["--vllm-contracts", "-c", os.devnull, "-p", "pytest_roll_vllm.plugin", "-p", "no:cacheprovider"]
    with redirect_stdout(output):
        status = pytest.main([*arguments, str(ROOT / "conformance")], plugins=[collector])
    if status:
        raise SystemExit(f"the suite cannot be collected:\n{output.getvalue()}")
    return {name.removeprefix("conformance."): module for name, module in collector.found.items()}


def saboteurs() -> Mapping[str, Saboteur]:
    """Return the saboteurs by name."""
    from tests.saboteurs import SABOTEURS

    return SABOTEURS


def page() -> str:
    """Return the text of the page."""
    parts = [INTRO]
    header = ("id", "sentence", "versions", "backends", "tests", "saboteurs")
    for name, module in suite().items():
        parts.append(f"## {name}\n\n{module.summary}\n")
        parts.append(_table(header, map(_row, module.entries.values())))
    parts.append("## The saboteurs\n")
    rows = ((f"`{one.name}`", _damage(one), _codes(one.fails)) for _, one in sorted(saboteurs().items()))
    parts.append(_table(("saboteur", "what is broken", "contracts that must fail"), rows))
    return "\n".join(parts)


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
    from pytest_roll_vllm.catalogue import summary
    from tests.saboteurs.worker import BREAKAGES

    return summary(BREAKAGES.get(one.name, one.breakage))


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
