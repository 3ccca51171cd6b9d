"""What the terminal shows: which engine is tested and why this one, and what became of the contracts."""

from __future__ import annotations

import shlex

import pytest

import pytest_roll_vllm
from pytest_roll_vllm.options import SETTINGS, Settings, runs_suite
from pytest_roll_vllm.outcomes import Outcome
from pytest_roll_vllm.report import EXIT_INCOMPLETE, RECORDER, ContractResult, Recorder, torch_version
from roll_vllm import versions

_COLOURS: dict[Outcome, dict[str, bool]] = {
    "passed": {"green": True},
    "failed": {"red": True},
    "not applicable": {},
    "could not run": {"yellow": True},
}


def wants_header(config: pytest.Config) -> bool:
    """Whether it is known, before anything was collected, that the run is ours."""
    return config.stash[SETTINGS].given or runs_suite(config)


def header(settings: Settings) -> list[str]:
    """Describe what is tested: each value with its source."""
    device = settings.device
    memory = [f"{size / 2**30:.1f} GiB" for size in device.memory_bytes if size]
    names = ", ".join(dict.fromkeys([*device.names, *memory]))
    return [
        f"roll-vllm: {pytest_roll_vllm.__version__}, torch {torch_version() or '(not installed)'}",
        f"vllm: {_version(settings)}",
        f"backend: {device.count} {device.kind} [{names}], {device.reason}; wanted: {settings.backend}",
        f"model: {settings.model}",
        f"vllm cache: {settings.cache_dir}",
    ]


def summarize(reporter: pytest.TerminalReporter) -> None:
    """Write the section on contracts, if there were any."""
    config = reporter.config
    recorder = config.stash[RECORDER]
    if not recorder.results:
        return
    reporter.write_sep("=", "vllm contracts")
    settings = config.stash[SETTINGS]
    # Again, because -q hides the header, and an outcome without its engine says nothing.
    reporter.write_line(f"vllm {_version(settings)}; backend {settings.device.kind}; model {settings.model.value}")
    outcomes: tuple[Outcome, ...] = ("not applicable", "could not run", "failed")
    for outcome in outcomes:
        for result in recorder.results.values():
            if result.verdict.outcome == outcome:
                _write_result(reporter, result)
    counts = [f"{count} {outcome}" for outcome, count in recorder.totals.items() if count]
    reporter.write_line(f"contracts: {', '.join(counts)}", **_COLOURS[_worst(recorder)])
    if recorder.path:
        reporter.write_line(f"report: {recorder.path}")
    if recorder.exit_status == EXIT_INCOMPLETE:
        why = "nothing failed, but what could not run is not proven"
        reporter.write_line(f"exit status {EXIT_INCOMPLETE}: {why}", yellow=True)


def rerun_command(config: pytest.Config, id: str) -> str:
    """Return the command that runs the tests of one contract again, in the same way."""
    arguments = ["pytest"]
    if config.getoption("pyargs", False):
        arguments.append("--pyargs")
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        arguments += config.args
    for name, setting in config.stash[SETTINGS].all().items():
        if setting.source.startswith("--") and name != "report":
            arguments += [setting.source, setting.value]
    return shlex.join([*arguments, "-m", f'vllm_contract(id="{id}")'])


def _version(settings: Settings) -> str:
    found = settings.installed
    text = f"{found.version} ({found.distribution})" if found else "not installed"
    if found and versions.resolve(found.version) is None:
        text += f", not among the tested ones: {', '.join(row.release for row in versions.TESTED)}"
    if settings.version.given:
        text += f", wanted {settings.version.value} from {settings.version.source}"
    return text


def _write_result(reporter: pytest.TerminalReporter, result: ContractResult) -> None:
    outcome = result.verdict.outcome
    contract = result.contract
    reporter.write_line(
        f"{outcome.upper()} {contract.id}: {contract.sentence} - {result.verdict.reason}", **_COLOURS[outcome]
    )
    if outcome != "not applicable":
        reporter.write_line(f"    again: {rerun_command(reporter.config, contract.id)}")


def _worst(recorder: Recorder) -> Outcome:
    order: tuple[Outcome, ...] = ("failed", "could not run", "passed")
    return next((outcome for outcome in order if recorder.totals[outcome]), "not applicable")
