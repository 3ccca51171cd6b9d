"""From the reports of tests to exactly one outcome per contract. Nothing here has a side effect.

A contract is

- ``failed`` if one of its tests failed;
- ``could not run`` if none failed, and one gave no answer: an error in setup or teardown, a skip, an
  expected failure, an interruption, a crash;
- ``known gap`` if one failed where the release declares that it must, see ``roll_vllm/versions.py``;
- ``passed`` if one test passed and the others did, too, or are not applicable;
- ``not applicable`` if all its tests are.

So a skip is never a pass, and neither is a gap. A test that passes in spite of a gap has failed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pytest

Outcome = Literal["passed", "failed", "known gap", "not applicable", "could not run"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

# Names of entries in a report's user_properties, which travel from xdist workers and into JUnit files.
CONTRACT = "vllm_contract"
NOT_APPLICABLE = "vllm_not_applicable"
GAP = "vllm_known_gap"

STOPPED = "the run stopped"
_PHASES = {"setup", "call", "teardown"}


@dataclass(frozen=True)
class Phase:
    """What became of the setup, the call or the teardown of a test.

    ``when`` is something else if the process died; ``outcome`` has the words of pytest, with ``xfailed``,
    ``xpassed``, ``known gap`` and ``not applicable`` told apart from other passes and skips.
    """

    when: str
    outcome: str
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcome of one test, or of all tests of one contract, with the reason unless it passed."""

    outcome: Outcome
    seconds: float
    reason: str


def phase(report: pytest.TestReport) -> Phase:
    """Reduce a report of pytest to what counts here."""
    outcome: str = report.outcome
    reason = ""
    gap = dict(report.user_properties).get(GAP) if report.skipped else None
    if gap:
        outcome, reason = "known gap", str(gap)
    elif hasattr(report, "wasxfail"):
        outcome = "xpassed" if report.passed else "xfailed"
        reason = report.wasxfail
    elif report.skipped:
        declared = dict(report.user_properties).get(NOT_APPLICABLE)
        if declared:
            outcome, reason = "not applicable", str(declared)
        else:
            reason = _skip_reason(report)
    elif report.failed:
        reason = _fail_reason(report)
    return Phase(report.when or "", outcome, report.duration, reason)


def judge_test(phases: Sequence[Phase]) -> Verdict:
    """Judge one selected test by all its phases, of which there are none if it never ran."""
    outcome, reason = _judge_test(phases)
    return Verdict(outcome, round(sum(one.seconds for one in phases), 3), reason)


def judge(tests: Sequence[Verdict]) -> Verdict:
    """Judge a contract by all its selected tests."""
    outcomes = [test.outcome for test in tests]
    outcome = worst(outcomes)
    reason = next(test.reason for test in tests if test.outcome == outcome)
    if reason and len(tests) > 1:
        reason += f" ({outcomes.count(outcome)} of {len(tests)} tests)"
    return Verdict(outcome, round(sum(test.seconds for test in tests), 3), reason)


def worst(found: Collection[Outcome]) -> Outcome:
    """Return the outcome that decides where there are several."""
    order: tuple[Outcome, ...] = ("failed", "could not run", "known gap", "passed", "not applicable")
    return next(one for one in order if one in found)


def _judge_test(phases: Sequence[Phase]) -> tuple[Outcome, str]:
    # The worst phase counts, whatever came after it: subtests report several calls of one test.
    failed = [one for one in phases if one.outcome == "failed"]
    for one in failed:
        if one.when == "call":
            return "failed", one.reason
    for one in failed:
        where = f"error in {one.when}" if one.when in _PHASES else "crash"
        return "could not run", f"{where}: {one.reason}"
    for one in phases:
        if one.outcome == "xfailed":
            return "could not run", f"marked as an expected failure: {one.reason}"
        if one.outcome == "xpassed":
            return "could not run", f"passed, but is marked as an expected failure: {one.reason}"
        if one.outcome == "skipped":
            return "could not run", f"skipped: {one.reason}"
    for one in phases:
        if one.outcome == "not applicable":
            return "not applicable", one.reason
    if _PHASES <= {one.when for one in phases if one.outcome in ("passed", "known gap")}:
        return next((("known gap", one.reason) for one in phases if one.outcome == "known gap"), ("passed", ""))
    return "could not run", f"{'did not finish' if phases else 'never ran'}: {STOPPED}"


def _skip_reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return report.longreprtext


def _fail_reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash:
        return str(crash.message).strip().partition("\n")[0]
    lines = str(report.longrepr).strip().splitlines() or ["no details"]
    return next((line[1:].strip() for line in lines if line.startswith("E ")), lines[0])
