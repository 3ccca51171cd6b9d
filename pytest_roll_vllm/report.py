"""What a run found out: collected while it runs, written to ``report.json`` at its end.

Under xdist the controller does this. Results and notes come to it in the ``user_properties`` of reports.
What was selected comes earlier, in a file per worker: after a crash or Ctrl-C there may be no report to
carry it. ``docs/report.md`` describes the format.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import pytest

import pytest_roll_vllm
from pytest_roll_vllm import outcomes
from pytest_roll_vllm.contracts import Contract
from pytest_roll_vllm.markers import CONTRACT_KEY
from pytest_roll_vllm.options import SETTINGS, is_worker
from pytest_roll_vllm.outcomes import Outcome, Phase, Verdict

SCHEMA = "pytest-roll-vllm/report/1"
FILE_NAME = "report.json"

EXIT_INCOMPLETE = 8
"""Exit status of a run in which no test failed, but a contract could not run. pytest itself uses 0 to 6."""

_NOTE = "vllm_note"
_SELECTION = "vllm_selection"
_PENDING = pytest.StashKey[list[tuple[str, object]]]()


def note(node: pytest.Config | pytest.Item | pytest.Session, key: str, value: object) -> None:
    """Add a value to ``notes`` in the report, under a key that may have several.

    It travels with the next test report of this process. Any thread may call this.

    Args:
        node: The configuration, or anything that has it, such as ``request.node``.
        key: What it is about, in plural: ``engine starts``.
        value: Anything that JSON can hold.

    Raises:
        TypeError: If JSON cannot hold the value.
        ValueError: If JSON cannot hold the value.
    """
    plain = json.loads(json.dumps(value, allow_nan=False))  # xdist takes no subclasses, numpy's for one
    config = node if isinstance(node, pytest.Config) else node.config
    config.stash.setdefault(_PENDING, []).append((key, plain))


def attach_notes(config: pytest.Config, report: pytest.TestReport) -> None:
    """Let a report carry the notes made since the last one."""
    report.user_properties.extend((_NOTE, one) for one in _take_notes(config))


@dataclass(frozen=True)
class ContractResult:
    """A contract with its outcome and those of its tests by node id."""

    contract: Contract
    verdict: Verdict
    tests: Mapping[str, Verdict]


class Recorder:
    """Collects what contracts a run selected and what became of them; a plugin of its own.

    Attributes:
        contracts: The declarations by id.
        selected: The contract's id for each selected test's node id.
        notes: The values that :func:`note` was given, by key.
        exit_status: The exit status of the run, when it is finished.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.contracts: dict[str, Contract] = {}
        self.selected: dict[str, str] = {}
        self.notes: dict[str, list[object]] = {}
        self.exit_status = int(pytest.ExitCode.INTERNAL_ERROR)
        self._config = config
        self._phases: dict[str, list[Phase]] = {}
        self._broken_collection = False
        self._date = datetime.now(timezone.utc)
        path = self.path
        if path:
            path.unlink(missing_ok=True)  # so that a run which is killed does not leave an earlier report

    @property
    def path(self) -> Path | None:
        """Where the report goes, or ``None`` if none is wanted or nothing runs."""
        directory = self._config.stash[SETTINGS].report_dir
        return directory / FILE_NAME if directory and runs_tests(self._config) else None

    @cached_property
    def results(self) -> dict[str, ContractResult]:
        """The results by contract id, to be asked for when all tests have run."""
        tests: dict[str, dict[str, Verdict]] = {}
        for nodeid, id in sorted(self.selected.items()):
            tests.setdefault(id, {})[nodeid] = outcomes.judge_test(self._phases.get(nodeid, ()))
        return {
            id: ContractResult(self.contracts.get(id) or Contract(id, "unknown"), outcomes.judge([*own.values()]), own)
            for id, own in sorted(tests.items())
        }

    @property
    def totals(self) -> dict[Outcome, int]:
        """The number of contracts with each outcome."""
        counts = Counter(result.verdict.outcome for result in self.results.values())
        return {outcome: counts[outcome] for outcome in outcomes.OUTCOMES}

    def select(self, contracts: Mapping[str, Contract], selected: Mapping[str, str]) -> None:
        """Add tests that are going to run."""
        self.contracts.update(contracts)
        self.selected.update(selected)

    def finish(self, session: pytest.Session) -> None:
        """Settle the exit status, and write the report."""
        self._add_notes(_take_notes(self._config))
        incomplete = self.totals["could not run"] > 0
        if incomplete and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = EXIT_INCOMPLETE
        self.exit_status = int(session.exitstatus)
        if self.path:
            write_json(self.path, self._document())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a report, of this process or of a worker."""
        for name, value in report.user_properties:
            if name == outcomes.CONTRACT:
                self.selected.setdefault(report.nodeid, str(value))
            elif name == _NOTE:
                self._add_notes([cast("tuple[str, object]", value)])
        if report.nodeid in self.selected:
            self._phases.setdefault(report.nodeid, []).append(outcomes.phase(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notice a module that could not be collected, so that nobody knows its tests."""
        self._broken_collection |= report.failed

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell an xdist worker where to leave its selection."""
        name = f"pytest-roll-vllm-{node.workerinput['testrunuid']}-{node.workerinput['workerid']}.json"
        node.workerinput[_SELECTION] = str(Path(tempfile.gettempdir(), name))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        """Take the selection of an xdist worker; there is none if it has no test of ours."""
        path = Path(node.workerinput[_SELECTION])
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
            self.select({id: _contract(fields) for id, fields in found["contracts"].items()}, found["tests"])

    def _add_notes(self, notes: Iterable[tuple[str, object]]) -> None:
        for key, value in notes:
            self.notes.setdefault(key, []).append(value)

    def _complete(self) -> bool:
        """Whether every selected test gave an answer, and all tests could be collected."""
        return (
            self.exit_status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
            and not self._broken_collection
            # A selection that did not arrive, from a worker on another machine, may have had more tests.
            and set(self.results) <= set(self.contracts)
            and all(
                test.outcome != "could not run" for result in self.results.values() for test in result.tests.values()
            )
        )

    def _document(self) -> dict[str, Any]:
        settings = self._config.stash[SETTINGS]
        return {
            "schema": SCHEMA,
            "suite": {"distribution": pytest_roll_vllm.DISTRIBUTION, "version": pytest_roll_vllm.__version__},
            "vllm": asdict(settings.installed) if settings.installed else None,
            "torch": torch_version(),
            "python": platform.python_version(),
            "backend": settings.device.kind,
            "device": asdict(settings.device),
            "model": settings.model.value,
            "settings": {name: asdict(setting) for name, setting in settings.all().items()},
            "date": self._date.isoformat(timespec="seconds"),
            "command": shlex.join(["pytest", *self._config.invocation_params.args]),
            "xdist": self._config.pluginmanager.has_plugin("dsession"),
            "complete": self._complete(),
            "exit_status": self.exit_status,
            "totals": self.totals,
            "contracts": {
                id: {
                    **asdict(result.contract),
                    **asdict(result.verdict),
                    "tests": [{"nodeid": nodeid, **asdict(test)} for nodeid, test in result.tests.items()],
                }
                for id, result in self.results.items()
            },
            "notes": self.notes,
        }


RECORDER = pytest.StashKey[Recorder]()


def select(session: pytest.Session) -> None:
    """Record which tests are going to run; an xdist worker leaves it for the controller."""
    selected = {item.nodeid: item.stash[CONTRACT_KEY] for item in session.items if CONTRACT_KEY in item.stash}
    contracts = {contract.id: contract for contract in selected.values()}
    tests = {nodeid: contract.id for nodeid, contract in selected.items()}
    if not is_worker(session.config):
        session.config.stash[RECORDER].select(contracts, tests)
    elif tests:
        found = {"contracts": {id: asdict(one) for id, one in contracts.items()}, "tests": tests}
        with suppress(OSError):  # a worker on another machine may not have the directory
            write_json(Path(session.config.workerinput[_SELECTION]), found)  # type: ignore[attr-defined]


def runs_tests(config: pytest.Config) -> bool:
    """Whether this run is meant to run tests, not to show them."""
    return not (config.getoption("collectonly", False) or config.getoption("setuponly", False))


def torch_version() -> str | None:
    """Return the version of the installed torch, without importing it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def write_json(path: Path, document: object) -> None:
    """Write a file as a whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _take_notes(config: pytest.Config) -> Iterator[tuple[str, object]]:
    pending = config.stash.get(_PENDING, [])
    while pending:  # one by one: other threads may add some meanwhile
        yield pending.pop(0)


def _contract(fields: Mapping[str, Any]) -> Contract:
    contract = Contract(**fields)  # JSON made lists of its tuples
    return replace(contract, backends=tuple(contract.backends), references=tuple(contract.references))
