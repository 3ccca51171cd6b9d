"""Runs that are interrupted, killed in part, or find no room for their report: what is known is not lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from plugin_harness import INTERRUPTIBLE, PLUGIN, Inner

SOURCE = """
import os, signal, time
from pathlib import Path
import pytest
from pytest_roll_vllm.contracts import contract

@pytest.fixture(scope="session", autouse=True)
def device():
    yield
    Path("released").touch()

@contract("a-pass", "It passes.")
def test_pass(): pass

@contract("b-fail", "It fails.")
def test_fail(): assert 1 == 2, "no"

@contract("c-wait", "It takes long.")
def test_wait():
    Path("waits").write_text(str(os.getpid()))
    if Path("again").exists():
        return
    {wait}

@contract("d-later", "It comes later.")
def test_later(): pass
"""
PASS = """
from pytest_roll_vllm.contracts import contract

@contract("a-pass", "It passes.")
def test_pass(): pass
"""


def outcomes() -> dict[str, str]:
    document: dict[str, Any] = json.loads(Path("out/report.json").read_text())
    assert all(Path("out", name).stat().st_size for name in ("report.html", "report.md"))
    assert not document["complete"]
    return {id: one["outcome"] for id, one in document["contracts"].items()}


def last_failed(installed: Inner) -> None:
    """What failed is run again by ``--lf``, and nothing that passed."""
    Path("again").touch()
    result = installed.pytester.runpytest_subprocess("-p", PLUGIN, "--lf", "-v")
    result.stdout.fnmatch_lines(["*::test_fail FAILED*"])
    result.stdout.no_fnmatch_line("*::test_pass*")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("workers", [[], ["-pxdist", "-n1"]], ids=["alone", "xdist"])
def test_interrupted(installed: Inner, workers: list[str], number: signal.Signals) -> None:
    installed.pytester.makepyfile(SOURCE.format(wait="time.sleep(120)"))
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "--vllm-report=out", *workers]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **INTERRUPTIBLE) as process:
        end = time.monotonic() + 60
        while not Path("waits").exists() and time.monotonic() < end:
            time.sleep(0.1)
        # Ctrl-C goes to all processes of a terminal, `kill` to one.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    assert "report: " in output
    assert "Traceback" not in output
    found = outcomes()
    assert (found["a-pass"], found["b-fail"]) == ("passed", "failed")
    assert (found["c-wait"], found["d-later"]) == ("could not run", "could not run")
    assert workers or Path("released").exists(), "a fixture was not torn down"
    last_failed(installed)


def test_a_worker_is_killed(installed: Inner) -> None:
    installed.pytester.makepyfile(SOURCE.format(wait="os.kill(os.getpid(), signal.SIGKILL)"))
    installed.run("-pxdist", "-n1", "--vllm-report=out")
    found = outcomes()
    assert found == {"a-pass": "passed", "b-fail": "failed", "c-wait": "could not run", "d-later": "passed"}
    last_failed(installed)


def test_a_forked_child_can_be_terminated(installed: Inner) -> None:
    source = """
import os, signal, time

def test_child():
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(1)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
"""
    installed.run("-pxdist", "-n0", source=source).assert_outcomes(passed=1)


def test_another_handler_stays(installed: Inner) -> None:
    source = """
import signal

def test_handler():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
"""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        installed.run(source=source).assert_outcomes(passed=1)
    finally:
        signal.signal(signal.SIGTERM, before)


UNFINISHED = {
    # Without a report of its setup, pytest cannot tear tmp_path down.
    "Ctrl-C in setup": ("tmp_path", "raise KeyboardInterrupt", "", "", "KeyError: <_pytest.stash.StashKey *"),
    "Ctrl-C twice": ("device", "raise KeyboardInterrupt", "raise KeyboardInterrupt", "", "KeyboardInterrupt"),
    "two errors": (
        "tmp_path", "raise KeyboardInterrupt", "raise OSError('stuck')", "", "ExceptionGroup: errors * (2 *"
    ),
    "no Ctrl-C": ("device", "", "", "def pytest_sessionfinish(): raise OSError('a\\nb')", "OSError: a"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNFINISHED)
def test_a_session_that_cannot_be_finished(installed: Inner, what: str) -> None:
    """There is a report although a teardown raises when the session ends, and what it raises is not hidden."""
    needs, setup, teardown, conftest, error = UNFINISHED[what]
    stuck = f"""
