"""Sleep gives memory back, wake restores what it must, and the state never lies."""

from __future__ import annotations

import asyncio
import random

import pytest

from conformance.oracles import (
    answers,
    assert_holds,
    assert_parity,
    assert_says,
    completed,
    memory_held,
    pids,
    poison,
    tags_after,
    wait_until,
)
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import ConfigurationError, WeightsNotReadyError, WeightsStatus
from roll_vllm.devices import Device

MiB = 2**20


level_1_identity = contract(
    "sl-level1-identity",
    "After a level-1 sleep and wake, parameters, buffers and greedy answers are identical, and no stale KV is read.",
    references=("vllm-project/vllm#49237",),
    needs=("sleep", "checksum", "update"),
)


@level_1_identity
async def test_level_1_changes_nothing(
    vllm_engine: EngineHandle, continuous_trainer: Trainer, vllm_device: Device, prompts: list[list[int]]
) -> None:
    version = continuous_trainer.reference_version
    await continuous_trainer.push(vllm_engine, version)
    long_prompt = [token for prompt in prompts for token in prompt]
    asked = [*prompts, long_prompt]
    said, sums = await answers(vllm_engine, continuous_trainer, asked, 12), await vllm_engine.checksums()
    for _ in range(2):
        await vllm_engine.sleep(1)
        if "state" in vllm_engine.supported:
            assert (await vllm_engine.state()).is_sleeping
        poison(vllm_device.kind)
        await vllm_engine.wake_up()
        assert await vllm_engine.checksums() == sums
        _, cached = await completed(vllm_engine, long_prompt, temperature=0.0, max_tokens=2)
        assert cached == 0, "the KV cache was given back, but its prefix cache still answers"
        assert await answers(vllm_engine, continuous_trainer, asked, 12) == said
        await assert_says(vllm_engine, continuous_trainer, version)
    await assert_parity(vllm_engine, continuous_trainer, version, prompts[:4])


requires_reload = contract(
    "sl-level2-requires-reload",
    "After level 2 and wake the engine refuses to generate until a complete update; then it is as if fresh.",
    references=("vllm-project/vllm#29341", "vllm-project/vllm#54235", "NVIDIA-NeMo/RL#2631"),
    needs=("sleep.level2", "state", "update"),
)


@requires_reload
async def test_level_2_without_reload_is_refused(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device
) -> None:
    await vllm_engine.sleep(2)
    poison(vllm_device.kind)
    await vllm_engine.wake_up()
    state = await vllm_engine.state()
    assert not state.is_sleeping
    assert state.weights is WeightsStatus.DESTROYED
    with pytest.raises(WeightsNotReadyError if "runtime" in vllm_engine.supported else Exception, match="level 2"):
        await asyncio.wait_for(vllm_engine.complete([1, 2, 3], max_tokens=2), 10)
    await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version)
    await assert_holds(vllm_engine, vllm_trainer, vllm_trainer.reference_version)


