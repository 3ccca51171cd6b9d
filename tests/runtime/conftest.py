"""What these tests share. They need torch and xxhash, and no engine."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import multiprocessing
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

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


def module(name: str, **names: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(names)
    return made


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """vLLM's module of the pool, without the rest of vLLM, whose import takes long and wants a device."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("needs vLLM's sources")

    def copy(target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)

    unpinned = {"is_pin_memory_available": lambda: False}
    runtime = types.SimpleNamespace(cudaMemcpy=copy)
    native = dict.fromkeys(("init_module", "python_create_and_map", "python_unmap_and_release"))
    for stub in (
        module("vllm"),
        module("vllm.logger", init_logger=logging.getLogger),
        module("vllm.utils", **unpinned),
        module("vllm.utils.platform_utils", **unpinned),
        module("vllm.cumem_allocator", **native),
        module("vllm.distributed"),
        module("vllm.distributed.device_communicators"),
        module("vllm.distributed.device_communicators.cuda_wrapper", CudaRTLibrary=lambda: runtime),
    ):
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    source = Path(spec.origin).parent / "device_allocator" / "cumem.py"
    loaded = importlib.util.spec_from_file_location("vllm.device_allocator.cumem", source)
    assert loaded is not None
    assert loaded.loader is not None
    made = importlib.util.module_from_spec(loaded)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    loaded.loader.exec_module(made)
    return made
