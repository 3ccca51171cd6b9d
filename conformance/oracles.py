"""How the suite finds out what an engine really holds and really says."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from roll_vllm import BucketSender
from roll_vllm.errors import EngineDiedError, WeightUpdateError
from roll_vllm.worker.checksums import checksum

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from pytest_roll_vllm.engines import EngineHandle, EnginePool
    from pytest_roll_vllm.trainer import Trainer

MiB = 2**20

#: The ways to send weights.
TRANSPORTS = ("bucket", pytest.param("collective", marks=pytest.mark.vllm_needs("update.collective")))

#: For tests of an engine of two ranks: a CPU holds both, of accelerators each needs its own.
NEEDS_TWO_DEVICES = [
    pytest.mark.vllm_backend("cpu"),
    *(pytest.mark.vllm_backend(kind, count=2) for kind in ("cuda", "rocm", "npu")),
]
#: The same for those that take minutes; a target is one engine, of whose ranks only the runtime tells.
TWO_DEVICES = [pytest.mark.vllm_on_request("executors"), pytest.mark.vllm_needs("runtime"), *NEEDS_TWO_DEVICES]

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


@dataclass(frozen=True)
class Fresh:
    """What an engine holds and says that vLLM has started from files of a version's weights."""

    version: int
    checksums: dict[str, str]
    answers: list[list[int]]


def started_on(
    pool: EnginePool,
    creator: Callable[[dict[str, Any]], Callable[[], Any]],
    arguments: dict[str, Any],
    trainer: Trainer,
    prompts: Sequence[list[int]],
    directory: Path,
) -> Fresh:
    """Write weights other than the reference into a directory, start an engine on it, ask it and end it.

    Args:
        pool: the engines of the session. A V0 engine ends the shared ones, so this comes before them.
        creator: turns arguments into a start.
        arguments: of an engine of the same kind.
        trainer: of its weights.
        prompts: to be answered.
        directory: an empty one.
    """
    from safetensors.torch import save_file

    version = trainer.reference_version + 2
    for file in trainer.model.path.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    save_file(trainer.weights(version), directory / "model.safetensors")
    engine = pool.start(creator({**arguments, "model": str(directory), "load_format": "auto"}))
    try:
        (sums,) = engine.run(engine.checksums())
        return Fresh(version, sums, engine.run(answers(engine, trainer, prompts, 12)))
    finally:
        pool.end(engine)


async def assert_updated_is_as_fresh(
    engine: EngineHandle, trainer: Trainer, prompts: Sequence[list[int]], fresh: Fresh
) -> None:
    """After updates to another version and to this one, the engine has the tensors and answers of the fresh one."""
    for version in (fresh.version - 1, fresh.version):
        await trainer.push(engine, version)
    updated = (await engine.checksums())[0]
    assert updated.keys() == fresh.checksums.keys()
    stale = [name for name in updated if updated[name] != fresh.checksums[name]]
    assert not stale, f"these are not what a fresh engine has: {stale[:5]}"
    said = await answers(engine, trainer, prompts, 12)
    assert said == fresh.answers, "the tensors are the same, and the answers are not"


#: The dimension by which tensor-parallel ranks share a checkpoint tensor; all others they have whole.
_CUT = {
    0: ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"),
    1: ("o_proj", "down_proj"),
}
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def share_of_rank(
    trainer: Trainer, version: int, rank: int, tensor_ranks: int, stages: int = 1
) -> dict[str, torch.Tensor]:
    """The parameters that one rank of a Llama-like model must hold, by vLLM's names, cut from the trainer's weights.

    Args:
        trainer: the trainer of a model with an untied head, whose sizes the ranks divide.
        version: of its weights.
        rank: the rank in the engine; the tensor-parallel ranks of one pipeline stage follow each other.
        tensor_ranks: the ranks of a stage.
        stages: the pipeline stages, which have equally many layers.
    """
    import torch

    stage, place = divmod(rank, tensor_ranks)
    layers = 1 + max(int(name.split(".")[2]) for name in trainer.weights(version) if ".layers." in name)

    def is_here(name: str) -> bool:
        if ".layers." in name:
            return int(name.split(".")[2]) // (layers // stages) == stage
        return stage == (0 if "embed_tokens" in name else stages - 1)

    def share(name: str, tensor: torch.Tensor) -> torch.Tensor:
        for dimension, parts in _CUT.items():
            if any(f"{part}." in name for part in parts):
                return tensor.chunk(tensor_ranks, dimension)[place].contiguous()
        return tensor

    shares = {name: share(name, tensor) for name, tensor in trainer.weights(version).items() if is_here(name)}
    for fused, parts in _FUSED.items():
        for name in [name for name in shares if f".{parts[0]}." in name]:
            pieces = [shares.pop(name.replace(parts[0], part)) for part in parts]
            shares[name.replace(parts[0], fused)] = torch.cat(pieces)
    return shares


