"""What the terminal shows: which engine is tested and why this one, and what became of the contracts."""

from __future__ import annotations

import shlex

import pytest

import pytest_roll_vllm
from pytest_roll_vllm.matrix import matrix
from pytest_roll_vllm.options import DISTRIBUTION, SETTINGS, Settings, runs_suite
from pytest_roll_vllm.outcomes import Outcome, worst
from pytest_roll_vllm.report import EXIT_INCOMPLETE, RECORDER, ContractResult, Run, torch_version
from roll_vllm import versions

_COLOURS: dict[Outcome, dict[str, bool]] = {
    "passed": {"green": True},
    "failed": {"red": True},
    "known gap": {"yellow": True},
    "not applicable": {},
    "could not run": {"yellow": True},
}

_SHOWN: tuple[Outcome, ...] = ("not applicable", "known gap", "could not run", "failed")


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
        f"vllm cache: {settings.cache_dir}",
    ]


def summarize(reporter: pytest.TerminalReporter) -> None:
    """Write the section on contracts, if there were any."""
    config = reporter.config
    recorder = config.stash[RECORDER]
    runs = [*recorder.runs.values()]
    if not any(run.results or run.problem for run in runs):
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
                    _write_result(reporter, result, run.label if several else "")
    if several:
        for line, found in matrix({
            run.label: {id: result.verdict.outcome for id, result in run.results.items()} for run in runs
        }):  # fmt: skip
            reporter.write_line(line, **(_COLOURS[worst(found)] if found else {"bold": True}))
    counts = [f"{count} {outcome}" for outcome, count in recorder.totals.items() if count]
    found = [outcome for outcome, count in recorder.totals.items() if count]
    if found:
        reporter.write_line(f"contracts: {', '.join(counts)}", **_COLOURS[worst(found)])
    if recorder.path:
        reporter.write_line(f"report: {recorder.path}")
    if recorder.exit_status == EXIT_INCOMPLETE:
        why = "nothing failed, but what could not run is not proven"
        reporter.write_line(f"exit status {EXIT_INCOMPLETE}: {why}", yellow=True)


def rerun_command(config: pytest.Config, id: str, label: str = "") -> str:
    """Return the command that runs the tests of one contract again, in the same way, on one run of several."""
    arguments = ["pytest"]
    if config.getoption("pyargs", False):
        arguments.append("--pyargs")
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        arguments += config.args
    settings = config.stash[SETTINGS]
    for name, setting in settings.all().items():
        if name == "version" and label:
            # A node of the user's has another label, and its version is for the user to choose.
            wanted = [one for one in settings.versions if label.startswith(f"{one}-")] or settings.versions
            arguments += [word for one in wanted for word in ("--vllm-version", one)]
        elif name == "provision" and setting.source.startswith("--"):
            arguments.append(setting.source)
        elif setting.source.startswith("--") and name != "report":
            values = settings.versions if name == "version" else [setting.value]
            arguments += [word for value in values for word in (setting.source, value)]
    return shlex.join([*arguments, "-m", f'vllm_contract(id="{id}")'])


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


def _write_result(reporter: pytest.TerminalReporter, result: ContractResult, label: str) -> None:
    outcome = result.verdict.outcome
    contract = result.contract
    where = f" [{label}]" if label else ""
    reporter.write_line(
        f"{outcome.upper()} {contract.id}{where}: {contract.sentence} - {result.verdict.reason}", **_COLOURS[outcome]
    )
    if outcome in ("could not run", "failed"):
        reporter.write_line(f"    again: {rerun_command(reporter.config, contract.id, label)}")
