"""The host's copy of the weights: exact, kept, given back, and vLLM's own where it cannot be had.

The pool is vLLM's, of the release that is installed; only the device is made up.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from roll_vllm.errors import ConfigurationError
from roll_vllm.state import TAGS
from roll_vllm.worker import host_copies, memory
from roll_vllm.worker.host_copies import HostCopies
from roll_vllm.worker.memory import PoolMemory

MIB = 2**20
SIZES = [2 * MIB, 6 * MIB, 2 * MIB, 130 * MIB]


class Locks:
    """Stands for CUDA: what is locked, and by how many threads."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.calls: list[int] = []
        self.threads = 0
        self.hook: Callable[[int], None] = lambda size: None

    def attach(self) -> None:
        self.threads += 1

    def register(self, address: int, size: int) -> None:
        self.hook(size)
        self.calls.append(size)
        assert address not in self.held
        self.held[address] = size

    def unregister(self, address: int) -> None:
        del self.held[address]


@pytest.fixture
def locks() -> Locks:
    return Locks()


def refuse(size: int) -> None:
    raise OSError("refused")


def take(copies: HostCopies, sizes: list[int]) -> list[torch.Tensor]:
    tensors = dict(copies.blocks(sizes))
    return [tensors[index] for index in range(len(sizes))]


def idle() -> bool:
    return not any(thread.name == "roll-vllm-host-copies" for thread in threading.enumerate())


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- the blocks -----------------------------------------------------------------------------------------------


def test_blocks_are_exact_locked_and_apart(locks: Locks) -> None:
    copies = HostCopies(locks, threads=3)
    assert copies.nbytes == 0
    tensors = take(copies, SIZES)
    assert [tensor.nbytes for tensor in tensors] == SIZES
    assert locks.held == {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    assert not any(tensor.data_ptr() % (2 * MIB) for tensor in tensors)
    assert copies.nbytes == sum(SIZES)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [(int(tensor.min()), int(tensor.max())) for tensor in tensors] == [(n, n) for n in range(len(SIZES))]
    copies.close()
    assert locks.held == {}


def test_blocks_are_kept(locks: Locks) -> None:
    copies = HostCopies(locks, threads=2)
    first = {tensor.data_ptr() for tensor in take(copies, SIZES)}
    assert {tensor.data_ptr() for tensor in take(copies, SIZES[::-1])} == first
    assert sorted(locks.calls) == sorted(SIZES)


def test_what_is_no_longer_asked_for_goes_first(locks: Locks) -> None:
    copies = HostCopies(locks, threads=2)
    kept = {tensor.data_ptr() for tensor in take(copies, [4 * MIB, 4 * MIB, 8 * MIB])}
    locks.hook = lambda size: refuse(size) if 8 * MIB in locks.held.values() else None
    other = take(copies, [4 * MIB, 12 * MIB])
    assert other[0].data_ptr() in kept
    assert copies.nbytes == 16 * MIB
    assert sorted(locks.held.values()) == [4 * MIB, 12 * MIB]
    assert take(copies, []) == []
    assert (copies.nbytes, locks.held) == (0, {})


def test_one_thread_ahead_and_all_while_somebody_waits(locks: Locks) -> None:
    go, together = threading.Event(), threading.Barrier(3)

    def meet(size: int) -> None:
        go.wait(30)
        together.wait(30)

    locks.hook = meet
    copies = HostCopies(locks, threads=3)
    copies.prepare([MIB] * 6)
    until(lambda: locks.threads == 1)
    copies.prepare([MIB] * 6)
    go.set()
    assert len(take(copies, [MIB] * 6)) == 6
    assert locks.threads == 3
    until(idle)
    copies.prepare([MIB] * 6)
    assert idle(), "there was nothing left to do"


def test_blocks_come_as_they_are_ready(locks: Locks) -> None:
    seen = threading.Event()
    locks.hook = lambda size: None if size == MIB else (seen.wait(30), None)[1]
    copies = HostCopies(locks, threads=2)
    blocks = copies.blocks([2 * MIB, MIB])
    assert next(blocks)[0] == 1
    seen.set()
    assert next(blocks)[0] == 0


def test_refusal_reaches_who_waits(locks: Locks) -> None:
    locks.hook = lambda size: refuse(size) if size == 6 * MIB else None
    copies = HostCopies(locks, threads=2)
    with pytest.raises(OSError, match="refused"):
        take(copies, SIZES)
    with pytest.raises(OSError, match="refused"):
        take(copies, SIZES)
    copies.close()
    assert locks.held == {}
    with pytest.raises(OSError, match="closed"):
        take(copies, SIZES)
    copies.close()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOMEM])
