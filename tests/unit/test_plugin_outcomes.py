"""One outcome per contract, whatever its tests did."""

from __future__ import annotations

from itertools import permutations

import pytest

from pytest_roll_vllm.outcomes import Phase, Verdict, judge, judge_test

SETUP, CALL, TEARDOWN = (Phase(when, "passed", 0.25) for when in ("setup", "call", "teardown"))
PASSED = Verdict("passed", 1.0, "")
FAILED = Verdict("failed", 1.0, "bad")
NOT_APPLICABLE = Verdict("not applicable", 1.0, "elsewhere")
COULD_NOT_RUN = Verdict("could not run", 1.0, "skipped")


@pytest.mark.parametrize(
    ("phases", "outcome", "reason"),
    [
        ([SETUP, CALL, TEARDOWN], "passed", ""),
        ([SETUP, Phase("call", "failed", 0, "bad"), TEARDOWN], "failed", "bad"),
        ([SETUP, Phase("call", "failed", 0, "bad"), Phase("teardown", "failed", 0, "x")], "failed", "bad"),
        ([Phase("setup", "failed", 0, "bad"), TEARDOWN], "could not run", "error in setup: bad"),
        ([SETUP, CALL, Phase("teardown", "failed", 0, "bad")], "could not run", "error in teardown: bad"),
        ([SETUP, Phase("???", "failed", 0, "bad")], "could not run", "crash: bad"),
        ([Phase("setup", "skipped", 0, "no GPU"), TEARDOWN], "could not run", "skipped: no GPU"),
        ([SETUP, Phase("call", "skipped", 0, "no"), TEARDOWN], "could not run", "skipped: no"),
        (
            [SETUP, Phase("call", "xfailed", 0, "bug"), TEARDOWN],
            "could not run",
            "marked as an expected failure: bug",
        ),
        (
            [SETUP, Phase("call", "xpassed", 0, "bug"), TEARDOWN],
            "could not run",
            "passed, but is marked as an expected failure: bug",
        ),
        ([Phase("setup", "not applicable", 0, "0.13"), TEARDOWN], "not applicable", "0.13"),
        (
            [Phase("setup", "not applicable", 0, "0.13"), Phase("teardown", "failed", 0, "bad")],
            "could not run",
            "error in teardown: bad",
        ),
        ([], "could not run", "never ran: the run stopped"),
        ([SETUP], "could not run", "did not finish: the run stopped"),
        ([SETUP, CALL], "could not run", "did not finish: the run stopped"),
        ([SETUP, TEARDOWN], "could not run", "did not finish: the run stopped"),
        # a subtest that was skipped or failed, in a test that passed
        ([SETUP, Phase("call", "skipped", 0, "no"), CALL, TEARDOWN], "could not run", "skipped: no"),
        ([SETUP, Phase("call", "failed", 0, "bad"), CALL, TEARDOWN], "failed", "bad"),
        # pytest-rerunfailures
        ([SETUP, Phase("call", "rerun"), TEARDOWN, SETUP, CALL, TEARDOWN], "passed", ""),
    ],
)
def test_one_test(phases: list[Phase], outcome: str, reason: str) -> None:
    verdict = judge_test(phases)
    assert (verdict.outcome, verdict.reason) == (outcome, reason)


@pytest.mark.parametrize(
    ("tests", "outcome", "reason"),
    [
        ([PASSED], "passed", ""),
        ([PASSED, NOT_APPLICABLE], "passed", ""),
        ([NOT_APPLICABLE], "not applicable", "elsewhere"),
        ([NOT_APPLICABLE, NOT_APPLICABLE], "not applicable", "elsewhere (2 of 2 tests)"),
        ([PASSED, COULD_NOT_RUN], "could not run", "skipped (1 of 2 tests)"),
        ([NOT_APPLICABLE, COULD_NOT_RUN], "could not run", "skipped (1 of 2 tests)"),
        ([PASSED, COULD_NOT_RUN, FAILED, NOT_APPLICABLE], "failed", "bad (1 of 4 tests)"),
    ],
)
def test_one_contract(tests: list[Verdict], outcome: str, reason: str) -> None:
    for order in permutations(tests):
        assert judge(order) == Verdict(outcome, float(len(tests)), reason)  # type: ignore[arg-type]


def test_seconds_add_up() -> None:
    assert judge_test([SETUP, CALL, TEARDOWN]).seconds == 0.75


@pytest.mark.parametrize(
    ("detail", "ranks"),
    [
        ("", []),
        ("AssertionError: rank 1: 3 of 9 parameters are not version 2", [1]),
        ("rank 0 on node a died\nrank 3\nand rank 0 of 4", [0, 3]),
        ("the call failed [rank 2]", [2]),
        ("an adapter of rank 8 was sent", []),
        ("LoRA rank 16: too big", []),
        ("the ranks differ; franks 1: no", []),
    ],
)
def test_ranks_that_a_failure_names(detail: str, ranks: list[int]) -> None:
    assert Verdict("failed", 1.0, "", detail).ranks == ranks
