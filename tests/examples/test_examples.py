"""The examples that are programs run to their end, and leave no process behind. They need a real vLLM."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
MARK = "ROLL_VLLM_TEST_EXAMPLE"  # a variable that all processes of an example inherit
TIMEOUT_S = 900

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the Ray executor is optional")


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, since the paths of Ray's sockets begin with it
    yield {
        **os.environ,
        MARK: uuid.uuid4().hex,
        "RAY_TMPDIR": directory,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",  # on a busy machine Ray's own 60 s are not enough
    }
    shutil.rmtree(directory, ignore_errors=True)


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("rollout_and_update.py", "weight version 2"),
        pytest.param("ray_rollout_and_train.py", "weight version 4: mean reward", marks=needs_ray),
    ],
)
def test_it_runs_and_ends(program: str, says: str, environment: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    try:
        # Not a pipe, which a process that is left behind would hold open.
        with output.open("w") as stream:
            command = [sys.executable, str(EXAMPLES / program)]
            done = subprocess.run(
                command, env=environment, cwd=tmp_path, stdout=stream, stderr=subprocess.STDOUT, timeout=TIMEOUT_S
            )
        assert done.returncode == 0, output.read_text()[-8000:]
        assert says in output.read_text()
        deadline = time.monotonic() + 10
        while (left := marked(environment[MARK])) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    finally:
        for process in marked(environment[MARK]):
            process.kill()
