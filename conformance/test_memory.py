"""What an engine holds does not grow with what it has done."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from conformance.oracles import assert_counts, memory_held, pids, poison, processes_of, resident_bytes
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import WeightUpdateError
from roll_vllm.devices import Device
from roll_vllm.transfer import shared_memory

KiB, MiB = 2**10, 2**20


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    return vllm_model_factory("counting")


@dataclass(frozen=True)
class Holdings:
    """What the processes of an engine hold, as the system tells it: bytes, and numbers of things."""

    host: int
    device: int
    descriptors: int
    threads: int
    segments: int
    mappings: int

    @classmethod
    def of(cls, processes: Iterable[psutil.Process], workers: list[int], device_kind: str) -> Holdings:
        processes = list(processes)
        maps = [line for process in processes for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
        folder = str(shared_memory.directory())
        return cls(
            host=resident_bytes(process.pid for process in processes),
            device=0 if device_kind == "cpu" else memory_held(workers, device_kind),
            descriptors=sum(process.num_fds() for process in processes),
            threads=sum(process.num_threads() for process in processes),
            segments=len([name for name in os.listdir(folder) if name.startswith("roll_vllm-")]),
            mappings=len([line for line in maps if f" {folder}/" in line or " /dev/shm/" in line]),
        )


flat = contract(
    "mem-cycles-flat",
    "However often an engine sleeps, wakes, is updated and generates, its processes hold no more memory, descriptors, "
    "threads and pieces of shared memory than after the first cycles.",
    references=("NVIDIA-NeMo/RL#2619", "vllm-project/vllm#16663", "vllm-project/vllm#41602"),
    backends=("cpu", "cuda"),
    needs=("runtime",),
)


@flat
@pytest.mark.parametrize("cycles", [10, pytest.param(200, marks=pytest.mark.vllm_on_request("executors"))])
async def test_cycles_leave_nothing(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device, cycles: int
) -> None:
    workers = await pids(vllm_engine)
    processes = {process.pid: process for process in processes_of(vllm_engine)}
    processes |= {pid: psutil.Process(pid) for pid in workers}  # with V0 this process is one

    async def cycle(number: int) -> None:
        version = vllm_trainer.reference_version + number % 3
        await vllm_engine.offload_states(1 + number % 2)
        poison(vllm_device.kind)
        await vllm_engine.load_states()
        await vllm_trainer.push(vllm_engine, version)
        (tokens,) = await vllm_engine.greedy([[number]], 4)
        assert_counts([number], tokens, version)

    held = []
    for number in range(cycles + 3):
        await cycle(number)
        held.append(Holdings.of(processes.values(), workers, vllm_device.kind))
    first, last = held[2], held[-1]  # after two to warm up
    # An allocator may give back at any time what others have left in it: of each half, the least counts.
    half = len(held[2:]) // 2
    more = min(each.host for each in held[-half:]) - min(each.host for each in held[2 : 2 + half])
    assert more < min(50, cycles) * MiB, (
        f"{more / MiB:.0f} MiB of host memory more in the second half of {cycles} cycles: "
        f"{[each.host // MiB for each in held]}"
    )
    if cycles >= 100:
        # Slopes need that many. An allocator's steps, which are few, do not count; what comes each time does. With V0,
        # half of the limit is the log that pytest keeps of this process.
        settled, lag = [each.host for each in held[-half:]], 20
        slope = statistics.median(later - earlier for earlier, later in zip(settled, settled[lag:], strict=False)) / lag
        assert slope < 32 * KiB, f"{slope / KiB:.1f} KiB of host memory more with every cycle: {settled}"
    assert last.device - first.device < 50 * MiB, f"device memory: {[each.device // MiB for each in held]} MiB"
    for what in ("descriptors", "threads", "segments", "mappings"):
        more = getattr(last, what) - getattr(first, what)
        assert more < cycles / 2, f"{more} {what} more after {cycles} cycles: {[getattr(e, what) for e in held]}"


@flat
@pytest.mark.vllm_needs("update.collective")
async def test_failed_updates_leave_nothing(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device
) -> None:
    """Each of them sets up a group of its own, in the place of one whose ranks may be out of step."""
    workers = await pids(vllm_engine)
    processes = [psutil.Process(pid) for pid in workers]
    weights = vllm_trainer.weights(vllm_trainer.reference_version + 1)
    held = []
    for _ in range(8):
        with pytest.raises(WeightUpdateError):
            async with vllm_engine.weight_update("collective") as update:
                await update.send(dict(list(weights.items())[:2]))
        held.append(Holdings.of(processes, workers, vllm_device.kind))
    for what in ("descriptors", "threads"):
        counts = [getattr(each, what) for each in held]
        assert counts[-1] - counts[1] < 4, f"{what} after failed updates: {counts}"
