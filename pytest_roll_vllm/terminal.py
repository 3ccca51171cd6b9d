"""What the terminal shows: which engine is tested and why this one, and what became of the contracts."""

from __future__ import annotations

from dataclasses import replace

import pytest

import pytest_roll_vllm
from pytest_roll_vllm import gaps, rerun
from pytest_roll_vllm.matrix import matrix
from pytest_roll_vllm.options import DISTRIBUTION, SETTINGS, Settings, runs_suite
from pytest_roll_vllm.outcomes import Outcome, worst
from pytest_roll_vllm.report import EXIT_INCOMPLETE, PAGES, RECORDER, ContractResult, Run, torch_version
from roll_vllm import versions

_COLOURS: dict[Outcome, dict[str, bool]] = {
    "passed": {"green": True},
    "failed": {"red": True},
    "known gap": {"yellow": True},
    "expected skip": {"yellow": True},
    "not applicable": {},
    "could not run": {"yellow": True},
}

_MORE_LINES = 8  # of what a failure says, besides the first one; the traceback is further up

_SHOWN: tuple[Outcome, ...] = ("not applicable", "expected skip", "known gap", "could not run", "failed")


def wants_header(config: pytest.Config) -> bool:
    """Whether it is known, before anything was collected, that the run is ours."""
    return config.stash[SETTINGS].given or runs_suite(config)


def header(config: pytest.Config) -> list[str]:
    """Describe what is tested: each value with its source."""
    settings = config.stash[SETTINGS]
    distribution = config.pluginmanager.getplugin(DISTRIBUTION)
    if distribution:
        lines: list[str] = distribution.header()
        return lines
    device = settings.device
    memory = [f"{size / 2**30:.1f} GiB" for size in device.memory_bytes if size]
    names = ", ".join(dict.fromkeys([*device.names, *memory]))
    return [
        f"roll-vllm: {pytest_roll_vllm.__version__}, torch {torch_version() or '(not installed)'}",
        f"vllm: {_version(settings)}{f', engine {settings.engine}' if settings.engine else ''}",
        f"backend: {device.count} {device.backend} [{names}], {device.reason}; wanted: {settings.backend}",
        f"model: {settings.model}",
        f"executors: {replace(settings.executors, value=', '.join(settings.wanted_executors))}",
        f"vllm cache: {settings.cache_dir}",
        *expectations(settings),
    ]


def expectations(settings: Settings) -> list[str]:
    """Name the expectations files of the user's, if there are any."""
    return [f"expectations: {settings.expectations}"] if settings.expectations.given else []


def summarize(reporter: pytest.TerminalReporter) -> None:
    """Write the section on contracts, if there were any."""
    config = reporter.config
    recorder = config.stash[RECORDER]
    runs = [*recorder.runs.values()]
    if not (recorder.unwritten or any(run.results or run.problem for run in runs)):
        return
    reporter.write_sep("=", "vllm contracts")
    settings = config.stash[SETTINGS]
    several = len(runs) > 1
    for run in runs:
        # Again, because -q hides the header, and an outcome without its engine says nothing.
        name = f"{run.label}: " if several else ""
        reporter.write_line(f"{name}{_about(run, settings)}; model {settings.model.value}")
        if run.problem:
            reporter.write_line(f"{name}COULD NOT RUN: {run.problem}", **_COLOURS["could not run"])
    for outcome in _SHOWN:
        for run in runs:
            for result in run.results.values():
                # What the line above has said need not be said again for each contract.
                if result.verdict.outcome == outcome and not result.verdict.reason.startswith(run.problem or " "):
                    _write_result(reporter, result, run, run.label if several else "")
    for run in runs:
        for entry in run.unmatched:
            where = f" [{run.label}]" if several else ""
            reporter.write_line(f"UNMATCHED {entry.contract}{where}: {gaps.unmatched(entry)}", red=True)
    if several:
        for line, found in matrix({
            run.label: {id: result.verdict.outcome for id, result in run.results.items()} for run in runs
        }):  # fmt: skip
            reporter.write_line(line, **(_COLOURS[worst(found)] if found else {"bold": True}))
    counts = [f"{count} {outcome}" for outcome, count in recorder.totals.items() if count]
    found = [outcome for outcome, count in recorder.totals.items() if count]
    if found:
        reporter.write_line(f"contracts: {', '.join(counts)}", **_COLOURS[worst(found)])
    if recorder.path and not recorder.unwritten:
        reporter.write_line(f"report: {recorder.path}, {', '.join(PAGES)}")
    for problem in recorder.unwritten:
        reporter.write_line(f"ERROR: {problem}", red=True)
    if recorder.exit_status == EXIT_INCOMPLETE:
        why = "nothing failed, but what could not run is not proven"
        if recorder.unwritten:
            why = "nothing failed, but the report that was asked for is not there"
        reporter.write_line(f"exit status {EXIT_INCOMPLETE}: {why}", yellow=True)


def _version(settings: Settings) -> str:
    found = settings.installed
    text = f"{found.version} ({found.distribution})" if found else "not installed"
    if found and versions.resolve(found.version) is None:
        text += f", not among the tested ones: {', '.join(row.release for row in versions.TESTED)}"
    if settings.version.given:
        text += f", wanted {settings.version.value} from {settings.version.source}"
    return text


def _about(run: Run, settings: Settings) -> str:
    if not run.label:
        engine = f"; engine {settings.engine}" if settings.engine else ""
        return f"vllm {_version(settings)}; backend {settings.device.backend}{engine}"
    found = run.about["vllm"]
    text = f"{found['version']} ({found['distribution']})" if found else "not started"
    return f"vllm {text}; backend {run.about['backend']}; engine {run.about['engine']}"


def _write_result(reporter: pytest.TerminalReporter, result: ContractResult, run: Run, label: str) -> None:
    outcome = result.verdict.outcome
    contract = result.contract
    where = f" [{label}]" if label else ""
    reporter.write_line(
        f"{outcome.upper()} {contract.id}{where}: {contract.sentence} - {result.verdict.reason}", **_COLOURS[outcome]
    )
    if outcome in ("could not run", "failed"):
        _, *more = result.verdict.detail.splitlines() or [""]
        for line in more[:_MORE_LINES]:
            reporter.write_line(f"    {line}")
        if len(more) > _MORE_LINES:
            reporter.write_line(f"    ... ({len(more) - _MORE_LINES} more lines above)")
        settings = reporter.config.stash[SETTINGS]
        ranks = f"; rank {', '.join(map(str, result.verdict.ranks))}" if result.verdict.ranks else ""
        reporter.write_line(f"    on: {_about(run, settings)}{ranks}")
        reporter.write_line(f"    again: {rerun.command(reporter.config, contract.id, label)}")
