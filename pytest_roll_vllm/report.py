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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from pytest_roll_vllm.options import DISTRIBUTION, RUN, SETTINGS, Settings, is_worker
from pytest_roll_vllm.outcomes import Outcome, Phase, Verdict

SCHEMA = "pytest-roll-vllm/report/1"
SCHEMA_OF_SEVERAL = "pytest-roll-vllm/report/2"
FILE_NAME = "report.json"

EXIT_INCOMPLETE = 8
"""Exit status of a run in which no test failed, but a contract could not run. pytest itself uses 0 to 6."""

_ABOUT = ("vllm", "torch", "python", "backend", "engine", "device")
_ABOUT_PROPERTY = "vllm_about"
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


class Run:
    """What became of the tests on one engine: of a session, or of one version of several.

    Attributes:
        label: Its name where there are several: ``0.12.0-cpu``.
        about: What it ran on, as :func:`about` returns it; only in part before it has started.
        problem: Why it could not go on, or could not even start; empty if it could.
        contracts: The declarations by id.
        selected: The contract's id for each selected test's node id.
        notes: The values that :func:`note` was given, by key.
        broken_collection: Whether a module could not be collected, so that nobody knows its tests.
    """

    def __init__(self, label: str = "", about: Mapping[str, Any] | None = None) -> None:
        self.label = label
        self.about: dict[str, Any] = dict.fromkeys(_ABOUT) | dict(about or {})
        self.problem = ""
        self.contracts: dict[str, Contract] = {}
        self.selected: dict[str, str] = {}
        self.notes: dict[str, list[object]] = {}
        self.broken_collection = False
        self._phases: dict[str, list[Phase]] = {}

    @cached_property
    def results(self) -> dict[str, ContractResult]:
        """The results by contract id, to be asked for when all tests have run."""
        tests: dict[str, dict[str, Verdict]] = {}
        for nodeid, id in sorted(self.selected.items()):
            verdict = outcomes.judge_test(self._phases.get(nodeid, ()))
            if self.problem and verdict.outcome == "could not run" and verdict.reason.endswith(outcomes.STOPPED):
                verdict = replace(verdict, reason=self.problem)
            tests.setdefault(id, {})[nodeid] = verdict
        return {
            id: ContractResult(self.contracts.get(id) or Contract(id, "unknown"), outcomes.judge([*own.values()]), own)
            for id, own in sorted(tests.items())
        }

    @property
    def totals(self) -> dict[Outcome, int]:
        """The number of contracts with each outcome."""
        counts = Counter(result.verdict.outcome for result in self.results.values())
        return {outcome: counts[outcome] for outcome in outcomes.OUTCOMES}

    @property
    def proven(self) -> bool:
        """Whether every selected contract gave an answer."""
        return not self.problem and self.totals["could not run"] == 0

    def complete(self, exit_status: int) -> bool:
        """Whether, besides, every test did, all tests could be collected, and nothing stopped the session."""
        return (
            exit_status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, EXIT_INCOMPLETE)
            and not self.problem
            and not self.broken_collection
            # A selection that did not arrive, from a worker on another machine, may have had more tests.
            and set(self.results) <= set(self.contracts)
            and all(
                test.outcome != "could not run" for result in self.results.values() for test in result.tests.values()
            )
        )

    def select(self, contracts: Mapping[str, Contract], selected: Mapping[str, str]) -> None:
        """Add tests that are going to run."""
        self.contracts.update(contracts)
        self.selected.update(selected)

    def take(self, report: pytest.TestReport) -> None:
        """Take the report of a test."""
        nodeid = plain(report.nodeid, self.label)
        for name, value in report.user_properties:
            if name == outcomes.CONTRACT:
                self.selected.setdefault(nodeid, str(value))
            elif name == _NOTE:
                self.add_notes([cast("tuple[str, object]", value)])
            elif name == _ABOUT_PROPERTY:
                self.about.update(cast("dict[str, Any]", value))
        if nodeid in self.selected:
            self._phases.setdefault(nodeid, []).append(outcomes.phase(report))

    def add_notes(self, notes: Iterable[tuple[str, object]]) -> None:
        """Add what :func:`note` was given."""
        for key, value in notes:
            self.notes.setdefault(key, []).append(value)

    def document(self, exit_status: int) -> dict[str, Any]:
        """Return what ``report.json`` says of it."""
        return {
            "complete": self.complete(exit_status),
            "problem": self.problem,
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


class Recorder:
    """Collects what a session selected and what became of it; a plugin of its own.

    Attributes:
        runs: What was found, by label: a single one without, or those that :meth:`expect` announced.
        exit_status: The exit status of the session, when it is finished.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.runs: dict[str, Run] = {"": Run()}
        self.exit_status = int(pytest.ExitCode.INTERNAL_ERROR)
        self._config = config
        self._date = datetime.now(timezone.utc)
        path = self.path
        if path:
            path.unlink(missing_ok=True)  # so that a run which is killed does not leave an earlier report

    @property
    def path(self) -> Path | None:
        """Where the report goes, or ``None`` if none is wanted or nothing runs."""
        directory = self._config.stash[SETTINGS].report_dir
        return directory / FILE_NAME if directory and runs_tests(self._config) else None

    @property
    def totals(self) -> dict[Outcome, int]:
        """The number of contracts with each outcome, each counted for every run."""
        return {outcome: sum(run.totals[outcome] for run in self.runs.values()) for outcome in outcomes.OUTCOMES}

    def expect(self, label: str, about: Mapping[str, Any] | None = None) -> None:
        """Announce a run of several, in whose process nothing has happened yet."""
        self.runs.pop("", None)
        self.runs.setdefault(label, Run(label, about))

    def lose(self, label: str, problem: str) -> None:
        """Record that a run could not go on, or could not even start."""
        self.runs[label].problem = problem

    def select(self, contracts: Mapping[str, Contract], selected: Mapping[str, str]) -> None:
        """Add tests that are going to run, or would have, if no process could be started for any run."""
        for run in self.runs.values():
            run.select(contracts, selected)

    def finish(self, session: pytest.Session) -> None:
        """Settle the exit status, and write the report."""
        self._share_selection()
        for run in self.runs.values():
            if not run.label:
                run.add_notes(_take_notes(self._config))
        proven = all(run.proven for run in self.runs.values())
        if session.exitstatus == pytest.ExitCode.OK and not proven:
            session.exitstatus = EXIT_INCOMPLETE
        self.exit_status = int(session.exitstatus)
        if self.path:
            write_json(self.path, self._document())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a report, of this process or of a worker."""
        self._run_of(report).take(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notice a module that could not be collected."""
        self._run_of(report).broken_collection |= report.failed

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
            run = self.runs[_label(node)]
            run.about.update(found["about"])
            run.select({id: _contract(fields) for id, fields in found["contracts"].items()}, found["tests"])

    def _run_of(self, report: pytest.TestReport | pytest.CollectReport) -> Run:
        node = getattr(report, "node", None)
        # Without a node, a module could not be collected here, where it stands for all runs.
        return self.runs[_label(node)] if node else next(iter(self.runs.values()))

    def _share_selection(self) -> None:
        """Let a run that never came to say what it selected have the tests of the others: none of them ran there."""
        for run in self.runs.values():
            if run.label and run.about["vllm"] is None and not run.selected:
                for other in self.runs.values():
                    run.select(other.contracts, other.selected)

    def _document(self) -> dict[str, Any]:
        settings = self._config.stash[SETTINGS]
        model = settings.model.value
        session = {
            "suite": {"distribution": pytest_roll_vllm.DISTRIBUTION, "version": pytest_roll_vllm.__version__},
            "settings": {name: asdict(setting) for name, setting in settings.all().items()},
            "date": self._date.isoformat(timespec="seconds"),
            "command": shlex.join(["pytest", *self._config.invocation_params.args]),
            "xdist": self._config.pluginmanager.has_plugin("dsession"),
            "exit_status": self.exit_status,
        }
        runs = [*self.runs.values()]
        if len(runs) == 1:
            found = runs[0].about if runs[0].label else about(settings)
            return {"schema": SCHEMA, **session, **found, "model": model, **runs[0].document(self.exit_status)}
        return {
            "schema": SCHEMA_OF_SEVERAL,
            **session,
            "model": model,
            "complete": all(run.complete(self.exit_status) for run in runs),
            "totals": self.totals,
            "runs": [{"label": run.label, **run.about, **run.document(self.exit_status)} for run in runs],
        }


RECORDER = pytest.StashKey[Recorder]()


def select(session: pytest.Session) -> None:
    """Record which tests are going to run; an xdist worker leaves it for the controller."""
    selected = {item.nodeid: item.stash[CONTRACT_KEY] for item in session.items if CONTRACT_KEY in item.stash}
    contracts = {contract.id: contract for contract in selected.values()}
    tests = {nodeid: contract.id for nodeid, contract in selected.items()}
    config = session.config
    if tests and not config.pluginmanager.hasplugin(DISTRIBUTION):
        _ = config.stash[SETTINGS].engine  # raises now if there is none; and engines change the environment later
    if not is_worker(config):
        config.stash[RECORDER].select(contracts, tests)
        return
    settings = config.stash[SETTINGS]
    found: dict[str, Any] = {}
    if settings.label:
        found = about(settings)
        _describe(session.items, found, settings)
    if tests or found:
        found = {"contracts": {id: asdict(one) for id, one in contracts.items()}, "tests": tests, "about": found}
        with suppress(OSError):  # a worker on another machine may not have the directory
            write_json(Path(config.workerinput[_SELECTION]), found)  # type: ignore[attr-defined]


def about(settings: Settings) -> dict[str, Any]:
    """Return what tests of this process run on."""
    try:
        engine = settings.engine
    except pytest.UsageError:  # has ended the session, which still wants its report
        engine = None
    found = (
        asdict(settings.installed) if settings.installed else None,
        torch_version(),
        platform.python_version(),
        settings.device.backend,
        engine,
        asdict(settings.device),
    )
    return dict(zip(_ABOUT, found, strict=True))


def _describe(items: Sequence[pytest.Item], found: dict[str, Any], settings: Settings) -> None:
    """Let the tests of one of several runs carry what they run on; the first one all of it."""
    for item in items:
        item.user_properties.append(("vllm_run", settings.label))
    plain = json.loads(json.dumps(found))  # xdist takes no tuples
    if items:
        items[0].user_properties.append((_ABOUT_PROPERTY, plain))


def named(nodeid: str, label: str) -> str:
    """Name a test after its run, as if it were a parameter: ``test_it[0.12.0-cpu]``."""
    return f"{nodeid[:-1]}-{label}]" if nodeid.endswith("]") else f"{nodeid}[{label}]"


def plain(nodeid: str, label: str) -> str:
    """Undo :func:`named`; a node id that it has not made stays what it is."""
    if label and nodeid.endswith(f"-{label}]"):
        return nodeid.removesuffix(f"-{label}]") + "]"
    return nodeid.removesuffix(f"[{label}]")


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


def _label(node: Any) -> str:
    label: str = node.workerinput.get(RUN, {}).get("label", "")
    return label


def _contract(fields: Mapping[str, Any]) -> Contract:
    contract = Contract(**fields)  # JSON made lists of its tuples
    return replace(contract, backends=tuple(contract.backends), references=tuple(contract.references))
