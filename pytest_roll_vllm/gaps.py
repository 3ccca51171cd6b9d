"""Declared gaps: where a release cannot keep a contract, the contract's tests must fail, and their failure is excused.

A gap is strict, or it would hide that the release, or we, learned to do it. Only the call of a test can be excused:
an error in its setup or teardown shows something else, and stays what it is. ``--runxfail`` shows the failures.
"""

from __future__ import annotations

import pytest

from pytest_roll_vllm.markers import CONTRACT_KEY
from pytest_roll_vllm.options import SETTINGS, Settings
from pytest_roll_vllm.outcomes import GAP
from roll_vllm import versions
from roll_vllm.versions import Gap


def judge(item: pytest.Item, report: pytest.TestReport) -> None:
    """Turn the failure of a test whose contract has a gap here into a known gap, and its success into a failure."""
    contract = item.stash.get(CONTRACT_KEY, None)
    if contract is None or report.when != "call" or report.skipped or item.config.getoption("runxfail"):
        return
    settings = item.config.stash[SETTINGS]
    gap = declared(settings, contract.id)
    if gap is None:
        return
    why = f"{gap.reason} ({gap.reference})"
    if report.failed:
        item.user_properties.append((GAP, why))  # for JUnit files, which are written after the teardown
        report.user_properties.append((GAP, why))
        report.outcome = "skipped"
        report.wasxfail = f"known gap: {why}"
        return
    row = versions.resolve(settings.installed.version) if settings.installed else None
    report.outcome = "failed"
    report.longrepr = (
        f"passed although {row.release if row else 'this release'} ({settings.engine}, {settings.device.backend}) "
        f"declares a gap for {contract.id}: {why}. Take the gap out of roll_vllm/versions.py, or narrow it."
    )


def declared(settings: Settings, contract_id: str) -> Gap | None:
    """Return the gap of a contract for what is installed and the engine and backend of this run."""
    row = versions.resolve(settings.installed.version) if settings.installed else None
    # The engine and the device are looked up only if there is any gap.
    if row is None or not any(gap.contract == contract_id for gap in row.gaps):
        return None
    return row.gap(contract_id, settings.engine or "", settings.device.backend)
