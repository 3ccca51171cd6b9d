"""What only a device with memory of its own can show."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.oracles import (
    TRANSPORTS,
    assert_holds,
    assert_parity,
    device_filled,
    ended,
    memory_held,
    memory_withheld,
    pids,
    poison,
)
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender, backends
from roll_vllm.devices import Device
from roll_vllm.errors import OUT_OF_MEMORY_REMEDY, EngineOutOfMemoryError

MiB, GiB = 2**20, 2**30

#: Devices whose memory is not the host's.
ACCELERATORS = ("cuda", "rocm", "npu")


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    return vllm_model_factory("counting")


@pytest.fixture
def neighbour(vllm_device: Device) -> Iterator[subprocess.Popen[str]]:
    """A process that takes and gives back memory of the device all the time."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "conformance.neighbour", backends.of(vllm_device).torch_device]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n", "the neighbour did not start; what it wrote to stderr is above"
        yield process
        process.kill()


@contract(
    "env-memory-profiling-tolerant",
    "An engine starts although another process on its device takes memory and gives it back meanwhile.",
    references=("vllm-project/vllm#56830", "vllm-project/vllm#33358"),
    backends=ACCELERATORS,
    needs=("runtime",),
)
async def test_start_beside_a_neighbour(
    vllm_engine_factory: Callable[..., EngineHandle], vllm_trainer: Trainer, neighbour: subprocess.Popen[str]
) -> None:
    engine = vllm_engine_factory(worker_name="beside", gpu_memory_utilization=0.3)
    assert neighbour.poll() is None, "the neighbour had gone by then, so this proves nothing"
    await vllm_trainer.push(engine, vllm_trainer.reference_version)
    await assert_holds(engine, vllm_trainer, vllm_trainer.reference_version)


bounded = contract(
    "mem-sync-bounded",
    "A weight update takes at most twice the bucket of further device memory while it runs, and none after it.",
    references=("verl-project/verl#6958", "vllm-project/vllm#51258", "vllm-project/vllm#52950"),
    backends=("cuda", "rocm"),
    needs=("runtime",),
)