@pytest.fixture
def stuck({needs}):
    {setup or "pass"}
"""
    source = SOURCE.format(wait="pass").replace("def test_wait():", "def test_wait(stuck):") + stuck
    installed.pytester.makepyfile(source.replace(".touch()", f".touch(); {teardown}"))
    installed.pytester.makeconftest(conftest)
    result = installed.pytester.runpytest_subprocess("-p", PLUGIN, "--vllm-report=out")
    assert result.ret != pytest.ExitCode.OK
    result.stderr.fnmatch_lines(["*Traceback*", f"*{error}*"])
    interrupted = "was interrupted and " if setup else ""
    problem = f"the session {interrupted}could not be finished: {error}"
    result.stdout.fnmatch_lines([f"COULD NOT RUN: {problem}", "report: */out/report.json, report.md, report.html"])
    ended = "could not run" if setup else "passed"
    assert outcomes() == {"a-pass": "passed", "b-fail": "failed", "c-wait": ended, "d-later": ended}
    assert fnmatchcase(json.loads(Path("out/report.json").read_text())["problem"], problem)
    assert "could not be finished: " in Path("out/report.md").read_text()
    assert Path("released").exists()


UNWRITTEN = {
    "the disk is full": (
        'Path("out", f"report.json.{os.getpid()}.part").symlink_to("/dev/full")',
        "ERROR: report.json could not be written (No space left on device: make room in *out or make it writable*",
    ),
    "the directory is gone": (
        'Path("out").rmdir()',
        "ERROR: report.json could not be written (No such file or directory: *",
    ),
    "a file is in its place": (
        'Path("out").rmdir(); Path("out").touch()',
        "ERROR: report.json could not be written (Not a directory: *",
    ),
    "a page cannot be made": (
        'import pytest_roll_vllm.pages; monkeypatch.setattr("pytest_roll_vllm.pages.html", lambda found: 1 / 0)',
        "ERROR: report.md and report.html could not be made (ZeroDivisionError: division by zero): *python -m *",
    ),
}


@pytest.mark.parametrize("what", UNWRITTEN)
def test_no_report(installed: Inner, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    statement, line = UNWRITTEN[what]
    installed.pytester.makeconftest(
        f"""
import os
from pathlib import Path

def pytest_sessionfinish(session):
    from pytest import MonkeyPatch
    monkeypatch = MonkeyPatch()
    session.config.add_cleanup(monkeypatch.undo)
    {statement}
"""
    )
    result = installed.run("--vllm-report=out", source=PASS)
    result.stdout.fnmatch_lines([line, "exit status 8: nothing failed, but the report that was asked for is not there"])
    assert result.ret == 8
    result.assert_outcomes(passed=1)
    assert "Traceback" not in str(result.stdout) + str(result.stderr)
    assert "INTERNALERROR" not in str(result.stdout) + str(result.stderr)
    if what == "a page cannot be made":
        assert json.loads(Path("out/report.json").read_text())["totals"]["passed"] == 1
    if what == "the disk is full":
        assert {one.name for one in Path("out").iterdir()} == {"report.md", "report.html"}


def test_what_half_a_character_says(installed: Inner) -> None:
    source = PASS + '\n@contract("b-fail", "It fails.")\ndef test_fail(): assert False, "\\ud800"\n'
    document = installed.report(source=source)
    assert document["contracts"]["b-fail"]["outcome"] == "failed"
    for name in ("report.html", "report.md"):
        assert "It fails." in Path("out", name).read_text(encoding="utf-8")
