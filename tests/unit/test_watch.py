"""The watch over an engine's processes, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from roll_vllm import failure
from roll_vllm.errors import ConfigurationError, EngineDiedError, PlacementTimeoutError, RollVllmError
from roll_vllm.watch import Watch


class Heard:
    """Keeps what a watch reports."""

    def __init__(self) -> None:
        self.errors: list[EngineDiedError] = []
        self._any = threading.Event()

    def __call__(self, error: EngineDiedError) -> None:
        self.errors.append(error)
        self._any.set()

    def wait(self) -> EngineDiedError:
        assert self._any.wait(10), "nothing was reported"
        return self.errors[0]


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_the_one_that_died_is_named(sleepers: list[subprocess.Popen[bytes]]) -> None:
    heard = Heard()
    watch = Watch({process.pid: f"rank {rank}" for rank, process in enumerate(sleepers)}, None, heard)
    try:
        time.sleep(0.3)
        assert not heard.errors
        begun = time.monotonic()
        sleepers[1].kill()
        error = heard.wait()
        assert time.monotonic() - begun < 5
        assert str(error).startswith(f"rank 1 (pid {sleepers[1].pid}) died")
        sleepers[0].kill()
        time.sleep(0.6)
        assert len(heard.errors) == 1, "what follows a death is not another one"
    finally:
        watch.close()


def test_one_that_was_dead_already(sleepers: list[subprocess.Popen[bytes]]) -> None:
    sleepers[0].kill()
    sleepers[0].wait()
    heard = Heard()
    watch = Watch({sleepers[0].pid: "rank 0"}, None, heard)
    assert "rank 0" in str(heard.wait())
    watch.close()


def test_nothing_after_the_end(sleepers: list[subprocess.Popen[bytes]]) -> None:
    heard = Heard()
    watch = Watch({sleepers[0].pid: "rank 0"}, None, heard)
    watch.close()
    watch.close()
    sleepers[0].kill()
    time.sleep(0.6)
    assert not heard.errors


def test_no_descriptor_is_left(sleepers: list[subprocess.Popen[bytes]]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Watch({process.pid: "x" for process in sleepers}, None, Heard()).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_an_executor_left_counts_more(sleepers: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    heard = Heard()
    watch = Watch({sleepers[0].pid: "the engine core"}, tmp_path, heard)
    failure.leave(tmp_path, EngineDiedError("rank 1 on node n died: of this"))
    sleepers[0].kill()
    assert str(heard.wait()) == "rank 1 on node n died: of this"
    watch.close()


def test_a_failure_keeps_its_type_and_the_first_one_wins(tmp_path: Path) -> None:
    assert failure.read(tmp_path) is None
    assert failure.read(None) is None
    failure.leave(tmp_path, PlacementTimeoutError("no room"))
    failure.leave(tmp_path, ConfigurationError("what came of it"))
    error = failure.read(tmp_path)
    assert (type(error), str(error)) == (PlacementTimeoutError, "no room")
    assert [path.name for path in tmp_path.iterdir()] == ["failure"]


def test_a_failure_of_an_unknown_type(tmp_path: Path) -> None:
    class Stranger(RollVllmError):
        pass

    failure.leave(tmp_path, Stranger("hm"))
    assert type(failure.read(tmp_path)) is RollVllmError