@bounded
async def test_updates_take_no_memory(vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device) -> None:
    versions = [vllm_trainer.reference_version + number % 2 for number in range(21)]
    total = sum(tensor.nbytes for tensor in vllm_trainer.weights(versions[0]).values())
    largest = max(tensor.nbytes for tensor in vllm_trainer.weights(versions[0]).values())
    bucket = max(total // 8, largest)
    workers = await pids(vllm_engine)
    with BucketSender(bucket) as sender:
        for version in versions[:1]:  # routes are learned, and the allocator has what it needs
            await vllm_trainer.push(vllm_engine, version, sender=sender)
        before = await vllm_engine.device_memory(reset_peak=True)
        held = memory_held(workers, "cuda") if vllm_device.kind == "cuda" else 0
        for version in versions[1:]:
            await vllm_trainer.push(vllm_engine, version, sender=sender)
        after = await vllm_engine.device_memory()
    for rank, (start, end) in enumerate(zip(before, after, strict=True)):
        extra, more = end["peak"] - start["allocated"], end["allocated"] - start["allocated"]
        # The allocator rounds each tensor up to 512 bytes.
        assert extra <= 2 * bucket + MiB, f"rank {rank}: {extra} bytes more during updates by buckets of {bucket}"
        assert more <= MiB, f"rank {rank}: 20 updates left {more} bytes"
    if vllm_device.kind == "cuda":
        more = memory_held(workers, "cuda") - held
        assert more <= 2 * bucket + 32 * MiB, f"by the driver's figures, 20 updates left {more} bytes"
    await assert_holds(vllm_engine, vllm_trainer, versions[-1])


@contract(
    "wu-bucketed-is-fast",
    "An update in buckets takes at most half the time of one tensor by tensor, and the tenth not much more than the "
    "second.",
    references=("vllm-project/vime#175", "NovaSky-AI/SkyRL#161", "allenai/open-instruct#1535"),
    backends=ACCELERATORS,
    needs=("runtime",),
)
async def test_buckets_are_worth_it(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    weights = vllm_trainer.weights(vllm_trainer.reference_version)

    async def seconds(parts: list[dict[str, Any]]) -> float:
        begun = time.perf_counter()
        async with vllm_engine.weight_update() as update:
            for part in parts:
                await update.send(part)
        return time.perf_counter() - begun

    single = [{name: tensor} for name, tensor in weights.items()]
    together = [await seconds([weights]) for _ in range(10)]
    apart = [await seconds(single) for _ in range(4)][1:]
    assert min(together) <= 0.5 * min(apart), f"in buckets {together} s, tensor by tensor {apart} s"
    assert min(together[7:]) <= 1.5 * min(together[1:4]), f"later updates take longer: {together} s"
    await assert_holds(vllm_engine, vllm_trainer, vllm_trainer.reference_version)


@contract(
    "sl-kv-side-state",
    "The scales of an fp8 KV cache are after sleep and wake what they were, and so are the log-probabilities.",
    references=("vllm-project/vllm#45617", "vllm-project/vllm#57163", "vllm-project/vllm#28783"),
    backends=ACCELERATORS,
    needs=("runtime",),
)
@pytest.mark.vllm_generation("V1")  # V0 has an fp8 KV cache with xformers alone
@pytest.mark.parametrize(
    "calibrated",
    [
        pytest.param(True, marks=pytest.mark.vllm_version(">=0.11.1")),  # before, V1 calibrates nothing
        False,
    ],
    ids=["calibrated", "given"],
)
async def test_scales_survive(
    vllm_engine_factory: Callable[..., EngineHandle],
    continuous_trainer: Trainer,
    prompts: list[list[int]],
    vllm_device: Device,
    calibrated: bool,
) -> None:
    engine = vllm_engine_factory(kv_cache_dtype="fp8", calculate_kv_scales=calibrated, worker_name="scales")
    version = continuous_trainer.reference_version
    await continuous_trainer.push(engine, version)

    async def logprobs() -> list[float]:
        await engine.reset_prefix_cache()
        output = await engine.complete(prompts[5], temperature=0.0, max_tokens=8, logprobs=0)
        tokens, rows = output.outputs[0].token_ids, output.outputs[0].logprobs
        return [row[token].logprob for token, row in zip(tokens, rows, strict=True)]

    async def scales() -> dict[str, str]:
        sums = (await engine.checksums())[0]
        return {name: value for name, value in sums.items() if name.endswith(("k_scale", "v_scale"))}

    untouched = await scales()
    if not calibrated:
        for suffix in ("k_scale", "v_scale"):
            await engine.collective_rpc("roll_vllm_scale", args=(suffix, 0.5))
    await logprobs()  # the first forward pass calibrates
    before, right = await logprobs(), await scales()
    assert right, "this engine has no scales"
    changed = {name for name in right if right[name] != untouched[name]}
    for suffix in ("k_scale", "v_scale"):
        assert any(name.endswith(suffix) for name in changed), f"every {suffix} is the usual one, which proves nothing"
    for level in (1, 2):
        for tags in ([None], [["weights"], ["kv_cache"]]):
            await engine.offload_states(level)
            poison(vllm_device.kind)
            for tag in tags:
                await engine.load_states(tag)
            if level == 2:
                await continuous_trainer.push(engine, version)
            assert await scales() == right, f"after level {level} and waking {tags}"
            differences = [abs(one - other) for one, other in zip(before, await logprobs(), strict=True)]
            assert max(differences) <= 0.01, (
                f"after level {level} and waking {tags}, log-probabilities moved by {max(differences)}"
            )


@contract(
    "sl-two-engines",
    "Two engines of one job on one device sleep and wake in turn, and neither disturbs the other.",
    references=("vllm-project/vllm#18975", "verl-project/verl#1193"),
    backends=ACCELERATORS,
    needs=("runtime",),
)
@pytest.mark.vllm_generation("V1")
async def test_two_engines_take_turns(
    vllm_engine: EngineHandle,
    vllm_engine_factory: Callable[..., EngineHandle],
    vllm_trainer: Trainer,
    vllm_device: Device,
) -> None:
    version = vllm_trainer.reference_version
    other = vllm_engine_factory(worker_name="other", gpu_memory_utilization=0.3)
    await vllm_trainer.push(other, version + 1)
    held = {vllm_engine: version, other: version + 1}
    sums = {engine: await engine.checksums() for engine in held}
    for turn in range(5):
        for sleeper, awake in ((vllm_engine, other), (other, vllm_engine)):
            await sleeper.offload_states(1 + turn % 2)
            assert not await awake.is_sleeping()
            assert await awake.checksums() == sums[awake], "the other's sleep changed what this engine holds"
            await assert_holds(awake, vllm_trainer, held[awake])
            poison(vllm_device.kind)
            await sleeper.load_states()
            if turn % 2:
                await vllm_trainer.push(sleeper, held[sleeper])
            assert await sleeper.checksums() == sums[sleeper]
            await assert_holds(sleeper, vllm_trainer, held[sleeper])


graphs = contract(
    "wu-graphs-stay-live",
    "Captured graphs read the live weights: after each update, and after sleep and wake at both levels, they compute "
    "what the weights say.",
    references=("vllm-project/vllm#48941", "vllm-project/vllm#48539", "vllm-project/vllm#45648"),
    backends=("cuda", "rocm"),
    needs=("runtime",),
)


async def assert_graphs_compute(engine: EngineHandle, trainer: Trainer, version: int) -> None:
    """The engine holds a version and says what it must, by replaying graphs, in batches and alone."""
    for probe in trainer.model.probes(version)[:2]:
        before = await engine.collective_rpc("roll_vllm_graph_replays")
        (said,) = await engine.greedy([probe.prompt_token_ids], len(probe.expected_token_ids))
        assert said == probe.expected_token_ids, f"version {version} says {probe.expected_token_ids}, not {said}"
        after = await engine.collective_rpc("roll_vllm_graph_replays")
        steps = [end - start for start, end in zip(before, after, strict=True)]
        assert min(steps) >= len(said) // 2, f"{steps} replays for {len(said)} tokens: they did not come from graphs"
    await assert_holds(engine, trainer, version)


class TestGraphs:
    """On an engine with graphs for up to eight requests, so that it has soon captured them."""

    @pytest.fixture
    def vllm_engine_args(self, vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
        few = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
        return {**vllm_engine_args, "enforce_eager": False, "compilation_config": few}

    @graphs
    async def test_after_updates(
        self,
        vllm_engine: EngineHandle,
        vllm_trainer: Trainer,
        continuous_trainer: Trainer,
        prompts: list[list[int]],
    ) -> None:
        version = vllm_trainer.reference_version
        await assert_graphs_compute(vllm_engine, vllm_trainer, version)
        for step in (1, 2, 3):
            await vllm_trainer.push(vllm_engine, version + step)
            await assert_graphs_compute(vllm_engine, vllm_trainer, version + step)
        for step in (1, 2):
            await continuous_trainer.push(vllm_engine, version + step)
            await assert_parity(vllm_engine, continuous_trainer, version + step, prompts[:4])

    @graphs
    @pytest.mark.parametrize("level", [1, 2])
    async def test_after_sleep(
        self, vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device, level: int
    ) -> None:
        version = vllm_trainer.reference_version
        for step in (1, 2):
            await vllm_engine.offload_states(level)
            poison(vllm_device.kind)
            await vllm_engine.load_states()
            if level == 2:
                await vllm_trainer.push(vllm_engine, version)
            await assert_graphs_compute(vllm_engine, vllm_trainer, version)
            await vllm_trainer.push(vllm_engine, version + step)
            await assert_graphs_compute(vllm_engine, vllm_trainer, version + step)
            version += step


no_memory = contract(
    "err-out-of-memory",
    "Where the device has no memory left for a start or an update, the error names both remedies; when there is memory "
    "again, the next start and the next update succeed.",
    references=("vllm-project/vllm#34600", "vllm-project/vllm#13941"),
    backends=("cuda", "rocm"),
    needs=("runtime",),
)

#: By when a lack of memory must have ended an update, in seconds: before the timeout of a collective group.
IN_TIME = 60


@no_memory
@pytest.mark.vllm_generation("V1")  # where this process is no rank, and can hold the memory without being in the way
async def test_start_without_memory(vllm_engine_factory: Callable[..., EngineHandle], vllm_trainer: Trainer) -> None:
    # Enough for what every process takes that uses the device, and not for half of it.
    with device_filled(spare=4 * GiB), pytest.raises(EngineOutOfMemoryError, match=re.escape(OUT_OF_MEMORY_REMEDY)):
        vllm_engine_factory(worker_name="without-memory")
    engine = vllm_engine_factory(worker_name="with-memory", gpu_memory_utilization=0.3)
    await vllm_trainer.push(engine, vllm_trainer.reference_version)
    await assert_holds(engine, vllm_trainer, vllm_trainer.reference_version)


@no_memory
@pytest.mark.vllm_generation("V1")
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_update_without_memory(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device, transport: str
) -> None:
    version = vllm_trainer.reference_version + 1
    await vllm_trainer.push(vllm_engine, version, transport=transport)  # sets up what is kept between updates
    # What the allocator keeps of earlier updates goes back with a sleep.
    await vllm_engine.offload_states(1)
    await vllm_engine.load_states()
    async with memory_withheld(vllm_engine, vllm_device.kind):
        (error,) = await ended([vllm_trainer.push(vllm_engine, version + 1, transport=transport)], IN_TIME, "updates")
    assert isinstance(error, EngineOutOfMemoryError), f"an update without memory ended with {error!r}"
    assert OUT_OF_MEMORY_REMEDY in str(error)
    await vllm_trainer.push(vllm_engine, version + 2, transport=transport)
    await assert_holds(vllm_engine, vllm_trainer, version + 2)


@contract(
    "wu-devices-by-other-names",
    "Weights on a device of a trainer that sees the devices by other names and in another order than the engine reach "
    "the engine.",
    references=("vllm-project/vllm#13515", "NovaSky-AI/SkyRL#1308"),
    backends=("cuda",),
    needs=("runtime",),
)
@pytest.mark.vllm_generation("V1")
async def test_trainer_counts_otherwise(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device, vllm_cache_dir: Path
) -> None:
    import torch

    version, model = vllm_trainer.reference_version, vllm_trainer.model
    names = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]
    workers = await vllm_engine.device_identities()
    command = [sys.executable, "-m", "conformance.packer", str(vllm_cache_dir / "models"), model.name, model.dtype]
    command += [json.dumps(workers), str(version + 1), str(version + 2)]
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "CUDA_VISIBLE_DEVICES": ",".join(reversed(names)),
    }
    sent: dict[tuple[int, int], int] = {}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environ, text=True, **pipes) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        try:
            while (line := await asyncio.to_thread(trainer.stdout.readline)) != "done\n":
                assert line, "the trainer ended before it had sent everything; what it wrote to stderr is above"
                device, number, payloads = line.split(" ", 2)
                key = int(device), int(number)
                vllm_engine.pushed = None
                await vllm_engine.update_parameter_in_bucket([payload.encode() for payload in json.loads(payloads)])
                sent[key] = sent.get(key, 0) + 1
                await assert_holds(vllm_engine, vllm_trainer, key[1])  # all of it fits into one bucket
                trainer.stdin.write("\n")
                trainer.stdin.flush()
        finally:
            trainer.kill()
    wanted = {(device, version + step): 1 for device in range(len(names)) for step in (1, 2)}
    assert sent == wanted, f"updates of (device, version): {sent}"
