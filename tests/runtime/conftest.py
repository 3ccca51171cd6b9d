"""What these tests share. They need torch and xxhash, and no engine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that stands for /dev/shm, so that a test sees its own segments only."""
    directory = tmp_path / "segments"
    directory.mkdir()
    monkeypatch.setenv("ROLL_VLLM_SHM_DIR", str(directory))
    return directory


@pytest.fixture(scope="session")
def other_process() -> Iterator[ProcessPoolExecutor]:
    """A process that shares nothing with this one; functions of test modules run in it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
