"""A lost trainer, sides that do not go together and a lack of memory end in one error, and the engine goes on."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from conformance.oracles import assert_holds, assert_says, ended, memory_held, memory_withheld, pids
from conformance.trainer import STAGES
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender, CollectiveSender, ConfigurationError, WeightsStatus, WeightUpdateError
from roll_vllm.devices import Device
from roll_vllm.environment import free_port
from roll_vllm.errors import OUT_OF_MEMORY_REMEDY, EngineOutOfMemoryError

#: By when an error must be there on a busy machine, in seconds. By default a rank waits for the others for 120.
IN_TIME = 25


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    """Any model will do whose answers show what it holds."""
    return vllm_model_factory("counting")


@pytest.fixture
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLL_VLLM_COLLECTIVE_TIMEOUT", "2")


@pytest.fixture
def group() -> dict[str, Any]:
    """The name, address and backend of a new group."""
    name = f"group-{uuid.uuid4().hex[:8]}"
    return {"master_address": "127.0.0.1", "master_port": free_port(), "group_name": name, "backend": "gloo"}


async def assert_fail(
    calls: list[Awaitable[Any]], kind: type[Exception] | tuple[type[Exception], ...], message: str
) -> None:
    """Each call ends in time with this error."""
    results = await ended(calls, IN_TIME, "calls")
    for error in results:
        assert isinstance(error, kind), f"expected is {kind}, and it is {error!r}"
        assert message in str(error), f"the error does not say {message!r}: {error}"


async def assert_usable(engine: EngineHandle, trainer: Trainer) -> None:
    """The engine lives, and takes a full update."""
    assert not engine.errored
    await trainer.push(engine, trainer.reference_version + 1)
    await assert_holds(engine, trainer, trainer.reference_version + 1)


hang = contract(
    "cf-hang-becomes-error",
    "A trainer that is lost, a rank that is missing, a wrong world size and tensors that differ between the sides are "
    "one typed error within the timeout; the engine lives on and takes a full update.",
    references=("huggingface/trl#6797", "huggingface/trl#7104", "vllm-project/vllm#48720"),
    needs=("runtime",),
)


@hang
@pytest.mark.usefixtures("_short_limit")
async def test_no_trainer_comes(vllm_engine: EngineHandle, vllm_trainer: Trainer, group: dict[str, Any]) -> None:
    joining = vllm_engine.setup_collective_group(rank_offset=1, world_size=2, **group)
    await assert_fail([joining], WeightUpdateError, "could not join")
    await assert_usable(vllm_engine, vllm_trainer)


@hang
@pytest.mark.usefixtures("_short_limit")
@pytest.mark.vllm_generation("V1")
@pytest.mark.parametrize(("trainers", "engines"), [(2, 3), (3, 2)], ids=["rank missing", "rank too many"])
async def test_world_sizes_differ(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, group: dict[str, Any], trainers: int, engines: int
) -> None:
    joined = asyncio.to_thread(CollectiveSender, world_size=trainers, **group)
    joining = vllm_engine.setup_collective_group(rank_offset=1, world_size=engines, **group)
    await assert_fail([joining, joined], (ConfigurationError, WeightUpdateError), group["group_name"])
    await assert_usable(vllm_engine, vllm_trainer)


@hang
@pytest.mark.vllm_generation("V1")
@pytest.mark.parametrize("stage", STAGES)
async def test_trainer_is_killed(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, group: dict[str, Any], stage: str
) -> None:
    """While the engine waits: for the handshake, for what will be sent, or for the tensors themselves."""
    weights = vllm_trainer.weights(vllm_trainer.reference_version + 1)
    description = CollectiveSender.describe(weights)
    layout = json.dumps(list(zip(description["dtypes"], description["shapes"], strict=True)))
    arguments = [stage, str(group["master_port"]), "2", group["group_name"], layout]
    command = [sys.executable, "-m", "conformance.trainer", *arguments]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # The trainer has time enough, and so has the engine: it is the trainer's end that must be noticed.
    environ["ROLL_VLLM_COLLECTIVE_TIMEOUT"] = "60"

    async def serve() -> None:
        await vllm_engine.setup_collective_group(rank_offset=1, world_size=2, **group)
        await vllm_engine.broadcast_parameter(**description, group_name=group["group_name"])

    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as trainer:
        try:
            call = asyncio.ensure_future(serve())
            assert trainer.stdout is not None
            # gloo writes there, too
            said = await asyncio.to_thread(lambda lines: f"{stage}\n" in lines, trainer.stdout)
            assert said, f"the trainer ended before it was where it is to be killed ({stage}); see its stderr above"
            await asyncio.sleep(0.5)
            assert not call.done(), f"the engine did not wait: {call}"
        finally:
            trainer.kill()
        message = "could not join" if stage == "listens" else "failed on rank 1"
        await assert_fail([call], WeightUpdateError, message)
    assert (await vllm_engine.state()).weights is WeightsStatus.COMPLETE, "nothing had been written"
    await assert_usable(vllm_engine, vllm_trainer)


@hang
@pytest.mark.vllm_generation("V1")
@pytest.mark.parametrize("difference", ["fewer", "longer"])
async def test_sides_differ(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, group: dict[str, Any], difference: str
) -> None:
    import torch

    weights = list(vllm_trainer.weights(vllm_trainer.reference_version + 1).items())
    name, first = weights[0]
    sent = weights[1:] if difference == "fewer" else [(name, torch.cat([first, first])), *weights[1:]]
    joined = asyncio.to_thread(CollectiveSender, world_size=2, **group)
    _, sender = await asyncio.gather(vllm_engine.setup_collective_group(rank_offset=1, world_size=2, **group), joined)
    described = CollectiveSender.describe(weights)
    receiving = vllm_engine.broadcast_parameter(**described, group_name=group["group_name"])
    await assert_fail([receiving, asyncio.to_thread(sender.send, sent)], WeightUpdateError, "tensors")
    sender.close()
    await assert_usable(vllm_engine, vllm_trainer)


@hang
async def test_bucket_is_truncated(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    weights = vllm_trainer.weights(vllm_trainer.reference_version + 1)
    ranks = vllm_engine.vllm_config.parallel_config.world_size
    with BucketSender() as sender:
        payload = next(sender.payloads(weights))
        (bucket,) = sender._buckets.values()
        os.truncate(bucket.path, bucket.memory.nbytes // 2)
        call = vllm_engine.update_parameter_in_bucket([payload] * ranks)
        await assert_fail([call], WeightUpdateError, "its metadata says")
    await assert_usable(vllm_engine, vllm_trainer)


settings = contract(
    "env-collective-settings",
    "Variables that decide how the ranks of a group talk are compared when it is made: a difference is an error on "
    "both sides that names the variable and both values. Symmetric-memory all-reduce is off in every rank.",
    references=("NovaSky-AI/SkyRL#143", "vllm-project/vllm#24696", "vllm-project/vllm#25070"),
    needs=("runtime",),
)


@settings
@pytest.mark.vllm_generation("V1")
async def test_settings_are_compared(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, group: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "GLOO_DEVICE_TRANSPORT"
    (value,) = {values[variable] for values in await vllm_engine.worker_environment([variable])}
    monkeypatch.setenv(variable, "TCP_TLS" if value == "TCP" else "TCP")
    joined = asyncio.to_thread(CollectiveSender, world_size=2, **group)
    joining = vllm_engine.setup_collective_group(rank_offset=1, world_size=2, **group)
    results = await ended([joining, joined], IN_TIME, "ranks")
    for error in results:
        assert isinstance(error, ConfigurationError), f"the difference in {variable} gave {error!r}"
        assert variable in str(error)
        for shown in (value, os.environ[variable]):
            assert ("not set" if shown is None else repr(shown)) in str(error)
    monkeypatch.undo()
    await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version + 1, transport="collective")
    await assert_holds(vllm_engine, vllm_trainer, vllm_trainer.reference_version + 1)


@settings
async def test_symmetric_memory_is_off(vllm_engine: EngineHandle) -> None:
    for values in await vllm_engine.worker_environment(["VLLM_ALLREDUCE_USE_SYMM_MEM"]):
        assert values == {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}


@contract(
    "sl-wake-oom-recovers",
    "A wake for which there is no memory is an error that names both remedies, and takes nothing; when there is memory "
    "again the wake succeeds, and everything is as it was.",
    references=("vllm-project/vllm#34600", "vllm-project/vllm#13941"),
    backends=("cpu", "cuda"),
    needs=("runtime",),
)
# The rank of a V0 engine is this process, whose allocator has much to give without asking the system.
@pytest.mark.vllm_generation("V1")
@pytest.mark.parametrize("level", [1, 2])
async def test_wake_without_memory(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device, level: int
) -> None:
    version = vllm_trainer.reference_version
    sums, workers = await vllm_engine.checksums(), await pids(vllm_engine)
    needed = sum(sum(worker.resident_bytes.values()) for worker in (await vllm_engine.state()).workers)
    await vllm_engine.offload_states(level)
    asleep = await vllm_engine.state()
    async with memory_withheld(vllm_engine, vllm_device.kind):
        held = memory_held(workers, vllm_device.kind)
        (error,) = await ended([vllm_engine.load_states()], 60, "wakes")
        taken = memory_held(workers, vllm_device.kind) - held
    assert isinstance(error, EngineOutOfMemoryError), f"a wake without memory ended with {error!r}"
    assert OUT_OF_MEMORY_REMEDY in str(error)
    for now, before in zip((await vllm_engine.state()).workers, asleep.workers, strict=True):
        assert now.sleeping == before.sleeping, "after a wake that failed, something is awake"
        assert now.resident_bytes == before.resident_bytes
    if vllm_device.kind == "cpu":  # elsewhere the test's own memory is in the driver's figure
        assert taken < 0.1 * needed, f"{taken} of {needed} bytes are held although the wake failed"
    await vllm_engine.load_states()
    if level == 2:
        await vllm_trainer.push(vllm_engine, version)
    assert await vllm_engine.checksums() == sums
    await assert_says(vllm_engine, vllm_trainer, version)
