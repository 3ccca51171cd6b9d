"""What a run found out: collected while it runs, written to ``report.json`` at its end, and as pages beside it.

Under xdist the controller does this. Results and notes come to it in the ``user_properties`` of reports.
What was selected comes earlier, in a file per worker: after a crash or Ctrl-C there may be no report to
carry it. ``docs/report.md`` describes the format; ``pages/`` makes the pages, from nothing but the report.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import pytest_roll_vllm
from pytest_roll_vllm import files, gaps, outcomes, rerun
from pytest_roll_vllm.contracts import Contract
from pytest_roll_vllm.expected import Expectation
from pytest_roll_vllm.markers import CONTRACT_KEY
from pytest_roll_vllm.options import DISTRIBUTION, RUN, SETTINGS, Settings, is_worker
from pytest_roll_vllm.outcomes import Outcome, Phase, Verdict
from pytest_roll_vllm.surroundings import redacted, surroundings, without_secrets

if TYPE_CHECKING:
    from roll_vllm.patches.process import Record

SCHEMA = "pytest-roll-vllm/report/1"
SCHEMA_OF_SEVERAL = "pytest-roll-vllm/report/2"
FILE_NAME = "report.json"
PAGES = ("report.md", "report.html")

EXIT_INCOMPLETE = 8
"""Exit status of a run in which no test failed, but a contract could not run. pytest itself uses 0 to 6."""

_ABOUT = ("vllm", "torch", "python", "backend", "engine", "device", "environment")
_OF_EXPECTATION = ("contract", "test", "outcome", "reason", "link", "source")
_ABOUT_PROPERTY = "vllm_about"
_NOTE = "vllm_note"
_PATCHES = "patches"
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


def note_patches(node: pytest.Config | pytest.Item | pytest.Session, records: Iterable[Record]) -> None:
    """Add what became of the patches in the processes of an engine to ``patches`` in the report."""
    for record in records:
        note(node, _PATCHES, {name: one.outcome for name, one in record.patches.items()})


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
        patches: For each patch, the number of processes with each outcome.
        broken_collection: Whether a module could not be collected, so that nobody knows its tests.
        deselected: Whether tests were deselected, or it is not known that none were.
        unmatched: The expectations that apply to it, and match no test although the whole suite was selected.
    """

    def __init__(self, label: str = "", about: Mapping[str, Any] | None = None) -> None:
        self.label = label
        self.about: dict[str, Any] = dict.fromkeys(_ABOUT) | dict(about or {})
        self.problem = ""
        self.contracts: dict[str, Contract] = {}
        self.selected: dict[str, str] = {}
        self.notes: dict[str, list[object]] = {}
        self.patches: dict[str, Counter[str]] = {}
        self.broken_collection = False
        self.deselected = True
        self.unmatched: list[Expectation] = []
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

    def expects(self, entry: Expectation) -> int:
        """Return how many selected tests an expectation matches."""
        return sum(entry.matches(id, nodeid) for nodeid, id in self.selected.items())

    def look_for_unmatched(self, applying: Sequence[Expectation]) -> None:
        """Find the expectations that match nothing, of those that apply here."""
        if not (self.deselected or self.broken_collection or self.problem):
            self.unmatched = [entry for entry in applying if not self.expects(entry)]

    def take(self, report: pytest.TestReport) -> None:
        """Take the report of a test; what is meant for us alone does not stay in it."""
        nodeid = plain(report.nodeid, self.label)
        for name, value in report.user_properties:
            if name == outcomes.CONTRACT:
                self.selected.setdefault(nodeid, str(value))
            elif name == _NOTE:
                self.add_notes([cast("tuple[str, object]", value)])
            elif name == _ABOUT_PROPERTY:
                self.about.update(cast("dict[str, Any]", value))
        report.user_properties[:] = [one for one in report.user_properties if one[0] not in (_NOTE, _ABOUT_PROPERTY)]
        if nodeid in self.selected:
            self._phases.setdefault(nodeid, []).append(outcomes.phase(report))

    def add_notes(self, notes: Iterable[tuple[str, object]]) -> None:
        """Add what :func:`note` was given."""
        for key, value in notes:
            if key != _PATCHES:
                self.notes.setdefault(key, []).append(value)
                continue
            for name, outcome in cast("dict[str, str]", value).items():
                self.patches.setdefault(name, Counter())[outcome] += 1

    def properties(self, nodeid: str) -> list[tuple[str, object]]:
        """Return what a report of a test of a contract carries, for one that was not made where the test ran."""
        id = self.selected.get(plain(nodeid, self.label))
        return _properties(id, self.about) if id else []

    def document(
        self, exit_status: int, again: Callable[[str, str], str], applying: Sequence[Expectation]
    ) -> dict[str, Any]:
        """Return what ``report.json`` says of it.

        Args:
            exit_status: That of the session.
            again: Returns the command that runs a contract again, by its id and the label of the run.
            applying: The expectations that apply to it.
        """
        return {
            "complete": self.complete(exit_status),
            "problem": self.problem,
            "totals": self.totals,
            "contracts": {
                id: {
                    **asdict(result.contract),
                    "outcome": result.verdict.outcome,
                    "seconds": result.verdict.seconds,
                    "reason": result.verdict.reason,
                    "again": again(id, self.label),
                    "tests": [
                        {"nodeid": nodeid, **asdict(test), "ranks": test.ranks} for nodeid, test in result.tests.items()
                    ],
                }
                for id, result in self.results.items()
            },
            "expectations": [
                {
                    **{name: getattr(one, name) for name in _OF_EXPECTATION},
                    "tests": self.expects(one),
                    "unmatched": one in self.unmatched,
                }
                for one in applying
            ],
            "patches": _patches(self.about["vllm"], self.patches),
            "notes": self.notes,
        }


