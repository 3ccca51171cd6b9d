"""What holds on every rank of an engine that has several, whichever executor runs them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from conformance.oracles import (
    TRANSPORTS,
    TWO_DEVICES,
    assert_dead,
    assert_error_of_one_rank,
    assert_gone,
    assert_rank_order,
    assert_ranks_hold,
    assert_timeout_kept,
    memory_held,
    pids,
    processes_of,
    share_of_rank,
    slowed,
    tags_after,
)
from conformance.test_lifecycle import died, no_orphans, ordered
from conformance.test_sleep import level_1_identity, memory_freed, requires_reload
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineConfig, EngineHandle, EnginePool
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender, WeightsNotReadyError, WeightsStatus
from roll_vllm.devices import Device

MiB = 2**20

pytestmark = TWO_DEVICES


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    """A model that two ranks can share."""
    return vllm_model_factory("counting")


@pytest.fixture
def vllm_engine_args(
    vllm_engine_args: dict[str, Any], vllm_executor_args: Callable[[int], dict[str, Any]]
) -> dict[str, Any]:
    return {**vllm_engine_args, "tensor_parallel_size": 2, **vllm_executor_args(2)}


@pytest.fixture
def last_engine(
    vllm_engine_pool: EnginePool,
    vllm_engine_args: dict[str, Any],
    vllm_trainer: Trainer,
    vllm_engine_creator: Callable[[dict[str, Any]], Callable[[], Any]],
) -> EngineHandle:
    """The shared engine, for a test that it does not survive."""
    config = EngineConfig.of(vllm_engine_args["model"], vllm_engine_args)
    engine = vllm_engine_pool.shared(config, vllm_engine_creator(vllm_engine_args))
    engine.run(vllm_trainer.reset(engine))
    return engine


all_ranks = contract(
    "wu-all-ranks-all-transports",
    "After an update by any transport every rank holds its share of the new weights, also when one rank is slow.",
    references=("NovaSky-AI/SkyRL#1398", "modelscope/ms-swift#10204", "verl-project/verl#7519"),
)


@all_ranks
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("pace", ["even", "one slow rank"])
async def test_every_rank_has_its_share(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, transport: str, pace: str
) -> None:
    rounds = 2 if pace == "even" else 6
    last = (await pids(vllm_engine))[-1]
    # Small buckets, which are used again and again: whoever is slow must not find the next one in them.
    options: dict[str, Any] = {"sender": BucketSender(2 * MiB)} if transport == "bucket" else {}
    try:
        for version in range(vllm_trainer.reference_version + 1, vllm_trainer.reference_version + 1 + rounds):
            with nullcontext() if pace == "even" else slowed(last):
                await vllm_trainer.push(vllm_engine, version, transport=transport, **options)
            await assert_ranks_hold(vllm_engine, vllm_trainer, version)
    finally:
        for sender in options.values():
            sender.close()


@level_1_identity
async def test_level_1_changes_no_rank(vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
    said, sums = await vllm_engine.greedy(prompts, 8), await vllm_engine.checksums()
    for _ in range(2):
        await vllm_engine.offload_states(1)
        assert all("kv_cache" in worker.sleeping for worker in (await vllm_engine.state()).workers)
        await vllm_engine.load_states()
        assert not any(worker.sleeping for worker in (await vllm_engine.state()).workers)
        assert await vllm_engine.checksums() == sums
        assert await vllm_engine.greedy(prompts, 8) == said


@requires_reload
async def test_level_2_empties_every_rank(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    await assert_emptied_and_reloaded(vllm_engine, vllm_trainer)


async def assert_emptied_and_reloaded(engine: EngineHandle, trainer: Trainer) -> None:
    version = trainer.reference_version + 3
    parallel = engine.vllm_config.parallel_config
    before = await engine.checksums()
    await engine.offload_states(2)
    await engine.load_states()
    workers = (await engine.state()).workers
    assert [worker.weights for worker in workers] == [WeightsStatus.DESTROYED] * 2
    with pytest.raises(WeightsNotReadyError, match="level 2"):
        await asyncio.wait_for(engine.complete([1, 2, 3], max_tokens=2), 10)
    await trainer.push(engine, version)
    await assert_ranks_hold(engine, trainer, version)
    for rank, (old, new) in enumerate(zip(before, await engine.checksums(), strict=True)):
        sizes = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        buffers = old.keys() - share_of_rank(trainer, version, rank, *sizes)
        assert buffers, f"no buffers on rank {rank}"
        assert {name: old[name] for name in buffers} == {name: new[name] for name in buffers}, f"rank {rank}"


@memory_freed
@pytest.mark.parametrize("level", [1, 2])
async def test_every_rank_returns_its_memory(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device, level: int
) -> None:
    # One cycle first: a KV cache that was never touched is not in memory, and cannot leave it.
    await vllm_engine.offload_states(level)
    await vllm_engine.load_states()
    await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version)
    await vllm_engine.greedy([[1, 2, 3]], 4)
    workers = (await vllm_engine.state()).workers
    before = [memory_held([worker.pid], vllm_device.kind) for worker in workers]
    await vllm_engine.offload_states(level)
    for worker, held in zip(workers, before, strict=True):
        wanted = sum(worker.resident_bytes[tag] for tag in tags_after(set(), f"sleep {level}", vllm_device.kind))
        assert wanted > 8 * MiB, "too little memory is at stake to be measured"
        freed = held - memory_held([worker.pid], vllm_device.kind)
        assert freed >= 0.9 * wanted, f"rank {worker.rank}: {freed / MiB:.0f} of {wanted / MiB:.0f} MiB came back"


barrier = contract(
    "abort-is-a-barrier",
    "When abort_all returns, no request is left in the frontend or the scheduler, and sleeping at once is safe.",
    references=("vllm-project/vllm#27901", "vllm-project/vllm#28714", "NovaSky-AI/SkyRL#428"),
)


@barrier
async def test_nothing_runs_after_abort_all(vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
    await assert_barrier(vllm_engine, prompts, rounds=20)


async def assert_barrier(engine: EngineHandle, prompts: list[list[int]], rounds: int) -> None:
    draw = random.Random(4)
    said = await engine.greedy(prompts[:2], 4)
    for number in range(rounds):
        calls = [
            asyncio.ensure_future(engine.complete(prompts[i % 12], temperature=0.0, max_tokens=900)) for i in range(16)
        ]
        while engine.unfinished_requests()["requests"] < len(calls):
            await asyncio.sleep(0.005)
        await asyncio.sleep(draw.choice([0, 0, 0.01, 0.1]))
        await engine.abort_all()
        left = engine.unfinished_requests()
        assert left == {"requests": 0, "parents": 0}, f"round {number}: abort_all came back, and left {left}"
        if number % 2:
            assert await engine.reset_prefix_cache(), f"round {number}: the scheduler still holds blocks"
        await engine.offload_states(1)
        outputs = await asyncio.wait_for(asyncio.gather(*calls), 10)
        assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
        await engine.load_states()
        assert await engine.greedy(prompts[:2], 4) == said


@ordered
async def test_results_come_in_rank_order(vllm_engine: EngineHandle) -> None:
    await assert_rank_order(vllm_engine)


@ordered
async def test_one_ranks_error_is_raised(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    await assert_error_of_one_rank(vllm_engine, vllm_trainer)


@ordered
async def test_timeout_is_kept(vllm_engine: EngineHandle) -> None:
    await assert_timeout_kept(vllm_engine)


@pytest.mark.parametrize(
    "vllm_executor",
    # Before, vLLM has no pipelines under its multiprocessing executor.
    [
        pytest.param("mp", marks=pytest.mark.vllm_version(">=0.10")),
        pytest.param("ray", marks=pytest.mark.vllm_generation("V1")),
    ],
    indirect=True,
)
class TestStages:
    """The same on the ranks of a pipeline, each of which holds other layers."""

    @pytest.fixture
    def vllm_engine_args(
        self, vllm_engine_args: dict[str, Any], vllm_executor_args: Callable[[int], dict[str, Any]]
    ) -> dict[str, Any]:
        return {**vllm_engine_args, "tensor_parallel_size": 1, "pipeline_parallel_size": 2, **vllm_executor_args(2)}

    @all_ranks
    @pytest.mark.parametrize("transport", TRANSPORTS)
    async def test_every_stage_has_its_layers(
        self, vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]], transport: str
    ) -> None:
        for version in (vllm_trainer.reference_version + 1, vllm_trainer.reference_version + 2):
            await vllm_trainer.push(vllm_engine, version, transport=transport)
            await assert_ranks_hold(vllm_engine, vllm_trainer, version)
            # Many at once, so that several batches are under way.
            said = await vllm_engine.greedy(prompts, 6)
            assert said == [vllm_trainer.expected(prompt, 6, version) for prompt in prompts]

    @requires_reload
    async def test_level_2_empties_every_stage(self, vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
        await assert_emptied_and_reloaded(vllm_engine, vllm_trainer)

    @barrier
    async def test_nothing_runs_in_any_stage(self, vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
        await assert_barrier(vllm_engine, prompts, rounds=10)

    @no_orphans
    def test_shutdown_leaves_nothing(self, last_engine: EngineHandle, vllm_engine_pool: EnginePool) -> None:
        """Of an engine that has generated."""
        last_engine.run(last_engine.greedy([[1, 2, 3]], 2))
        family = processes_of(last_engine)
        assert len(family) >= 2
        vllm_engine_pool.drop(last_engine)
        assert_gone(family, "shutdown")


@died
async def test_worker_dies_while_it_generates(last_engine: EngineHandle, vllm_engine_pool: EnginePool) -> None:
    family = processes_of(last_engine)
    last = (await pids(last_engine))[-1]
    calls = [asyncio.ensure_future(last_engine.complete([number], max_tokens=900)) for number in range(4)]
    while last_engine.unfinished_requests()["requests"] < len(calls):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    assert not any(call.done() for call in calls)
    os.kill(last, signal.SIGKILL)
    await assert_dead(last_engine, 1, last, calls)
    vllm_engine_pool.drop(last_engine)
    assert_gone(family, "shutdown")
