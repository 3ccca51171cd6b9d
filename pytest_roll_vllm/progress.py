"""The progress of several versions: a line for each module and version, where xdist would print dots of them all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from pytest_roll_vllm.options import RUN

_PATIENCE = 10.0  # seconds after which a line is written although its module goes on


class Progress:
    """Writes the letters of pytest by version and module; a plugin of the controller.

    Args:
        reporter: pytest's terminal reporter.
    """

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter
        self._lines: dict[str, _Line] = {}
        self._live = False
        self._collected: dict[str, int] = {}
        self._done: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Any:
        """Notice that the reporter is about to print a letter; it asks for them at the end again."""
        self._live = True
        try:
            return (yield)
        finally:
            self._live = False
            if report.when == "teardown":
                self._done[_label(report.node)] += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> Any:
        """Take the letter that would be printed."""
        category, letter, word = yield
        if not self._live or not (letter or word):
            return category, letter, word
        letter = letter[0] if isinstance(letter, tuple) else letter
        self._add(_label(report.node), report.nodeid.partition("::")[0], letter)
        return category, "", ""

    def pytest_runtest_logstart(self) -> None:
        """Show what is done before tests that take long."""
        for label, line in list(self._lines.items()):
            if time.monotonic() - line.begun > _PATIENCE:
                self._write(label)

    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """Take the number of a version's tests."""
        self._collected[_label(node)] = len(ids)

    def pytest_testnodedown(self, node: Any) -> None:
        """Write what is left of a version that has ended."""
        self._write(_label(node))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write what is left."""
        for label in list(self._lines):
            self._write(label)

    def _add(self, label: str, module: str, letter: str) -> None:
        line = self._lines.get(label)
        if line and line.module != module:
            self._write(label)
            line = None
        if line is None:
            line = self._lines[label] = _Line(module)
        line.letters += letter

    def _write(self, label: str) -> None:
        line = self._lines.pop(label, None)
        if line:
            share = 100 * self._done[label] // self._collected[label]
            self._reporter.ensure_newline()
            self._reporter.write_line(f"{label} {line.module} {line.letters} [{share:3d}%]")


def _label(node: Any) -> str:
    label: str = node.workerinput[RUN]["label"]
    return label


class _Line:
    def __init__(self, module: str) -> None:
        self.module = module
        self.letters = ""
        self.begun = time.monotonic()