class Recorder:
    """Collects what a session selected and what became of it; a plugin of its own.

    Attributes:
        runs: What was found, by label: a single one without, or those that :meth:`expect` announced.
        exit_status: The exit status of the session, when it is finished.
        unwritten: What could not be written at its end, and why.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.runs: dict[str, Run] = {"": Run()}
        self.exit_status = int(pytest.ExitCode.INTERNAL_ERROR)
        self.unwritten: list[str] = []
        self._config = config
        self._date = datetime.now(timezone.utc)
        if self.path:
            for name in (FILE_NAME, *PAGES):  # so that a run which is killed does not leave an earlier report
                self.path.with_name(name).unlink(missing_ok=True)

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

    def finish(self, session: pytest.Session, error: BaseException | None = None) -> None:
        """Settle the exit status, and write the report.

        Args:
            session: that ends.
            error: What kept others from finishing it, if anything did; the report is incomplete then.
        """
        if error is not None:
            what = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
            interrupted = "was interrupted and " if session.exitstatus == pytest.ExitCode.INTERRUPTED else ""
            for run in self.runs.values():
                run.problem = run.problem or f"the session {interrupted}could not be finished: {what}"
        self._share_selection()
        for run in self.runs.values():
            if not run.label:
                run.add_notes(_take_notes(self._config))
            if run.selected and gaps.asks_for_all(self._config):
                self._look_around(run)
                run.look_for_unmatched(gaps.applying(self._config, run.about))
        proven = all(run.proven for run in self.runs.values())
        if session.exitstatus == pytest.ExitCode.OK and any(run.unmatched for run in self.runs.values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif session.exitstatus == pytest.ExitCode.OK and not proven:
            session.exitstatus = EXIT_INCOMPLETE
        self.exit_status = int(session.exitstatus)
        if self.path:
            self._write(self.path)
        if self.unwritten and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = EXIT_INCOMPLETE
            self.exit_status = EXIT_INCOMPLETE

    @pytest.hookimpl(tryfirst=True)  # before those who write the properties of reports to files of their own
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a report, of this process or of a worker."""
        run = self._run_of(report)
        run.take(report)
        if report.when not in ("setup", "call", "teardown"):
            self._look_around(run)
            self._complete(report, run.properties(report.nodeid))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notice a module that could not be collected."""
        self._run_of(report).broken_collection |= report.failed

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell an xdist worker where to leave its selection, and what is expected."""
        gaps.send(self._config, node.workerinput)
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
            run.deselected = found["deselected"]
            run.select({id: _contract(fields) for id, fields in found["contracts"].items()}, found["tests"])

    def _write(self, path: Path) -> None:
        """Write report and pages; what cannot be written is said in the terminal, and stops nothing else."""
        from pytest_roll_vllm import pages

        document = redacted(self._document(), os.environ)
        steps: tuple[tuple[Sequence[str], Callable[[], object]], ...] = (
            ([FILE_NAME], partial(write_json, path, document)),
            (PAGES, partial(pages.write, [document], path.parent)),
        )
        for names, write in steps:
            try:
                write()
            except OSError as error:
                why = f"{error.strerror or error}: make room in {path.parent} or make it writable, and run again"
                self.unwritten.append(f"{' and '.join(names)} could not be written ({why})")
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                remedy = f"please report this; `python -m pytest_roll_vllm.pages {path}` tries again"
                self.unwritten.append(f"{' and '.join(names)} could not be made ({why}): {remedy}")

    def _look_around(self, run: Run) -> None:
        """Find out what the only run is on, where its tests were collected by the workers of xdist."""
        if not run.label and run.about["device"] is None:
            run.about.update(about(self._config.stash[SETTINGS]))

    def _complete(self, report: pytest.TestReport, properties: Sequence[tuple[str, object]]) -> None:
        """Give the properties of a test to xdist's report of the crash in it, and to JUnit, which takes them later."""
        from _pytest.junitxml import xml_key

        report.user_properties.extend(properties)
        xml = self._config.stash.get(xml_key, None)
        if xml:
            for name, value in properties:
                xml.node_reporter(report).add_property(name, str(value))

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
            "command": shlex.join(["pytest", *without_secrets(self._config.invocation_params.args)]),
            "xdist": self._config.pluginmanager.has_plugin("dsession"),
            "exit_status": self.exit_status,
        }
        runs = [*self.runs.values()]

        def document(run: Run) -> dict[str, Any]:
            applying = gaps.applying(self._config, run.about) if run.selected else []
            return run.document(self.exit_status, partial(rerun.command, self._config), applying)

        if len(runs) == 1:
            run = runs[0]
            self._look_around(run)
            return {"schema": SCHEMA, **session, **run.about, "model": model, **document(run)}
        return {
            "schema": SCHEMA_OF_SEVERAL,
            **session,
            "model": model,
            "complete": all(run.complete(self.exit_status) for run in runs),
            "totals": self.totals,
            "runs": [{"label": run.label, **run.about, **document(run)} for run in runs],
        }


