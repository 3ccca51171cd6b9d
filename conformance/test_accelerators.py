"""What only a device with memory of its own can show. Written for CUDA, ROCm and NPUs; run on none of them yet."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from conformance.oracles import assert_holds, memory_held, pids
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender, backends
from roll_vllm.devices import Device

MiB = 2**20

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
    versions=">=0.11.1,<0.13",  # before, V1 calibrates nothing, and its scales are buffers like others
    backends=ACCELERATORS,
    needs=("runtime",),
)
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("tags", [[None], [["weights"], ["kv_cache"]]], ids=["at once", "by tag"])
async def test_scales_survive(
    vllm_engine_factory: Callable[..., EngineHandle],
    continuous_trainer: Trainer,
    prompts: list[list[int]],
    level: int,
    tags: list[list[str] | None],
) -> None:
    engine = vllm_engine_factory(kv_cache_dtype="fp8", calculate_kv_scales=True, worker_name="scales")
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
    await logprobs()  # the first forward pass calibrates
    before, calibrated = await logprobs(), await scales()
    assert calibrated, "this engine has no scales"
    assert calibrated != untouched, "nothing was calibrated, so this proves nothing"
    await engine.offload_states(level)
    for tag in tags:
        await engine.load_states(tag)
    if level == 2:
        await continuous_trainer.push(engine, version)
    assert await scales() == calibrated
    differences = [abs(one - other) for one, other in zip(before, await logprobs(), strict=True)]
    assert max(differences) <= 0.01, f"log-probabilities moved by {max(differences)}"


@contract(
    "sl-two-engines",
    "Two engines of one job on one device sleep and wake in turn, and neither disturbs the other.",
    references=("vllm-project/vllm#18975", "verl-project/verl#1193"),
    backends=ACCELERATORS,
    needs=("runtime",),
)
@pytest.mark.vllm_generation("V1")
async def test_two_engines_take_turns(
    vllm_engine: EngineHandle, vllm_engine_factory: Callable[..., EngineHandle], vllm_trainer: Trainer
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
            await sleeper.load_states()
            if turn % 2:
                await vllm_trainer.push(sleeper, held[sleeper])
            assert await sleeper.checksums() == sums[sleeper]
            await assert_holds(sleeper, vllm_trainer, held[sleeper])