async def assert_ranks_hold(engine: EngineHandle, trainer: Trainer, version: int) -> None:
    """Every rank's parameters are its share of the trainer's, byte for byte, and it says what the version must say."""
    parallel = engine.vllm_config.parallel_config
    tensor_ranks, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    found = await engine.checksums()
    assert len(found) == tensor_ranks * stages
    for rank, sums in enumerate(found):
        shares = share_of_rank(trainer, version, rank, tensor_ranks, stages)
        wrong = [name for name, tensor in shares.items() if sums.get(name) != checksum(tensor)]
        assert not wrong, (
            f"rank {rank}: {len(wrong)} of {len(shares)} parameters are not version {version}: {wrong[:5]}"
        )
    await assert_says(engine, trainer, version)


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """A process that stands still every now and then, at moments that nobody can foresee."""
    process, done, draw = psutil.Process(pid), threading.Event(), random.Random(pid)

    def halt() -> None:
        while not done.wait(draw.uniform(0, 0.05)):
            process.suspend()
            try:
                done.wait(draw.uniform(0.02, 0.2))
            finally:
                process.resume()

    thread = threading.Thread(target=halt, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def refusal(engine: EngineHandle) -> type[Exception]:
    """What a refused update raises; another target's error has a type that nobody here knows."""
    return WeightUpdateError if "runtime" in engine.supported else Exception


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


def assert_counts(prompt: Sequence[int], tokens: Sequence[int], version: int) -> None:
    """The tokens are what the counting model says under one version of its weights, from the first to the last."""
    wanted = [(prompt[-1] + version * step) % 256 for step in range(1, len(tokens) + 1)]
    assert list(tokens) == wanted, f"after {prompt[-1]}, version {version} says {wanted[:12]}..., not {tokens[:12]}..."


async def ended(calls: Iterable[Awaitable[Any]], seconds: float, what: str) -> list[Any]:
    """What each call returned or raised; all of them must have ended in time."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    _, hanging = await asyncio.wait(tasks, timeout=seconds)
    for task in hanging:
        task.cancel()
    assert not hanging, f"{len(hanging)} of {len(tasks)} {what} have not ended after {seconds:g} s"
    return [task.exception() or task.result() for task in tasks]


@asynccontextmanager
async def traffic(
    engine: EngineHandle, prompts: Sequence[list[int]], **sampling: Any
) -> AsyncIterator[list[tuple[list[int], Any]]]:
    """One caller for each prompt, who asks it greedily again and again; leaving waits until all have ended.

    Yields:
        Every output so far, with its prompt, in order of arrival. An error of a caller is raised on leaving.
    """
    outputs: list[tuple[list[int], Any]] = []
    enough = asyncio.Event()

    async def ask(prompt: list[int]) -> None:
        while not enough.is_set():
            async for output in engine.stream(prompt, temperature=0.0, **sampling):
                outputs.append((prompt, output))

    callers = [asyncio.ensure_future(ask(prompt)) for prompt in prompts]
    try:
        yield outputs
    except BaseException:  # the callers may never be answered now
        for caller in callers:
            caller.cancel()
        raise
    enough.set()
    results = await ended(callers, 60, "callers")
    for error in results:
        assert error is None, f"a caller got {error!r}"


async def forward_passes(engine: EngineHandle) -> tuple[int, int]:
    """How many forward passes the workers have run, and how many they refused for want of memory."""
    workers = (await engine.state()).workers
    return sum(worker.passes for worker in workers), sum(worker.refused_passes for worker in workers)


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
    # Of a few tokens whose log-probability hangs on the last bits, rounding moves some by any amount.
    largest = max if exact else _ninth_decile
    mean, highest = sum(differences) / len(differences), largest(differences)
    mean_bound, highest_bound = parity_bounds(rounding, largest)
    assert mean <= mean_bound, (
        f"log-probabilities differ from the trainer's by {mean:.2g} on average, allowed is {mean_bound:.2g}"
    )
    assert highest <= highest_bound, (
        f"a log-probability differs from the trainer's by {highest:.2g}, allowed is {highest_bound:.2g}"
    )


def _ninth_decile(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=10)[-1]


def parity_bounds(rounding: Sequence[float], largest: Callable[[Sequence[float]], float] = max) -> tuple[float, float]:
    """Highest differences of log-probabilities to allow, on average and at most.

    Args:
        rounding: what rounding to the model's dtype does to the reference's own, token by token; empty if it does not.
        largest: what is meant by "at most": the largest difference, or nearly.
    """
    if not rounding:
        return PARITY
    mean, highest = sum(rounding) / len(rounding), largest(rounding)
    return max(ROUNDED_PARITY[0], ROUNDING * mean), max(ROUNDED_PARITY[1], ROUNDING * highest)


async def answers(
    engine: EngineHandle, trainer: Trainer, prompts: Sequence[list[int]], max_tokens: int
) -> list[list[int]]:
    """Greedy continuations that may be compared for equality.

    In a dtype that rounds, what else is in a batch or a cache moves the last bits of an accelerator's results, and
    with them the choice between tokens that are nearly equal: there each prompt is alone.
    """
    if trainer.model.dtype == "float32":
        return await engine.greedy(prompts, max_tokens)
    said = []
    for prompt in prompts:
        await engine.reset_prefix_cache()
        said += await engine.greedy([prompt], max_tokens)
    return said


async def completed(engine: EngineHandle, prompt: list[int], **sampling: Any) -> tuple[Any, int]:
    """The last output for a prompt, and how many of the prompt's tokens came from the prefix cache.

    Nothing else may run on the engine meanwhile.
    """
    before = _cached_blocks(engine) if "runtime" in engine.supported else 0
    output = await engine.complete(prompt, **sampling)
    if output.num_cached_tokens is not None:
        return output, output.num_cached_tokens
    if "runtime" not in engine.supported:
        pytest.skip("the engine does not say how much of a prompt came from its cache")
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


async def assert_dead(engine: EngineHandle, rank: int, pid: int, pending: Iterable[asyncio.Future[Any]] = ()) -> None:
    """What waits for the engine, and whatever is asked of it, fails in time with one error that names the dead rank."""
    end = time.monotonic() + 30

    async def fails(call: Awaitable[Any], seconds: float) -> None:
        with pytest.raises(EngineDiedError, match=rf"rank {rank}\b") as caught:
            await asyncio.wait_for(call, max(seconds, 1))
        assert str(pid) in str(caught.value), f"the process {pid} is not named: {caught.value}"

    for call in pending:
        await fails(call, end - time.monotonic())
    while not engine.errored and time.monotonic() < end:
        await asyncio.sleep(0.1)
    assert engine.errored, "the engine does not know that it is dead"
    later: list[Callable[[], Awaitable[Any]]] = [
        lambda: engine.complete([1, 2, 3], max_tokens=2),
        engine.state,
        engine.ping,
        engine.checksums,
        engine.offload_states,
        engine.load_states,
    ]
    for ask in later:
        await fails(ask(), 5)


async def assert_rank_order(engine: EngineHandle) -> None:
    """A call to both workers returns their results in rank order."""
    # Rank 0 answers last, so that order of arrival and order of rank differ.
    assert await engine.ping([0.5, 0.0]) == [0, 1]
    state = await engine.state()
    assert [worker.rank for worker in state.workers] == [0, 1]
    assert len({worker.pid for worker in state.workers}) == 2


async def assert_error_of_one_rank(engine: EngineHandle, trainer: Trainer) -> None:
    """An error of the last of two ranks is raised."""
    with BucketSender() as sender:
        good = next(sender.payloads(trainer.weights(1)))
        with pytest.raises(WeightUpdateError, match=r"rank 1"):
            await engine.update_parameter_in_bucket([good, b"nonsense"])


async def assert_timeout_kept(engine: EngineHandle) -> None:
    """A call with a timeout ends in time, and disturbs none that follow."""
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="within 1 s"):
        await engine.ping([0.0, 2.5], timeout=1)
    assert time.monotonic() - begun < 2
    # An answer that comes too late must not be taken for the answer to the next call.
    workers = (await asyncio.wait_for(engine.state(), 10)).workers
    assert [worker.rank for worker in workers] == [0, 1]


async def pids(engine: EngineHandle) -> list[int]:
    """The worker processes, in rank order."""
    return [worker.pid for worker in (await engine.state()).workers]


def resident_bytes(pids: Iterable[int]) -> int:
    """What the operating system says that the processes hold in memory of their own, shared memory left out."""
    usage = [psutil.Process(pid).memory_info() for pid in pids]
    return sum(int(one.rss - getattr(one, "shared", 0)) for one in usage)


def memory_held(pids: Iterable[int], device_kind: str) -> int:
    """What the system says that the processes hold of the memory that an engine sleeps with.

    On CUDA this is the driver's figure; in a container, where the driver does not know the processes by these ids,
    it is that of all processes.
    """
    if device_kind == "cpu":
        return resident_bytes(pids)
    rows = _nvidia_smi("--query-compute-apps=pid,used_memory")
    known = {int(pid): int(size) for pid, size in rows if size.isdecimal()}
    if known.keys() >= set(pids):
        return sum(known[pid] for pid in pids) * MiB
    return sum(int(size) for (size,) in _nvidia_smi("--query-gpu=memory.used")) * MiB


def _nvidia_smi(query: str) -> list[list[str]]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, check=True, text=True, timeout=30).stdout.splitlines()
    return [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]


@asynccontextmanager
async def memory_withheld(engine: EngineHandle, device_kind: str) -> AsyncIterator[None]:
    """The engine's ranks get hardly any more memory: they hold all there is, after this process has on CUDA."""
    with nullcontext() if device_kind == "cpu" else device_filled():
        await engine.collective_rpc("roll_vllm_withhold_memory")
        try:
            yield
        finally:
            await engine.collective_rpc("roll_vllm_release_memory")


@contextmanager
def device_filled(spare: int = 0) -> Iterator[None]:
    """Hold all that is free on the first device but for ``spare`` bytes, every byte of it overwritten with 0xFF.

    What others gave back there is among it. A neighbour that needs memory meanwhile gets none.
    """
    import torch

    torch.full((2**20,), 0xFF, dtype=torch.uint8, device="cuda")  # so that this process has all that it takes
    torch.cuda.empty_cache()
    blocks = []
    size = free = torch.cuda.mem_get_info()[0] - spare
    while size >= 2 * MiB and free > 0:
        try:
            size = min(size, free)
            blocks.append(torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
        free = torch.cuda.mem_get_info()[0] - spare
    torch.cuda.synchronize()
    try:
        yield
    finally:
        blocks.clear()
        torch.cuda.empty_cache()


def poison(device_kind: str) -> None:
    """Overwrite all free memory of the first CUDA device with NaN, and give it back.

    What sleep gave back may then hold anything, as it may when others used it. On a CPU nothing is done: the system
    clears what it hands out.
    """
    if device_kind == "cuda":
        with device_filled():
            pass


def processes_below(pid: int) -> list[psutil.Process]:
    """All descendants of a process, but for what belongs to no engine: resource trackers and a Ray cluster."""
    found: list[psutil.Process] = []
    try:
        children = psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return found
    for child in children:
        with suppress(psutil.Error):
            line = " ".join(child.cmdline())
            if "resource_tracker" not in line and "/ray/" not in line:
                found += [child, *processes_below(child.pid)]
    return found


def processes_of(engine: EngineHandle) -> list[psutil.Process]:
    """The processes of an engine, this one left out: those that left a record of their patches."""
    found = {record.pid for record in engine.patch_records()} - {os.getpid()}
    return [psutil.Process(pid) for pid in sorted(found) if psutil.pid_exists(pid)]


def assert_gone(processes: Sequence[psutil.Process], after: str) -> None:
    """Ten seconds later none of them lives; whichever does is ended, so that it does not disturb what follows."""
    wait_until(lambda: not still_running(processes), 10)
    orphans = still_running(processes)
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    assert not orphans, f"ten seconds after {after} these still live: {orphans}"


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
