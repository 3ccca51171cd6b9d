"""The strict judge of expectations: tests that are expected to fail must fail, and only their failure is excused.

The expectations are those of ``expected.py``: of files, and the gaps of the releases' table. They are strict, or they
would hide that somebody learned to keep a contract. Only the call of a test can be excused: an error in its setup or
teardown shows something else, and stays what it is. ``--runxfail`` takes all tests as if nothing were expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from pytest_roll_vllm import expected
from pytest_roll_vllm.expected import FAIL, SKIP, Expectation, Place
from pytest_roll_vllm.markers import CONTRACT_KEY
from pytest_roll_vllm.options import SETTINGS, SUITE, Settings, usage_error
from pytest_roll_vllm.outcomes import EXPECTED_SKIP, GAP

_SUITE = Path(__file__).resolve().parents[1] / SUITE
_ENTRIES = "vllm_expectations"
_DECLARED = pytest.StashKey[list[Expectation]]()
_DESELECTED = pytest.StashKey[bool]()


def judge(item: pytest.Item, report: pytest.TestReport) -> None:
    """Turn the failure of a test that is expected to fail into a known gap, and its success into a failure."""
    if report.when != "call" or report.skipped:
        return
    entry = expectation(item, FAIL)
    if entry is None:
        return
    if report.failed:
        item.user_properties.append((GAP, entry.why))  # for JUnit files, which are written after the teardown
        report.user_properties.append((GAP, entry.why))
        report.outcome = "skipped"
        report.wasxfail = f"known gap: {entry.why}"
        return
    report.outcome = "failed"
    report.longrepr = (
        f"passed although {entry.source} expects {item.stash[CONTRACT_KEY].id} to fail on "
        f"{here(item.config.stash[SETTINGS])}: {entry.why}. Take the entry out, or narrow it."
    )


def skip_if_expected(item: pytest.Item) -> None:
    """Skip a test that is expected not to run, and record why."""
    entry = expectation(item, SKIP)
    if entry:
        item.user_properties.append((EXPECTED_SKIP, entry.why))
        pytest.skip(f"expected skip: {entry.why}")


def expectation(item: pytest.Item, outcome: str) -> Expectation | None:
    """Return what is expected of a test here, if it is that outcome; where there are several, the first one counts."""
    contract = item.stash.get(CONTRACT_KEY, None)
    if contract is None or item.config.getoption("runxfail"):
        return None
    found = [one for one in declared(item.config) if one.matches(contract.id, item.nodeid)]
    # The engine and the device are looked up only if there is any.
    place = here(item.config.stash[SETTINGS]) if found else None
    entry = next((one for one in found if place and one.applies(place)), None)
    return entry if entry and entry.outcome == outcome else None


def here(settings: Settings) -> Place | None:
    """Return what the tests of this process run on, or ``None`` without a vLLM: there nobody can tell."""
    if settings.installed is None:
        return None
    return Place(settings.installed.version, settings.engine or "", settings.device.backend, settings.target.value)


def declared(config: pytest.Config) -> list[Expectation]:
    """Return all expectations: those of the user's files first, then ours for the target, and those of the table.

    Raises:
        pytest.UsageError: If a file of the user's is wrong.
    """
    if _DECLARED not in config.stash:
        settings = config.stash[SETTINGS]
        ours = chain(expected.of_target(settings.target.value), expected.of_table())
        config.stash[_DECLARED] = [*_given(config, settings), *ours]
    return config.stash[_DECLARED]


def _given(config: pytest.Config, settings: Settings) -> list[Expectation]:
    sent = getattr(config, "workerinput", {}).get(_ENTRIES)
    if sent is not None:  # a worker on another machine may not have the files
        return [Expectation(**fields) for fields in sent]
    with usage_error(f"expectations from {settings.expectations.source}"):
        return [one for path in settings.expectation_files for one in expected.read(path)]


def send(config: pytest.Config, workerinput: dict[str, Any]) -> None:
    """Let an xdist worker have the expectations of the user's files."""
    settings = config.stash[SETTINGS]
    if settings.expectations.given:
        workerinput[_ENTRIES] = [asdict(one) for one in _given(config, settings)]


# -- what matches nothing -----------------------------------------------------------------------------------


def note_deselected(items: Iterable[pytest.Item]) -> None:
    """Take note that tests were deselected, by whatever."""
    for item in items:
        item.config.stash[_DESELECTED] = True


def deselected(config: pytest.Config) -> bool:
    """Whether that happened in this process."""
    return config.stash.get(_DESELECTED, False)


def asks_for_all(config: pytest.Config) -> bool:
    """Whether the command line asks for the whole suite, as far as it can tell."""
    if config.getoption("lf", False) or config.getoption("ignore") or config.getoption("ignore_glob"):
        return False

    def is_suite(arg: str) -> bool:
        path = config.invocation_params.dir / arg
        return bool(config.getoption("pyargs") and arg == SUITE) or path.resolve() == _SUITE

    return any(map(is_suite, config.args))


def unmatched(entry: Expectation) -> str:
    """Say what to do with an expectation that applies, and matches no test of the whole suite."""
    tests = "" if entry.test == "*" else f" and the test {entry.test!r}"
    return (
        f"{entry.source} expects something of the contract {entry.contract!r}{tests}, and the whole suite has none. "
        f"Correct the name (`pytest --vllm-contracts` lists all), or take the entry out"
    )


def applying(config: pytest.Config, about: Mapping[str, Any]) -> list[Expectation]:
    """Return the expectations that apply to a run, by what it ran on; none if it had no vLLM."""
    if about["vllm"] is None:
        return []
    target = config.stash[SETTINGS].target.value
    place = Place(about["vllm"]["version"], about["engine"] or "", about["backend"], target)
    return [one for one in declared(config) if one.applies(place)]