@requires_reload
async def test_requests_wait_for_the_reload(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    version = vllm_trainer.reference_version + 2
    await vllm_engine.sleep(2)
    waiting = asyncio.ensure_future(vllm_engine.complete([1, 2, 3], temperature=0.0, max_tokens=2))
    await asyncio.sleep(0.3)
    assert not waiting.done(), "a request ran on a sleeping engine"
    await vllm_engine.wake_up()
    await asyncio.sleep(0.3)
    assert not waiting.done(), "a request ran on weights that nobody sent"
    await vllm_trainer.push(vllm_engine, version)
    output = await asyncio.wait_for(waiting, 30)
    if "runtime" in vllm_engine.supported:
        assert output.weight_version == vllm_engine.weight_version
    await assert_holds(vllm_engine, vllm_trainer, version)


@contract(
    "sl-level2-buffers",
    "After level 2, wake and update every buffer is byte-identical, non-persistent ones and plain attributes too.",
    references=("vllm-project/vllm#16564", "NVIDIA-NeMo/RL#2631"),
    needs=("sleep.level2", "checksum", "update"),
)
async def test_level_2_restores_buffers(vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device) -> None:
    version = vllm_trainer.reference_version
    before = (await vllm_engine.checksums())[0]
    buffers = set(before) - set(vllm_trainer.engine_tensors(version))
    assert any("cos_sin_cache" in name for name in buffers), f"no rotary table among the buffers {sorted(buffers)}"
    await vllm_engine.sleep(2)
    poison(vllm_device.kind)
    await vllm_engine.wake_up()
    await vllm_trainer.push(vllm_engine, version)
    after = (await vllm_engine.checksums())[0]
    changed = [name for name in buffers if after.get(name) != before[name]]
    assert not changed, f"these buffers are not what they were: {changed}"
    await assert_holds(vllm_engine, vllm_trainer, version)


@contract(
    "sl-tag-order",
    "Weights and KV cache wake in any order, with the update in between; after each step the state says what is awake.",
    references=("vllm-project/vllm#45619", "vllm-project/vllm#15254"),
    needs=("sleep.tags", "state", "update"),
)
@pytest.mark.parametrize(
    "steps",
    [
        ["weights", "update", "kv_cache"],
        ["kv_cache", "weights", "update"],
        ["kv_cache", "update"],
        ["update", "kv_cache"],
    ],
    ids="-".join,
)
async def test_tag_order(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device, steps: list[str]
) -> None:
    version = vllm_trainer.reference_version + 1
    buffers = (await vllm_engine.checksums())[0]
    parameters = vllm_trainer.engine_tensors(version)
    await vllm_engine.sleep(2)
    poison(vllm_device.kind)
    asleep = {"weights", "kv_cache"}
    assert (await vllm_engine.state()).sleeping == asleep
    for step in steps:
        if step == "update":
            await vllm_trainer.push(vllm_engine, version)
            asleep.discard("weights")
        else:
            await vllm_engine.wake_up([step])
            asleep = tags_after(asleep, step, vllm_device.kind)
        state = await vllm_engine.state()
        assert state.sleeping == asleep, f"after {step} the engine says that {set(state.sleeping)} sleep"
        assert state.is_sleeping == bool(asleep)
        if "runtime" in vllm_engine.supported:
            assert await vllm_engine.is_sleeping() == bool(asleep)
    after = (await vllm_engine.checksums())[0]
    assert {n: s for n, s in after.items() if n not in parameters} == {
        n: s for n, s in buffers.items() if n not in parameters
    }
    await assert_holds(vllm_engine, vllm_trainer, version)


memory_freed = contract(
    "sl-memory-freed",
    "Sleep gives at least 90 % of its bytes back to the system, on CUDA by the driver's figures: KV cache at level 1, "
    "weights and KV cache at level 2.",
    references=("vllm-project/vllm#32714", "NVIDIA-NeMo/RL#223"),
    backends=("cpu", "cuda"),
    needs=("runtime",),
)


@memory_freed
@pytest.mark.parametrize("level", [1, 2])
async def test_memory_returns(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device, level: int
) -> None:
    workers = await pids(vllm_engine)
    # One cycle first: a KV cache that was never touched is not in memory, and cannot leave it.
    await vllm_engine.offload_states(level)
    await vllm_engine.load_states()
    await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version)
    await vllm_engine.greedy([[1, 2, 3]], 4)
    held = [worker.resident_bytes for worker in (await vllm_engine.state()).workers]
    tags = tags_after(set(), f"sleep {level}", vllm_device.kind)
    wanted = sum(by_tag[tag] for by_tag in held for tag in tags)
    assert wanted > 32 * MiB, "too little memory is at stake to be measured"
    before = memory_held(workers, vllm_device.kind)
    await vllm_engine.offload_states(level)
    freed = before - memory_held(workers, vllm_device.kind)
    assert freed >= 0.9 * wanted, f"{freed / MiB:.0f} MiB of {wanted / MiB:.0f} MiB came back to the system"


@contract(
    "sl-idempotent",
    "Sleeping twice, waking twice or unasked, and unknown tags or levels are harmless or one clear error.",
    references=("vllm-project/vllm#36651", "vllm-project/vllm#45565"),
    needs=("runtime",),
)
async def test_any_sequence_is_safe(vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device) -> None:
    version = vllm_trainer.reference_version
    draw = random.Random(3)
    calls = {
        "sleep 1": lambda: vllm_engine.offload_states(1),
        "sleep 2": lambda: vllm_engine.offload_states(2),
        "wake": vllm_engine.load_states,
        "weights": lambda: vllm_engine.load_states(["weights"]),
        "kv_cache": lambda: vllm_engine.load_states(["kv_cache"]),
    }
    sleeping: set[str] = set()
    walk = [name for first in calls for second in calls for name in (first, second)]
    for name in [*walk, *draw.choices(list(calls), k=30)]:
        await calls[name]()
        sleeping = tags_after(sleeping, name, vllm_device.kind)
        assert (await vllm_engine.state()).sleeping == sleeping, f"wrong state after {name!r}"
    with pytest.raises(ConfigurationError):
        await vllm_engine.load_states(["wieghts"])
    with pytest.raises(ConfigurationError):
        await vllm_engine.offload_states(3)
    assert (await vllm_engine.state()).sleeping == sleeping
    await vllm_engine.load_states()
    await vllm_trainer.push(vllm_engine, version)
    await assert_holds(vllm_engine, vllm_trainer, version)


@contract(
    "sl-state-truthful",
    "is_sleeping and the state say what the workers' memory really is, however the engine was put to sleep.",
    references=("vllm-project/vllm#49237", "vllm-project/vllm-ascend#12073"),
    backends=("cpu", "cuda"),
    needs=("runtime",),
)
@pytest.mark.parametrize("call", ["offload_states", "sleep"])
async def test_state_matches_memory(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device, call: str
) -> None:
    workers = await pids(vllm_engine)

    def held() -> int:
        return memory_held(workers, vllm_device.kind)

    await vllm_engine.offload_states(2)
    await vllm_engine.load_states()
    await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version)
    awake = held()
    assert not await vllm_engine.is_sleeping()
    await getattr(vllm_engine, call)(2)
    # What the engine says must follow what the system says, not what it was told last.
    gone = wait_until(lambda: held() < awake - 32 * MiB, 2)
    asleep = held()
    state = await vllm_engine.state()
    assert gone == await vllm_engine.is_sleeping() == state.is_sleeping is True
    assert all(worker.sleeping == {"weights", "kv_cache"} for worker in state.workers)
    assert all(sum(worker.resident_bytes.values()) == 0 for worker in state.workers)
    await vllm_engine.wake_up()
    assert held() > awake - 0.2 * (awake - asleep), "it says that it is awake, but has no memory"
    assert not await vllm_engine.is_sleeping()
