"""A V0 engine leaves the device of the calling process as it found it.

The pool is vLLM's, of the release that is installed; only the device is made up.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from roll_vllm.errors import EngineDiedError
from roll_vllm.frontends import local_device
from roll_vllm.frontends.local_device import Gate

MIB = 2**20
TAGS = ["weights", "kv_cache"]


class Named(types.SimpleNamespace):
    """Takes weak references, which the class itself does not."""


class Handles:
    """Stands for a device, and for torch's pools on it."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module: Any = module
        self.mapped: set[int] = set()
        self.refuse: set[int] = set()
        self.ended: list[str] = []
        self.module.create_and_map = lambda handle: self.mapped.add(handle[2])
        self.module.unmap_and_release = self.unmap

    def unmap(self, handle: tuple[int, int, int, int]) -> None:
        if handle[2] in self.refuse:
            raise RuntimeError("CUDA Error: invalid argument")
        self.mapped.remove(handle[2])

    def allocate(self, tag: str, size: int) -> torch.Tensor:
        """A tensor in vLLM's pool; what vLLM does in its context ``use_memory_pool``."""
        pool = self.module.CuMemAllocator.get_instance()
        pool.current_tag = tag
        tensor = torch.zeros(size, dtype=torch.uint8)
        pool.python_malloc_callback((0, size, tensor.data_ptr(), 0))
        self.mapped.add(tensor.data_ptr())
        kept = Named()
        weakref.finalize(kept, self.ended.append, tag)
        pool.allocator_and_pools[tag] = (kept, None)
        return tensor


@pytest.fixture
def handles(pool: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Handles]:
    monkeypatch.setattr(pool, "cumem_available", True)
    yield Handles(pool)
    pool.CuMemAllocator.instance = None


class Worker:
    """What the parts of vLLM's worker are called."""

    def __init__(self, handles: Handles, asleep: list[str], pooled: bool = True) -> None:
        tensors = {tag: handles.allocate(tag, MIB) for tag in TAGS}
        self.device = torch.device("cuda")
        self.model_config = types.SimpleNamespace(enable_sleep_mode=pooled)
        self.model_runner = Named(model=tensors["weights"], execute_model=lambda: 1)
        self.gpu_cache = [tensors["kv_cache"]]
        self.roll_vllm_runtime = types.SimpleNamespace(state=lambda: {"sleeping": asleep}, worker=self)
        self.execute_model = self.run  # a cycle, as the runtime makes one

    def run(self) -> None:
        """Nothing."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that torch's module of the device gets."""
    calls: list[str] = []
    made = types.SimpleNamespace(
        synchronize=lambda device=None: calls.append("synchronize"), empty_cache=lambda: calls.append("empty_cache")
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: made)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    return calls


@pytest.mark.parametrize("asleep", [[], ["kv_cache"], TAGS])
def test_the_next_engine_finds_nothing(handles: Handles, device: list[str], asleep: list[str]) -> None:
    pool = handles.module.CuMemAllocator.get_instance()
    for _ in range(3):
        assert pool.get_current_usage() == 0, "vLLM's worker would refuse to load the model"
        worker = Worker(handles, asleep)
        runner = weakref.ref(worker.model_runner)
        for address, entry in pool.pointer_to_data.items():
            if entry.tag in asleep:
                handles.unmap((0, 0, address, 0))
        assert local_device.pool_bytes() == 2 * MIB
        local_device.end(worker)
        assert handles.mapped == set()
        assert runner() is None
        assert local_device.pool_bytes() == 0
        assert pool.allocator_and_pools == {}
    assert device == ["synchronize", "empty_cache"] * 3
    gc.collect()
    assert handles.ended == [], "torch would free addresses that vLLM knows no more"


def test_tensors_that_are_referred_to_become_empty(handles: Handles, device: list[str]) -> None:
    worker = Worker(handles, [])
    model, cache, other = worker.model_runner.model, worker.gpu_cache[0][5:], torch.ones(4)
    parameter = torch.nn.Parameter(model[10:], requires_grad=False)
    local_device.end(worker)
    assert [tensor.untyped_storage().nbytes() for tensor in (model, parameter, cache)] == [0, 0, 0]
    assert other.sum() == 4


def test_a_device_that_refuses(handles: Handles, device: list[str], caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(handles, [])
    handles.refuse = {worker.gpu_cache[0].data_ptr()}
    with caplog.at_level(logging.WARNING):
        local_device.end(worker)
    assert len(handles.mapped) == 1
    assert "1 of 2 pieces of the ended engine's device memory were not given back: CUDA Error: inv" in caplog.text
    assert local_device.pool_bytes() == 0


def test_a_start_that_failed(handles: Handles, device: list[str], caplog: pytest.LogCaptureFixture) -> None:
    kept = handles.allocate("weights", MIB)
    local_device.end_start()
    assert (local_device.pool_bytes(), handles.mapped, kept.untyped_storage().nbytes()) == (0, set(), 0)
    assert device == ["synchronize"]


def test_a_device_that_is_lost(
    handles: Handles, device: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    local_device.end_start()
    assert "stays taken: an illegal memory access" in caplog.text


def test_a_worker_without_a_pool(handles: Handles, device: list[str]) -> None:
    worker = Worker(handles, [], pooled=False)
    local_device.end(worker)
    assert local_device.pool_bytes() == 2 * MIB, "it is of something else"
    assert device == ["synchronize", "empty_cache"]


def test_a_process_without_vllms_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.device_allocator.cumem", raising=False)
    assert local_device.pool_bytes() == 0
    local_device.release_pool(())


def test_only_a_worker_in_this_process_with_a_device_is_ended() -> None:
    def executor(**worker: Any) -> Any:
        return types.SimpleNamespace(driver_worker=types.SimpleNamespace(worker=types.SimpleNamespace(**worker)))

    assert local_device.local_worker(executor(device=torch.device("cuda:0"))) is not None
    for other in (executor(device=torch.device("cpu")), executor(), types.SimpleNamespace(), None):
        assert local_device.local_worker(other) is None


def test_the_gate_waits_for_who_is_inside_and_lets_nobody_in_any_more() -> None:
    gate, entered, leave = Gate(), threading.Event(), threading.Event()

    def work() -> str:
        entered.set()
        leave.wait(30)
        return "done"

    assert gate.behind(gate.behind(lambda: "twice"))() == "twice"
    thread = threading.Thread(target=gate.behind(work))
    thread.start()
    assert entered.wait(30)
    assert not gate.shut(0.01)
    with pytest.raises(EngineDiedError, match="was shut down"):
        gate.behind(work)()
    threading.Timer(0.05, leave.set).start()
    assert gate.shut(30)
    thread.join()