def test_kernels_that_do_not_fault_in(locks: Locks, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def madvise(address: int, size: int, advice: int) -> int:
        ctypes.set_errno(code)
        return -1

    libc = types.SimpleNamespace(madvise=madvise, memset=host_copies._LIBC.memset)
    monkeypatch.setattr(host_copies, "_LIBC", libc)
    copies = HostCopies(locks, threads=1)
    if code == errno.EINVAL:
        assert len(take(copies, SIZES)) == len(SIZES)
    else:
        with pytest.raises(OSError, match=r"the host did not give \d+ bytes"):
            take(copies, SIZES)


@pytest.mark.parametrize("how", ["close", "collect"])
def test_nothing_outlives_its_owner(locks: Locks, how: str) -> None:
    started, go = threading.Event(), threading.Event()

    def slow(size: int) -> None:
        started.set()
        go.wait(30)

    locks.hook = slow
    copies = HostCopies(locks, threads=2)
    copies.prepare(SIZES)
    assert started.wait(30)
    threading.Timer(0.1, go.set).start()
    if how == "close":
        copies.close()
    del copies
    gc.collect()
    assert idle()
    assert locks.held == {}
    assert len(locks.calls) == 1, "it should have stopped after the block that it was at"


def test_a_thread_may_collect_the_owner(locks: Locks) -> None:
    """Where the owner is part of a cycle, any thread may come across it."""
    copies = HostCopies(locks, threads=1)
    close = copies._workshop.close
    locks.hook = lambda size: close()
    copies.prepare(SIZES)
    until(idle)
    assert copies._workshop.failure is None
    assert locks.held == {}
    assert len(locks.calls) == 1


@pytest.mark.parametrize("started", [0, 1])
def test_a_process_without_threads(locks: Locks, monkeypatch: pytest.MonkeyPatch, started: int) -> None:
    start, left = threading.Thread.start, [started]

    def limited(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    copies = HostCopies(locks, threads=4)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        if started:
            assert len(take(copies, SIZES)) == len(SIZES)
        else:
            with pytest.raises(OSError, match="can't start new thread"):
                take(copies, SIZES)


def test_a_process_ends_in_the_middle_of_it() -> None:
    code = """
import time
from roll_vllm.worker.host_copies import HostCopies
class Slow:
    def attach(self): pass
    def register(self, address, size): time.sleep(0.2)
    def unregister(self, address): print("back")
copies = HostCopies(Slow(), 2)
copies.prepare([4096] * 1000)
time.sleep(0.1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "back\n", "")


def test_the_host_gets_its_memory_back(locks: Locks) -> None:
    def resident() -> int:
        return int(psutil.Process(os.getpid()).memory_info().rss)

    gc.collect()
    before = resident()
    copies = HostCopies(locks, threads=2)
    for _ in range(3):
        take(copies, SIZES)
        assert abs(resident() - before - sum(SIZES)) < 8 * MIB
    copies.close()
    del copies
    assert resident() - before < 8 * MIB


# -- vLLM's pool ----------------------------------------------------------------------------------------------


class Device:
    """Stands for a device: memory that is lost where vLLM's pool unmaps it."""

    def __init__(self, pool: Any, sizes: dict[str, list[int]]) -> None:
        self.pool = pool.CuMemAllocator()
        pool.CuMemAllocator.instance = self.pool
        pool.create_and_map = self.map
        pool.unmap_and_release = self.unmap
        self.memory: dict[int, torch.Tensor] = {}
        self.mapped: set[int] = set()
        for tag, blocks in sizes.items():
            self.pool.current_tag = tag
            for size in blocks:
                tensor = torch.randint(0, 255, (size,), dtype=torch.uint8)
                address = tensor.data_ptr()
                self.memory[address] = tensor
                self.mapped.add(address)
                malloc = getattr(self.pool, "python_malloc_callback")  # noqa: B009 - vLLM is not typed
                malloc((0, size, address, 0))

    def map(self, handle: tuple[int, int, int, int]) -> None:
        self.mapped.add(handle[2])

    def unmap(self, handle: tuple[int, int, int, int]) -> None:
        self.mapped.remove(handle[2])
        self.memory[handle[2]].fill_(255)

    def weights(self) -> list[torch.Tensor]:
        entries = self.pool.pointer_to_data.items()
        return [self.memory[address].clone() for address, entry in entries if entry.tag == "weights"]


class Worker:
    """Does with vLLM's pool what vLLM's worker does."""

    def __init__(self, device: Device) -> None:
        self.pool = device.pool
        self.device = torch.device("cpu")
        self.parallel_config = types.SimpleNamespace(world_size=2)
        model = torch.nn.Linear(1, 1)
        self.model_runner = types.SimpleNamespace(get_model=lambda: model, kv_caches=[])

    def sleep(self, level: int) -> None:
        self.pool.sleep(offload_tags=("weights",) if level == 1 else ())

    def wake_up(self, tags: list[str]) -> None:
        self.pool.wake_up(tags)


@pytest.fixture
def device(pool: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    return Device(pool, {"weights": [2 * MIB, 6 * MIB, 2 * MIB], "kv_cache": [10 * MIB]})


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_weights_wake_as_they_were_from_the_same_memory(
    device: Device, locks: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = PoolMemory(Worker(device), HostCopies(locks, threads=2))
    monkeypatch.setattr(torch, "empty", None)  # by which vLLM's pool gets memory of its own
    for _ in range(3):
        for tensor in device.memory.values():
            tensor.random_(0, 255)
        before = device.weights()
        sleeper.sleep(1)
        assert device.mapped == set()
        assert sleeper.resident_bytes() == {"kv_cache": 0, "weights": 0}
        assert {entry.tag for entry in device.pool.pointer_to_data.values()} == set(TAGS)
        sleeper.wake(["weights"])
        assert same(device.weights(), before)
        sleeper.wake(["kv_cache"])
        assert len(device.mapped) == 4
        assert all(entry.cpu_backup_tensor is None for entry in device.pool.pointer_to_data.values())
    assert sorted(locks.calls) == [2 * MIB, 2 * MIB, 6 * MIB]


def test_level_2_takes_nothing_of_the_host(device: Device, locks: Locks) -> None:
    copies = HostCopies(locks, threads=2)
    sleeper = PoolMemory(Worker(device), copies)
    sleeper.sleep(2)
    assert copies.nbytes == 0
    sleeper.wake(TAGS)
    sleeper.sleep(1)
    sleeper.sleep(2)
    sleeper.wake(TAGS)
    assert all((tensor == 255).all() for tensor in device.weights())


@pytest.mark.parametrize("locked", [0, 1, 2])
def test_vllm_does_it_where_the_host_refuses(
    device: Device, locks: Locks, caplog: pytest.LogCaptureFixture, locked: int
) -> None:
    locks.hook = lambda size: refuse(size) if len(locks.calls) == locked else None
    sleeper = PoolMemory(Worker(device), HostCopies(locks, threads=1))
    before = device.weights()
    for _ in range(2):
        sleeper.sleep(1)
        sleeper.wake(TAGS)
        assert same(device.weights(), before)
    assert [record.getMessage() for record in caplog.records if record.name == memory.__name__] == [
        "vLLM itself will copy the weights to the host at sleep level 1: refused"
    ]
    assert locks.held == {}


def test_a_copy_that_fails_leaves_nothing_behind(
    device: Device, locks: Locks, pool: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = pool.libcudart.cudaMemcpy
    sizes = iter([1, 1, 0])

    def failing(target: int, source: int, size: int) -> None:
        if not next(sizes):
            raise RuntimeError("CUDART error: unspecified launch failure")
        copy(target, source, size)

    sleeper = PoolMemory(Worker(device), HostCopies(locks, threads=2))
    with monkeypatch.context() as patch:
        patch.setattr(pool.libcudart, "cudaMemcpy", failing)
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            sleeper.sleep(1)
    assert sleeper.sleeping == frozenset()
    assert len(device.mapped) == 4
    assert all(entry.cpu_backup_tensor is None for entry in device.pool.pointer_to_data.values())
    before = device.weights()
    sleeper.sleep(1)
    sleeper.wake(TAGS)
    assert same(device.weights(), before)


def test_tags_come_back_whatever_vllm_says(device: Device, locks: Locks) -> None:
    worker = Worker(device)
    sleep = worker.sleep

    def complaining(level: int) -> None:
        sleep(level)
        raise AssertionError("Memory usage increased after sleeping.")

    worker.sleep = complaining  # type: ignore[method-assign]
    sleeper = PoolMemory(worker, HostCopies(locks, threads=2))
    before = device.weights()
    sleeper.sleep(1)
    sleeper.wake(TAGS)
    assert same(device.weights(), before)


# -- the choice -----------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(pool: types.ModuleType, device: Device, locks: Locks, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A process that looks like one with CUDA."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(pool, "is_pin_memory_available", lambda: True)
    monkeypatch.setattr(memory, "CudaPinning", lambda index: locks)
    return pool


def test_prepared_ahead(cuda: types.ModuleType, device: Device, locks: Locks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.SLEEP_COPY, "prepared")
    sleeper = PoolMemory(Worker(device))
    until(lambda: sorted(locks.held.values()) == [2 * MIB, 2 * MIB, 6 * MIB])
    before = device.weights()
    sleeper.sleep(1)
    sleeper.wake(TAGS)
    assert same(device.weights(), before)
    assert len(locks.calls) == 3


def test_a_host_that_refuses_ahead(
    cuda: types.ModuleType, device: Device, locks: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(memory.SLEEP_COPY, "prepared")
    monkeypatch.setattr(memory.HostCopies, "prepare", lambda self, sizes: refuse(0))
    assert PoolMemory(Worker(device))._copies is None


@pytest.mark.parametrize("choice", [None, "", "on-demand"])
def test_on_demand_is_the_default(
    cuda: types.ModuleType, device: Device, locks: Locks, monkeypatch: pytest.MonkeyPatch, choice: str | None
) -> None:
    monkeypatch.delenv(memory.SLEEP_COPY, raising=False)
    if choice is not None:
        monkeypatch.setenv(memory.SLEEP_COPY, choice)
    sleeper = PoolMemory(Worker(device))
    assert idle()
    assert locks.held == {}
    sleeper.sleep(1)
    assert len(locks.held) == 3


@pytest.mark.parametrize("reason", ["asked for", "ROCm", "no page-locked memory", "no pool"])
def test_vllms_own(
    cuda: types.ModuleType, device: Device, locks: Locks, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "asked for":
        monkeypatch.setenv(memory.SLEEP_COPY, "vllm")
    elif reason == "ROCm":
        monkeypatch.setattr(torch.version, "cuda", None)
    elif reason == "no page-locked memory":
        monkeypatch.setattr(cuda, "is_pin_memory_available", lambda: False)
    else:
        monkeypatch.setattr(cuda.CuMemAllocator, "instance", None)
    assert PoolMemory(Worker(device))._copies is None


def test_a_choice_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.SLEEP_COPY, "always")
    with pytest.raises(ConfigurationError, match="set it to one of on-demand, prepared, vllm"):
        PoolMemory(object())
