"""From the reports of tests to exactly one outcome per contract. Nothing here has a side effect.

A contract is

- ``failed`` if one of its tests failed;
- ``could not run`` if none failed, and one gave no answer: an error in setup or teardown, a skip, an
  expected failure, an interruption, a crash;
- ``known gap`` if one failed where it is expected to, see ``gaps.py``;
- ``expected skip`` if one was not run because it is expected not to be, likewise;
- ``passed`` if one test passed and the others did, too, or are not applicable;
- ``not applicable`` if all its tests are.

So a skip is never a pass, and neither is a gap. A test that passes although it is expected to fail has failed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pytest

Outcome = Literal["passed", "failed", "known gap", "expected skip", "not applicable", "could not run"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

# Names of entries in a report's user_properties, which travel from xdist workers and into JUnit files.
CONTRACT = "vllm_contract"
VERSION = "vllm_version"
BACKEND = "vllm_backend"
NOT_APPLICABLE = "vllm_not_applicable"
GAP = "vllm_known_gap"
EXPECTED_SKIP = "vllm_expected_skip"

STOPPED = "the run stopped"
_PHASES = {"setup", "call", "teardown"}
_DETAIL_LINES, _DETAIL_CHARACTERS = 40, 4000  # of a failure; comparisons of tensors can be endless

# As our messages name a rank of an engine: "rank 1: ...", "rank 0 on node ...". An adapter has a rank, too.
_RANK = re.compile(
    r"(?<!lora )\brank (\d+)(?=$|[:,.\])]| (?:on|of|is|runs|sees|holds|died)\b)", re.IGNORECASE | re.MULTILINE
)


@dataclass(frozen=True)
class Phase:
    """What became of the setup, the call or the teardown of a test.

    ``when`` is something else if the process died; ``outcome`` has the words of pytest, with ``xfailed``,
    ``xpassed``, ``known gap``, ``expected skip`` and ``not applicable`` told apart from other passes and skips.
    """

    when: str
    outcome: str
    seconds: float = 0.0
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcome of one test, or of all tests of one contract, with the reason unless it passed.

    ``detail`` is what a failure says in full, such as what was wanted and what was found; ``reason`` is its first line.
    """

    outcome: Outcome
    seconds: float
    reason: str
    detail: str = ""

    @property
    def ranks(self) -> list[int]:
        """The ranks of an engine that the detail names, in its order."""
        return list(dict.fromkeys(int(rank) for rank in _RANK.findall(self.detail)))


def phase(report: pytest.TestReport) -> Phase:
    """Reduce a report of pytest to what counts here."""
    outcome: str = report.outcome
    reason = detail = ""
    gap = dict(report.user_properties).get(GAP) if report.skipped else None
    if gap:
        outcome, reason, detail = "known gap", str(gap), _detail(report)
    elif hasattr(report, "wasxfail"):
        outcome = "xpassed" if report.passed else "xfailed"
        reason = report.wasxfail
    elif report.skipped:
        properties = dict(report.user_properties)
        if properties.get(NOT_APPLICABLE):
            outcome, reason = "not applicable", str(properties[NOT_APPLICABLE])
        elif properties.get(EXPECTED_SKIP):
            outcome, reason = "expected skip", str(properties[EXPECTED_SKIP])
        else:
            reason = _skip_reason(report)
    elif report.failed:
        reason, detail = _fail_reason(report), _detail(report)
    return Phase(report.when or "", outcome, report.duration, reason, detail)


def judge_test(phases: Sequence[Phase]) -> Verdict:
    """Judge one selected test by all its phases, of which there are none if it never ran."""
    outcome, reason, detail = _judge_test(phases)
    return Verdict(outcome, round(sum(one.seconds for one in phases), 3), reason, detail)


def judge(tests: Sequence[Verdict]) -> Verdict:
    """Judge a contract by all its selected tests."""
    outcomes = [test.outcome for test in tests]
    outcome = worst(outcomes)
    decisive = next(test for test in tests if test.outcome == outcome)
    reason = decisive.reason
    if reason and len(tests) > 1:
        reason += f" ({outcomes.count(outcome)} of {len(tests)} tests)"
    return Verdict(outcome, round(sum(test.seconds for test in tests), 3), reason, decisive.detail)


def worst(found: Collection[Outcome]) -> Outcome:
    """Return the outcome that decides where there are several."""
    order: tuple[Outcome, ...] = ("failed", "could not run", "known gap", "expected skip", "passed", "not applicable")
    return next(one for one in order if one in found)


def _judge_test(phases: Sequence[Phase]) -> tuple[Outcome, str, str]:
    # The worst phase counts, whatever came after it: subtests report several calls of one test.
    failed = [one for one in phases if one.outcome == "failed"]
    for one in failed:
        if one.when == "call":
            return "failed", one.reason, one.detail
    for one in failed:
        where = f"error in {one.when}" if one.when in _PHASES else "crash"
        return "could not run", f"{where}: {one.reason}", one.detail
    for one in phases:
        if one.outcome == "xfailed":
            return "could not run", f"marked as an expected failure: {one.reason}", ""
        if one.outcome == "xpassed":
            return "could not run", f"passed, but is marked as an expected failure: {one.reason}", ""
        if one.outcome == "skipped":
            return "could not run", f"skipped: {one.reason}", ""
    declared: tuple[Outcome, ...] = ("not applicable", "expected skip")
    for outcome in declared:
        for one in phases:
            if one.outcome == outcome:
                return outcome, one.reason, ""
    if _PHASES <= {one.when for one in phases if one.outcome in ("passed", "known gap")}:
        for one in phases:
            if one.outcome == "known gap":
                return "known gap", one.reason, one.detail
        return "passed", "", ""
    return "could not run", f"{'did not finish' if phases else 'never ran'}: {STOPPED}", ""


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


def _detail(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash:
        text = str(crash.message).strip()
    else:
        lines = str(report.longrepr).strip().splitlines()
        text = "\n".join([line[1:].strip() for line in lines if line.startswith("E ")] or lines)
    short = "\n".join(text.splitlines()[:_DETAIL_LINES])[:_DETAIL_CHARACTERS]
    return short if short == text else f"{short}\n..."
