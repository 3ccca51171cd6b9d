"""What the documentation says of the code is still so."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plugin_harness import Inner

from pytest_roll_vllm import fixtures

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# In a process of its own: it imports the suite of this checkout, and here another one may be installed.
COLLECT = """
import json, generate_contracts as g
contracts = {id: [*entry.tests] for module in g.suite().values() for id, entry in module.entries.items()}
print(json.dumps({"contracts": contracts, "saboteurs": {s.name: s.fails for s in g.saboteurs().values()}}))
"""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT / "docs", capture_output=True, text=True)


@pytest.fixture(scope="module")
def collected() -> dict[str, Any]:
    """The test functions of each contract, and the contracts of each saboteur."""
    done = python("-c", COLLECT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_contracts_page_is_up_to_date() -> None:
    done = python("generate_contracts.py", "--check")
    assert done.returncode == 0, done.stderr


def test_every_contract_has_a_test(collected: dict[str, Any]) -> None:
    assert len(collected["contracts"]) > 20
    assert [id for id, tests in collected["contracts"].items() if not tests] == []


def test_every_contract_has_a_saboteur(collected: dict[str, Any]) -> None:
    broken = {id for fails in collected["saboteurs"].values() for id in fails}
    assert sorted(collected["contracts"].keys() - broken) == []


def test_every_saboteur_breaks_contracts_that_exist(collected: dict[str, Any]) -> None:
    for name, fails in collected["saboteurs"].items():
        assert fails, name
        assert sorted({*fails} - collected["contracts"].keys()) == [], name


@pages
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(link)
    assert broken == []


@pages
def test_python_in_the_pages_compiles(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        compile(block, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_every_option_is_described(inner: Inner) -> None:
    described = (ROOT / "docs/plugin.md").read_text(encoding="utf-8")
    options = set(re.findall(r"--vllm-[a-z-]+", inner.run("--help").stdout.str()))
    assert {"--vllm-version", "--vllm-report", "--vllm-contracts"} <= options
    assert "`--vllm-contracts`" in described
    for option in options - {"--vllm-contracts"}:  # is no setting
        name = option.removeprefix("--vllm-").replace("-", "_")
        row = f"| `{option}` | `PYTEST_VLLM_{name.upper()}` | `vllm_{name}` |"
        assert row in described


@pytest.mark.parametrize("name", fixtures.__all__)
def test_every_fixture_is_described(name: str) -> None:
    assert f"\n| `{name}` |" in (ROOT / "docs/plugin.md").read_text(encoding="utf-8")
