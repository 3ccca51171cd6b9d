"""How the suite finds out what an engine really holds and really says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from roll_vllm.worker.checksums import checksum

if TYPE_CHECKING:
    from pytest_roll_vllm.engines import EngineHandle
    from pytest_roll_vllm.trainer import Trainer

#: The ways to send weights. Rank 0 of a V0 engine lives in this process, and cannot form a group with it.
TRANSPORTS = ("bucket", pytest.param("collective", marks=pytest.mark.vllm_generation("V1")))

#: Highest differences of log-probabilities to the reference in float32, on average and at most.
PARITY = (1e-4, 1e-3)

#: In a dtype that rounds, an engine may be so many times further from the exact answer than the reference's own
#: forward pass in that dtype, and never needs to be closer than the bounds beside it. Seen with SmolLM2-135M in
#: bfloat16 on a CPU: 4 to 5 times, since vLLM rounds in more places.
ROUNDING, ROUNDED_PARITY = 8.0, (0.01, 0.05)


async def assert_holds(engine: EngineHandle, trainer: Trainer, version: int) -> None:
    """The engine's parameters are the trainer's, byte for byte, and it says what that version must say."""
    expected = {name: checksum(tensor) for name, tensor in trainer.engine_tensors(version).items()}
    found = (await engine.checksums())[0]
    wrong = [name for name in expected if found.get(name) != expected[name]]
    assert not wrong, f"{len(wrong)} of {len(expected)} parameters are not those of version {version}: {wrong[:5]}"
    await assert_says(engine, trainer, version)


async def assert_says(engine: EngineHandle, trainer: Trainer, version: int) -> None:
    """The greedy continuations that are known for a version are what the engine generates."""
    probes = trainer.model.probes(version)
    longest = max((len(probe.expected_token_ids) for probe in probes), default=0)
    said = await engine.greedy([probe.prompt_token_ids for probe in probes], longest)
    for probe, tokens in zip(probes, said, strict=True):
        wanted = probe.expected_token_ids
        assert tokens[: len(wanted)] == wanted, (
            f"after {probe.prompt_token_ids[-5:]}, version {version} says {wanted}, the engine says {tokens}"
        )


async def assert_parity(
    engine: EngineHandle, trainer: Trainer, version: int, prompts: Iterable[Sequence[int]], max_tokens: int = 24
) -> None:
    """The engine's log-probabilities of its own greedy tokens are the reference forward pass's."""
    outputs = await asyncio.gather(
        *(engine.complete(list(p), temperature=0.0, max_tokens=max_tokens, logprobs=0) for p in prompts)
    )
    differences: list[float] = []
    rounding: list[float] = []
    exact = trainer.model.dtype == "float32"
    for output in outputs:
        prompt, tokens = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        rows = trainer.reference.logprobs([prompt + tokens], version)[0][len(prompt) - 1 :]
        for row, token, entry in zip(rows, tokens, output.outputs[0].logprobs, strict=True):
            differences.append(abs(float(row[token]) - entry[token].logprob))
        if not exact:
            rounded = trainer.rounded_reference.logprobs([prompt + tokens], version)[0][len(prompt) - 1 :]
            rounding.extend(abs(float(r[t]) - float(e[t])) for r, e, t in zip(rounded, rows, tokens, strict=True))
    mean, highest = sum(differences) / len(differences), max(differences)
    mean_bound, highest_bound = PARITY
    if not exact:
        mean_bound = max(ROUNDED_PARITY[0], ROUNDING * sum(rounding) / len(rounding))
        highest_bound = max(ROUNDED_PARITY[1], ROUNDING * max(rounding))
    assert mean <= mean_bound, (
        f"log-probabilities differ from the trainer's by {mean:.2g} on average, allowed is {mean_bound:.2g}"
    )
    assert highest <= highest_bound, (
        f"a log-probability differs from the trainer's by {highest:.2g}, allowed is {highest_bound:.2g}"
    )


async def completed(engine: EngineHandle, prompt: list[int], **sampling: Any) -> tuple[Any, int]:
    """The last output for a prompt, and how many of the prompt's tokens came from the prefix cache.

    Nothing else may run on the engine meanwhile.
    """
    before = _cached_blocks(engine)
    output = await engine.complete(prompt, **sampling)
    if output.num_cached_tokens is not None:
        return output, output.num_cached_tokens
    return output, (_cached_blocks(engine) - before) * engine.vllm_config.cache_config.block_size


def _cached_blocks(engine: EngineHandle) -> int:
    # The V1 engine of 0.8.4 tells its statistics only.
    loggers = [logger for replica in getattr(engine, "stat_loggers", None) or () for logger in replica]
    counters = [getattr(logger, "counter_gpu_prefix_cache_hits", None) for logger in loggers]
    return sum(int(counter._value.get()) for counter in counters if counter is not None)


def tags_after(sleeping: set[str], call: str, device_kind: str) -> set[str]:
    """Which tags sleep after a call, given those that slept before.

    On accelerators vLLM's memory pool moves the weights to the host at level 1, and the KV cache does not wake
    before the weights.

    Args:
        sleeping: the tags that sleep before the call.
        call: ``sleep 1``, ``sleep 2``, ``wake``, ``weights`` or ``kv_cache`` (a wake of that tag).
        device_kind: the kind of device.
    """
    both = {"weights", "kv_cache"}
    if call.startswith("sleep"):
        return sleeping | ({"kv_cache"} if call == "sleep 1" and device_kind == "cpu" else both)
    if call == "wake" or (call == "kv_cache" and device_kind != "cpu"):
        return set()
    return sleeping - {call}


async def pids(engine: EngineHandle) -> list[int]:
    """The worker processes, in rank order."""
    return [worker.pid for worker in (await engine.state()).workers]


def resident_bytes(pids: Iterable[int]) -> int:
    """What the operating system says that the processes hold in memory of their own, shared memory left out."""
    usage = [psutil.Process(pid).memory_info() for pid in pids]
    return sum(int(one.rss - getattr(one, "shared", 0)) for one in usage)


def processes_below(pid: int) -> list[psutil.Process]:
    """All descendants of a process, but for the resource trackers of multiprocessing, which belong to no engine."""
    return [p for p in psutil.Process(pid).children(recursive=True) if not _is_resource_tracker(p)]


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def still_running(processes: Iterable[psutil.Process]) -> list[str]:
    """Those that are alive; a zombie is not."""
    alive = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(f"{process.pid} {process.name()}")
        except psutil.NoSuchProcess:
            continue
    return alive


def wait_until(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
