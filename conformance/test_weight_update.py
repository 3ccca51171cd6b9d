"""A weight update is complete and exact, or loudly failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from conformance.oracles import TRANSPORTS, answers, assert_holds, assert_parity, assert_says, completed, refusal
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender, WeightsNotReadyError, WeightsStatus, WeightUpdateError

if TYPE_CHECKING:
    import torch


@contract(
    "wu-a-b-a",
    "Weights A, then B, then A again: B answers otherwise, and A answers and checks as before, by every transport.",
    references=("vllm-project/vllm#32718", "huggingface/trl#5312"),
    needs=("update", "checksum"),
)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_there_and_back(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]], transport: str
) -> None:
    a = vllm_trainer.reference_version
    said, sums = await answers(vllm_engine, vllm_trainer, prompts, 12), await vllm_engine.checksums()
    await assert_holds(vllm_engine, vllm_trainer, a)
    await vllm_trainer.push(vllm_engine, a + 4, transport=transport)
    await assert_holds(vllm_engine, vllm_trainer, a + 4)
    other = await answers(vllm_engine, vllm_trainer, prompts, 12)
    different = sum(one != two for one, two in zip(said, other, strict=True))
    assert different >= 0.9 * len(prompts), f"only {different} of {len(prompts)} answers changed with the weights"
    await vllm_trainer.push(vllm_engine, a, transport=transport)
    assert await answers(vllm_engine, vllm_trainer, prompts, 12) == said
    assert await vllm_engine.checksums() == sums


every_parameter = contract(
    "wu-every-parameter-reached",
    "A full update moves every parameter; a tensor that matches nothing and a parameter that nothing reached "
    "are errors; a tied head follows its embeddings.",
    references=("vllm-project/vllm#48312", "PrimeIntellect-ai/prime-rl#2714", "Tencent-Hunyuan/UniRL#166"),
    needs=("update", "checksum"),
)


@every_parameter
async def test_every_parameter_moves(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    version = vllm_trainer.reference_version
    before = (await vllm_engine.checksums())[0]
    await vllm_trainer.push(vllm_engine, version + 2)
    after = (await vllm_engine.checksums())[0]
    parameters = vllm_trainer.engine_tensors(version)
    stale = [name for name in parameters if before[name] == after[name]]
    assert not stale, f"these parameters did not move: {stale}"
    await assert_holds(vllm_engine, vllm_trainer, version + 2)


@every_parameter
@pytest.mark.vllm_needs("update.checked", "state")
@pytest.mark.parametrize("mistake", ["renamed", "missing", "extra"])
async def test_mismatched_names_are_errors(vllm_engine: EngineHandle, vllm_trainer: Trainer, mistake: str) -> None:
    weights = vllm_trainer.weights(vllm_trainer.reference_version + 1)
    victim = sorted(weights)[len(weights) // 2]
    tensor = weights[victim]
    if mistake != "extra":
        del weights[victim]
    if mistake != "missing":
        weights[f"{victim}_unknown"] = tensor
    named = victim.rpartition(".")[2] if mistake == "missing" else "_unknown"
    with pytest.raises(refusal(vllm_engine), match=named):
        await vllm_engine.update(weights)
    assert (await vllm_engine.state()).weights is not WeightsStatus.COMPLETE
    await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version)
    await assert_holds(vllm_engine, vllm_trainer, vllm_trainer.reference_version)


class TestTied:
    """The same on a model that ties its head to its embeddings."""

    @pytest.fixture
    def vllm_model(self, vllm_model_factory: Callable[[str], Model]) -> Model:
        return vllm_model_factory("counting-tied")

    @every_parameter
    @pytest.mark.vllm_engine_key("counting-tied")
    @pytest.mark.parametrize("send_head", [False, True], ids=["without head", "with head"])
    async def test_tied_head_follows(self, vllm_engine: EngineHandle, vllm_trainer: Trainer, send_head: bool) -> None:
        version = vllm_trainer.reference_version + 3
        weights = vllm_trainer.weights(version)
        if send_head:
            weights = {"lm_head.weight": weights["model.embed_tokens.weight"].clone(), **weights}
        await vllm_engine.update(weights)
        await assert_holds(vllm_engine, vllm_trainer, version)

    @every_parameter
    @pytest.mark.vllm_needs("update.checked")
    @pytest.mark.vllm_engine_key("counting-tied")
    async def test_contradicting_head_is_an_error(self, vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
        weights = vllm_trainer.weights(vllm_trainer.reference_version)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
        with pytest.raises(refusal(vllm_engine), match="tie"):
            await vllm_engine.update(weights)


def splits(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, list[dict[str, torch.Tensor]]]]:
    """The same weights in calls that differ in size, order and where a fused parameter is cut."""
    names = sorted(weights)
    yield "one tensor a call", [{name: weights[name]} for name in names]
    yield "reversed", [{name: weights[name] for name in reversed(names)}]
    fused = [name for name in names if ".k_proj." in name or ".gate_proj." in name]
    yield (
        "cut inside q/k/v and gate/up",
        [{n: weights[n] for n in fused}, {n: weights[n] for n in names if n not in fused}],
    )


repeats = contract(
    "wu-repeat-and-split-invariant",
    "Loading the same weights again, and in any split and order, always gives the same parameters and answers.",
    references=("vllm-project/vllm#42821", "NovaSky-AI/SkyRL#1680", "verl-project/verl#7904"),
    needs=("update", "checksum"),
)


@repeats
async def test_repeats_agree(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    version = vllm_trainer.reference_version
    sums = await vllm_engine.checksums()
    for round_number in range(5):
        # Other weights in between, so that a load which does nothing cannot pass.
        await vllm_trainer.push(vllm_engine, version + 1 + round_number)
        await vllm_trainer.push(vllm_engine, version)
        assert await vllm_engine.checksums() == sums, f"round {round_number + 1} gave other parameters"
    # The checkpoint's order is any: a dictionary from a trainer is in the order of its modules.
    await vllm_trainer.push(vllm_engine, version + 1)
    await vllm_engine.update(dict(reversed(vllm_trainer.weights(version).items())))
    assert await vllm_engine.checksums() == sums, "the reversed order gave other parameters"
    await assert_says(vllm_engine, vllm_trainer, version)


@repeats
@pytest.mark.vllm_needs("runtime")
async def test_splits_agree(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    version = vllm_trainer.reference_version
    weights = vllm_trainer.weights(version)
    sums = await vllm_engine.checksums()
    for name, calls in splits(weights):
        await vllm_trainer.push(vllm_engine, version + 1)
        async with vllm_engine.weight_update() as update:
            for call in calls:
                await update.send(call)
        assert await vllm_engine.checksums() == sums, f"split '{name}' gave other parameters"
    largest = max(tensor.nbytes for tensor in weights.values())
    for bucket_bytes in (1024, largest, 8 * largest):
        await vllm_trainer.push(vllm_engine, version + 1)
        with BucketSender(bucket_bytes) as sender:
            for payload in sender.payloads(weights):
                await vllm_engine.update_parameter_in_bucket([payload])
        assert await vllm_engine.checksums() == sums, f"buckets of {bucket_bytes} bytes gave other parameters"
    await assert_says(vllm_engine, vllm_trainer, version)


@contract(
    "wu-invalidates-prefix-cache",
    "After an update a prompt that was cached under the old weights is computed anew.",
    references=("vllm-project/vllm#9744", "NVIDIA-NeMo/RL#4018"),
    needs=("update",),
)
async def test_no_stale_prefix(vllm_engine: EngineHandle, continuous_trainer: Trainer) -> None:
    version = continuous_trainer.reference_version
    size = continuous_trainer.model.vocab_size
    prompt = [(5 * i + i * i) % size for i in range(512)]
    await continuous_trainer.push(vllm_engine, version)
    await vllm_engine.complete(prompt, temperature=0.0, max_tokens=1)
    _, cached = await completed(vllm_engine, prompt, temperature=0.0, max_tokens=1)
    assert cached >= 256, "the prefix cache does not work at all, so this test would prove nothing"
    await continuous_trainer.push(vllm_engine, version + 1)
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 4, "logprobs": 5}
    first, cached = await completed(vllm_engine, prompt, **sampling)
    assert cached == 0, f"{cached} tokens came from the old weights' cache"
    if "cache.reset" in vllm_engine.supported:
        await vllm_engine.reset_prefix_cache()
        cold = await vllm_engine.complete(prompt, **sampling)
        assert first.outputs[0].logprobs == cold.outputs[0].logprobs, "the first answer is not that of a cold engine"
    await assert_parity(vllm_engine, continuous_trainer, version + 1, [prompt], max_tokens=8)


@contract(
    "wu-cache-reset-not-ignored",
    "A prefix cache that cannot be emptied, because a request runs, is reported as such; once it has ended it can.",
    references=("vllm-project/vllm#28827", "NVIDIA-NeMo/RL#3839"),
    needs=("abort", "cache.reset"),
)
async def test_refused_reset_is_reported(vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
    running = asyncio.Event()

    async def generate() -> None:
        async for _ in vllm_engine.stream(prompts[3], request_id="busy", temperature=0.0, max_tokens=900):
            running.set()

    call = asyncio.ensure_future(generate())
    await asyncio.wait_for(running.wait(), 60)
    assert await vllm_engine.reset_prefix_cache() is False, "the cache is in use, and the engine says that it is empty"
    await vllm_engine.abort("busy")
    await asyncio.wait_for(call, 10)
    assert await vllm_engine.reset_prefix_cache() is True


@contract(
    "wu-while-asleep",
    "An update sent to a sleeping engine wakes the weights first; it is neither lost nor a crash.",
    references=("vllm-project/vllm#57853",),
    needs=("update", "sleep", "sleep.level2", "state"),
)
@pytest.mark.parametrize("level", [1, 2])
async def test_update_while_asleep(vllm_engine: EngineHandle, vllm_trainer: Trainer, level: int) -> None:
    version = vllm_trainer.reference_version + 5
    await vllm_engine.sleep(level)
    await vllm_trainer.push(vllm_engine, version)
    state = await vllm_engine.state()
    assert state.sleeping == {"kv_cache"}, "the weights must be awake after an update, the KV cache still asleep"
    await vllm_engine.wake_up()
    await assert_holds(vllm_engine, vllm_trainer, version)


fail_closed = contract(
    "wu-versioned-and-fail-closed",
    "A complete update raises the weight version by one, outputs carry it; a failed one leaves the engine "
    "inconsistent, and it refuses to generate until a complete one.",
    references=("vllm-project/vllm#49040", "vllm-project/vllm#48312"),
    needs=("runtime",),
)


@fail_closed
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_version_counts_updates(vllm_engine: EngineHandle, vllm_trainer: Trainer, transport: str) -> None:
    start = vllm_engine.weight_version
    for step in (1, 2, 3):
        await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version + step, transport=transport)
        assert vllm_engine.weight_version == start + step
        assert (await vllm_engine.complete([1, 2, 3], max_tokens=2)).weight_version == start + step


@fail_closed
async def test_nothing_is_written_beside_a_cache_in_use(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: Any, **__: Any) -> bool:
        return False

    version, sums = vllm_engine.weight_version, await vllm_engine.checksums()
    monkeypatch.setattr(vllm_engine.engine, "_reset_prefix_cache", refused)
    with pytest.raises(WeightUpdateError, match="prefix cache could not be emptied"):
        await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version + 1)
    monkeypatch.undo()
    assert await vllm_engine.checksums() == sums
    assert vllm_engine.weight_version == version
    assert (await vllm_engine.state()).weights is WeightsStatus.COMPLETE
    await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version + 1)
    await assert_holds(vllm_engine, vllm_trainer, vllm_trainer.reference_version + 1)


@fail_closed
@pytest.mark.parametrize("failure", ["shape", "dtype", "exception", "incomplete"])
async def test_failed_update_refuses_generation(vllm_engine: EngineHandle, vllm_trainer: Trainer, failure: str) -> None:
    import torch

    start = vllm_engine.weight_version
    weights = vllm_trainer.weights(vllm_trainer.reference_version + 1)
    names = list(weights)
    first = {name: weights[name] for name in names[: len(names) // 2]}
    rest = {name: weights[name] for name in names[len(names) // 2 :]}
    victim = next(iter(rest))
    if failure == "shape":
        rest[victim] = torch.cat([rest[victim], rest[victim]])
    elif failure == "dtype":
        rest[victim] = rest[victim].to(torch.float64)
    elif failure == "incomplete":
        del rest[victim]

    async def failing_update() -> None:
        async with vllm_engine.weight_update() as update:
            await update.send(first)
            if failure == "exception":
                raise ZeroDivisionError
            await update.send(rest)

    with pytest.raises(ZeroDivisionError if failure == "exception" else WeightUpdateError):
        await failing_update()
    state = await vllm_engine.state()
    assert state.weights is WeightsStatus.INCONSISTENT
    assert vllm_engine.weight_version == start
    with pytest.raises(WeightsNotReadyError, match="did not complete"):
        await asyncio.wait_for(vllm_engine.complete([1, 2, 3], max_tokens=2), 10)
    await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version)
    assert vllm_engine.weight_version == start + 1
    await assert_holds(vllm_engine, vllm_trainer, vllm_trainer.reference_version)
