"""Processes that end with the one that made their engine, in real families of processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

# A frontend, an engine core and a worker, as vLLM's multiprocessing executor has them. They print their process ids.
FAMILY = """
import multiprocessing, os, sys, time
from roll_vllm.worker.lifeline import watch_parent

SPAWN = multiprocessing.get_context("spawn")

def member(delay, below):
    print(os.getpid(), flush=True)
    if below:
        SPAWN.Process(target=member, args=(delay, below - 1)).start()
    time.sleep(delay)
    watch_parent()
    time.sleep(60)

if __name__ == "__main__":
    SPAWN.Process(target=member, args=(float(sys.argv[1]), int(sys.argv[2]))).start()
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[float, int], list[psutil.Process]]]:
    """Starts a family: the seconds until its members watch, and how many generations there are; the eldest first."""
    script = tmp_path / "family.py"
    script.write_text(FAMILY, encoding="utf-8")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    everybody: list[psutil.Process] = []

    def start(delay: float, generations: int) -> list[psutil.Process]:
        command = [sys.executable, str(script), str(delay), str(generations - 2)]
        eldest = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        assert eldest.stdout is not None
        pids = [eldest.pid, *(int(eldest.stdout.readline()) for _ in range(generations - 1))]
        everybody.extend(psutil.Process(pid) for pid in pids)
        return everybody

    yield start
    for process in everybody:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def alive(family: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("generations", [2, 3])
def test_all_end_with_the_first(start: Callable[[float, int], list[psutil.Process]], generations: int) -> None:
    family = start(0, generations)
    time.sleep(1.5)
    assert len(alive(family)) == generations, "nobody has ended, and so nobody should"
    family[0].kill()
    psutil.wait_procs(family, timeout=10)
    assert alive(family) == []


def test_a_parent_that_was_gone_before(start: Callable[[float, int], list[psutil.Process]]) -> None:
    family = start(2, 3)
    family[0].kill()
    psutil.wait_procs(family, timeout=10)
    assert alive(family) == []


def test_the_one_in_the_middle(start: Callable[[float, int], list[psutil.Process]]) -> None:
    family = start(0, 3)
    time.sleep(1)
    family[1].kill()
    psutil.wait_procs(family[1:], timeout=10)
    assert alive(family) == family[:1]
