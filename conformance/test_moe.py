"""Weights that are more than copies: experts, what is computed from weights, and a second model beside the first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance.oracles import (
    Fresh,
    assert_holds,
    assert_parity,
    assert_says,
    assert_updated_is_as_fresh,
    poison,
    started_on,
)
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle, EnginePool
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender, UnsupportedFeatureError, WeightUpdateError
from roll_vllm.devices import Device

if TYPE_CHECKING:
    import torch


@pytest.fixture(
    params=["counting-moe", pytest.param("counting-mixtral", marks=pytest.mark.vllm_on_request("executors"))]
)
def vllm_model(request: pytest.FixtureRequest, vllm_model_factory: Callable[[str], Model]) -> Model:
    """A model of experts; the second kind takes another engine, and runs on request."""
    return vllm_model_factory(request.param)


experts = contract(
    "wu-moe-loader-survives",
    "Experts can be loaded any number of times, in any split, after sleep and after vLLM's post-load step: each time "
    "their stacked weights are the trainer's, byte for byte, and the log-probabilities the reference's; a missing "
    "expert is an error.",
    references=("vllm-project/vllm#17429", "verl-project/verl#3840", "NVIDIA-NeMo/RL#275"),
    needs=("runtime",),
)


@experts
async def test_every_update_reaches_the_experts(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, continuous_trainer: Trainer, prompts: list[list[int]]
) -> None:
    version = vllm_trainer.reference_version
    stacked = [name for name in vllm_trainer.engine_tensors(version) if name.endswith(("w13_weight", "w2_weight"))]
    assert len(stacked) == 4, "two layers of experts are expected"
    for step in (1, 2):
        await continuous_trainer.push(vllm_engine, version + step)
        await assert_holds(vllm_engine, continuous_trainer, version + step)
        await assert_parity(vllm_engine, continuous_trainer, version + step, prompts[:4])
    for step in (3, 4):
        await vllm_trainer.push(vllm_engine, version + step)
        await assert_holds(vllm_engine, vllm_trainer, version + step)


@experts
async def test_experts_in_several_calls(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    version = vllm_trainer.reference_version + 1
    weights = vllm_trainer.weights(version)
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    for index, name in enumerate(reversed(weights)):
        halves[index % 2][name] = weights[name]
    async with vllm_engine.weight_update() as update:
        for half in halves:
            await update.send(half)
    await assert_holds(vllm_engine, vllm_trainer, version)


@experts
async def test_experts_after_the_post_load_step(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    version = vllm_trainer.reference_version
    for step in (1, 2):
        await vllm_engine.process_weights_after_loading()
        await assert_says(vllm_engine, vllm_trainer, version + step - 1)
        await vllm_trainer.push(vllm_engine, version + step)
        await assert_holds(vllm_engine, vllm_trainer, version + step)


@experts
async def test_experts_after_sleep(vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_device: Device) -> None:
    version = vllm_trainer.reference_version + 1
    await vllm_engine.offload_states(2)
    poison(vllm_device.kind)
    await vllm_trainer.push(vllm_engine, version)
    await vllm_engine.load_states()
    await assert_holds(vllm_engine, vllm_trainer, version)


@experts
async def test_a_missing_expert_is_an_error(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    weights = vllm_trainer.weights(vllm_trainer.reference_version + 1)
    victim = [name for name in weights if ".experts.2." in name][-1]
    del weights[victim]
    with pytest.raises(WeightUpdateError, match=r"experts\.w2_weight"):
        async with vllm_engine.weight_update() as update:
            await update.send(weights)


derived = contract(
    "wu-derived-and-graph-state",
    "An engine that was updated from A to B is one that was started on B: the same parameters, buffers, other tensors "
    "and answers, all at the addresses where they were before.",
    references=("vllm-project/vllm#44371", "vllm-project/vllm#48941", "vllm-project/vllm-ascend#5747"),
    needs=("runtime",),
)


@derived
async def test_an_update_moves_nothing(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    before = await vllm_engine.collective_rpc("roll_vllm_addresses")
    for step in (1, 2):
        await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version + step)
    after = await vllm_engine.collective_rpc("roll_vllm_addresses")
    assert after[0].keys() == before[0].keys()
    moved = [name for name in before[0] if before[0][name] != after[0][name]]
    assert not moved, f"whoever keeps the address of these reads what was there before: {moved[:5]}"


@pytest.fixture
def fresh(
    vllm_engine_pool: EnginePool,
    vllm_engine_creator: Callable[[dict[str, Any]], Callable[[], Any]],
    vllm_engine_args: dict[str, Any],
    continuous_trainer: Trainer,
    prompts: list[list[int]],
    tmp_path: Path,
) -> Fresh:
    return started_on(vllm_engine_pool, vllm_engine_creator, vllm_engine_args, continuous_trainer, prompts, tmp_path)


@derived
@pytest.mark.vllm_on_request("executors")  # what is always tested is a quantised model, in test_quantised
async def test_updated_is_as_fresh(
    fresh: Fresh, vllm_engine: EngineHandle, continuous_trainer: Trainer, prompts: list[list[int]]
) -> None:
    await assert_updated_is_as_fresh(vllm_engine, continuous_trainer, prompts, fresh)


async def bucket(engine: EngineHandle, trainer: Trainer) -> None:
    """The first bucket of a set, without a session."""
    with BucketSender() as sender:
        await engine.update_parameter_in_bucket([next(sender.payloads(trainer.weights(trainer.reference_version + 1)))])


drafter = contract(
    "wu-draft-follows",
    "An update of an engine that speculates with a drafter's weights is refused with an error that says so, and "
    "changes nothing; no drafter is left behind with weights of another version.",
    references=("verl-project/verl#6661", "vllm-project/vllm#46725"),
    needs=("runtime",),
)


@drafter
@pytest.mark.parametrize("session", [True, False], ids=["session", "bucket"])
async def test_no_drafter_is_left_behind(vllm_engine: EngineHandle, vllm_trainer: Trainer, session: bool) -> None:
    """The drafter is a stand-in with weights of its own, since no tested release can run one on a CPU."""
    start, version = vllm_engine.weight_version, vllm_trainer.reference_version
    await vllm_engine.collective_rpc("roll_vllm_stand_in_drafter", args=(True,))
    try:
        with pytest.raises(UnsupportedFeatureError, match=r"drafter.*speculative_config"):
            await (vllm_trainer.push(vllm_engine, version + 1) if session else bucket(vllm_engine, vllm_trainer))
        assert vllm_engine.weight_version == start
        await asyncio.wait_for(assert_holds(vllm_engine, vllm_trainer, version), 60)
    finally:
        await vllm_engine.collective_rpc("roll_vllm_stand_in_drafter", args=(False,))
    await vllm_trainer.push(vllm_engine, version + 1)
    await assert_holds(vllm_engine, vllm_trainer, version + 1)


@drafter
@pytest.mark.vllm_backend("cpu")
async def test_no_drafter_on_a_cpu(vllm_engine_factory: Callable[..., EngineHandle]) -> None:
    """No tested release can speculate there, and an engine that is to do so does not start."""
    with pytest.raises(UnsupportedFeatureError, match="leave speculative_config out"):
        vllm_engine_factory(speculative_config={"method": "eagle", "model": "a-drafter", "num_speculative_tokens": 2})