RECORDER = pytest.StashKey[Recorder]()


def select(session: pytest.Session) -> None:
    """Record which tests are going to run; an xdist worker leaves it for the controller."""
    selected = {item.nodeid: item.stash[CONTRACT_KEY] for item in session.items if CONTRACT_KEY in item.stash}
    contracts = {contract.id: contract for contract in selected.values()}
    tests = {nodeid: contract.id for nodeid, contract in selected.items()}
    config = session.config
    settings = config.stash[SETTINGS]
    found: dict[str, Any] = {}
    ours = bool(tests) and not config.pluginmanager.hasplugin(DISTRIBUTION)
    if ours:
        _ = settings.engine  # raises if there is none
    if ours or settings.label:
        found = about(settings)  # now, because engines change the environment later
    for item in session.items:
        if CONTRACT_KEY in item.stash and found:
            item.user_properties += _properties(item.stash[CONTRACT_KEY].id, found)[1:]
    if not is_worker(config):
        recorder = config.stash[RECORDER]
        recorder.select(contracts, tests)
        if found:
            recorder.runs[""].about.update(found)
            recorder.runs[""].deselected = gaps.deselected(config)
        return
    if settings.label:
        _describe(session.items, found, settings)
    else:
        found = {}
    if tests or found:
        found = {
            "contracts": {id: asdict(one) for id, one in contracts.items()},
            "tests": tests,
            "about": found,
            "deselected": gaps.deselected(config),
        }
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
        surroundings(os.environ),
    )
    return dict(zip(_ABOUT, found, strict=True))


def _properties(id: str, found: Mapping[str, Any]) -> list[tuple[str, object]]:
    version = found["vllm"]["version"] if found["vllm"] else "not installed"
    return [(outcomes.CONTRACT, id), (outcomes.VERSION, version), (outcomes.BACKEND, found["backend"])]


def _patches(vllm: Mapping[str, str] | None, processes: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Return the patches that the release declares, each with the number of processes by what became of it there."""
    from roll_vllm.patches.apply import selected
    from roll_vllm.patches.registry import PATCHES

    declared = selected(PATCHES, vllm["version"]) if vllm else []
    return [
        {
            "name": patch.name,
            "target": patch.target,
            "why": patch.why,
            "upstream": patch.upstream,
            "processes": dict(processes.get(patch.name, {})),
        }
        for patch in declared
    ]


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
    return not any(config.getoption(name, False) for name in ("collectonly", "setuponly", "vllm_contracts"))


def torch_version() -> str | None:
    """Return the version of the installed torch, without importing it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def write_json(path: Path, document: object) -> None:
    """Write a file as a whole or not at all."""
    files.write(path, json.dumps(document, indent=2) + "\n")


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
