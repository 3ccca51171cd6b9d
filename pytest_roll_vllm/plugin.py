"""The hooks of the plugin; what they do is in the other modules. Imports neither torch nor vllm."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import pytest

from pytest_roll_vllm import catalogue, coroutines, gaps, interruption, markers, options, report, terminal, waiting
from pytest_roll_vllm.fixtures import *  # noqa: F403 - pytest finds fixtures in the plugin module

# The suite is a package of its own, whose assertions pytest would not explain otherwise.
pytest.register_assert_rewrite(options.SUITE)


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


def pytest_cmdline_main(config: pytest.Config) -> int | pytest.ExitCode | None:
    return catalogue.show(config) if config.getoption("vllm_contracts") else None


def pytest_configure(config: pytest.Config) -> None:
    markers.register(config)
    settings = config.stash[options.SETTINGS] = options.read(config)
    if config.getoption("help") or config.getoption("version"):
        return  # these must work whatever the settings are
    if config.getoption("vllm_contracts"):
        options.check_suite(config)
        return  # likewise
    settings.check()
    if settings.expectations.given:
        gaps.declared(config)  # raises if there is something wrong with them
    if not settings.provisions:
        options.apply(config, settings)
    if settings.proves:
        from pytest_roll_vllm.proof.table import Proof

        config.pluginmanager.register(Proof(config), "roll-vllm-proof")
    if not options.is_worker(config):
        options.check_suite(config)
        recorder = config.stash[report.RECORDER] = report.Recorder(config)
        config.pluginmanager.register(recorder, "roll-vllm-recorder")
        if settings.provisions and report.runs_tests(config):
            from pytest_roll_vllm.distribution import Distribution

            config.pluginmanager.register(Distribution(config), options.DISTRIBUTION)


@pytest.hookimpl(tryfirst=True)  # before anything is waited for
def pytest_sessionstart(session: pytest.Session) -> None:
    if not options.is_worker(session.config):
        interruption.handle_termination(session.config)
    waiting.start(session.config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return terminal.header(config) if terminal.wants_header(config) else []


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    if terminal.wants_header(config) or config.get_verbosity() < 0:
        return []
    # Without any setting, only the tests tell that the run is ours.
    return terminal.header(config) if any(map(markers.uses_plugin, items)) else []


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    try:
        markers.apply(items)
        markers.group_by_engine(items)
    except pytest.UsageError as error:
        if not options.is_worker(config):
            raise
        # xdist would break without a word; what it does show is a failed collection.
        items.clear()
        failure = pytest.CollectReport("roll-vllm", "failed", str(error), [])
        config.hook.pytest_collectreport(report=failure)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    gaps.note_deselected(items)


@pytest.hookimpl(tryfirst=True)  # before an xdist worker says that it has collected
def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.getoption("vllm_contracts"):
        report.select(session)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    markers.skip_unless_applicable(item, item.config.stash[options.SETTINGS])
    gaps.skip_if_expected(item)


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    return coroutines.run(pyfuncitem)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    result = yield
    gaps.judge(item, result)
    report.attach_notes(item.config, result)
    return result


@pytest.hookimpl(wrapper=True, trylast=True)  # after everything that can still note something, even if it raises
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    config = session.config
    reports = not options.is_worker(config) and report.runs_tests(config)
    try:
        result = yield
    except BaseException as error:
        # pytest's own teardown raises after Ctrl-C in the setup of a test with tmp_path, and anybody's can.
        if reports:
            config.stash[report.RECORDER].finish(session, error)
            reporter = config.pluginmanager.getplugin("terminalreporter")
            if reporter:  # which makes no summary now
                reporter.ensure_newline()
                terminal.summarize(reporter)
        raise
    if reports:
        config.stash[report.RECORDER].finish(session)
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if report.runs_tests(config):
        terminal.summarize(terminalreporter)
