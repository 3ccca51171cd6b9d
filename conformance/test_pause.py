"""A pause holds new requests back, and does to the running ones what was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from conformance.oracles import answers, assert_says, completed, ended, forward_passes
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import ConfigurationError, EngineDiedError, UnsupportedFeatureError

paused = contract(
    "pause-modes",
    "A pause holds new requests back until the resume; running ones return what they have (abort), finish first "
    "(wait), or stand still and go on after it as if nothing had been (keep).",
    references=(
        "vllm-project/vllm#28037",
        "vllm-project/vllm#32103",
        "vllm-project/vllm#34382",
        "NovaSky-AI/SkyRL#1179",
    ),
    needs=("pause", "pause.keep", "runtime"),
)

#: Long enough that a pause meets a request in the middle.
TOKENS = 100


@dataclass
class Running:
    """Greedy requests that run, and the tokens that each of them has returned so far."""

    calls: list[asyncio.Task[Any]]
    tokens: list[list[int]]

    async def end(self) -> list[Any]:
        """The last output of each."""
        outputs = await ended(self.calls, 60, "requests")
        assert not [output for output in outputs if isinstance(output, BaseException)], outputs
        return outputs

    async def stand_still(self, engine: EngineHandle) -> None:
        """Nothing is generated, and the engine does not even try."""
        await asyncio.sleep(0.2)  # for the step that ran when the pause came
        before, (passes, _) = [list(tokens) for tokens in self.tokens], await forward_passes(engine)
        await asyncio.sleep(1)
        assert self.tokens == before, "tokens were generated during the pause"
        assert (await forward_passes(engine))[0] == passes, "the model ran during the pause"
        assert not any(call.done() for call in self.calls), "a request ended during the pause"
        assert all(len(tokens) < TOKENS for tokens in self.tokens), "the requests had ended before the pause"


async def begin(engine: EngineHandle, prompts: Sequence[list[int]], names: Sequence[str | None] = ()) -> Running:
    """Start a request for each prompt, and wait until each has its first token."""
    tokens: list[list[int]] = [[] for _ in prompts]

    async def follow(number: int) -> Any:
        output = None
        name = names[number] if names else None
        async for output in engine.stream(prompts[number], request_id=name, temperature=0.0, max_tokens=TOKENS):
            tokens[number] = list(output.outputs[0].token_ids)
        return output

    running = Running([asyncio.ensure_future(follow(number)) for number in range(len(prompts))], tokens)
    while not all(tokens):
        assert not any(call.done() for call in running.calls), "a request ended before its first token"
        await asyncio.sleep(0.005)
    return running


async def waits(engine: EngineHandle, prompt: list[int]) -> asyncio.Task[Any]:
    """A request that comes during the pause, and after a while is neither answered nor in the engine."""
    before = engine.unfinished_requests()
    call = asyncio.ensure_future(engine.complete(prompt, temperature=0.0, max_tokens=4))
    await asyncio.sleep(0.3)
    assert not call.done(), "a request was answered during the pause"
    assert engine.unfinished_requests() == before, "a request was let into the engine during the pause"
    return call


def reasons(outputs: Sequence[Any]) -> list[str]:
    return [output.outputs[0].finish_reason for output in outputs]


@pytest.fixture
def whole(
    vllm_engine: EngineHandle,
    vllm_model: Model,
    vllm_trainer: Trainer,
    continuous_trainer: Trainer,
    prompts: list[list[int]],
) -> list[list[int]]:
    """The uninterrupted answers to the first four prompts, under weights whose answers depend on all of the context.

    In a dtype that rounds such answers may not be compared, and the model's own weights stay.
    """
    trainer = continuous_trainer if vllm_model.dtype == "float32" else vllm_trainer

    async def ask() -> list[list[int]]:
        await trainer.push(vllm_engine, trainer.reference_version)
        said = await answers(vllm_engine, trainer, prompts[:4], TOKENS)
        await vllm_engine.reset_prefix_cache()
        return said

    return vllm_engine.run(ask())


@paused
async def test_abort(vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
    running = await begin(vllm_engine, prompts[:4])
    await vllm_engine.pause_generation("abort")
    assert await vllm_engine.is_paused()
    assert (await vllm_engine.state()).paused
    outputs = await running.end()
    assert reasons(outputs) == ["abort"] * 4
    assert all(0 < len(output.outputs[0].token_ids) < TOKENS for output in outputs)
    late = await waits(vllm_engine, prompts[4])
    await vllm_engine.resume_generation()
    assert not await vllm_engine.is_paused()
    assert reasons(await ended([late], 30, "requests")) == ["length"]


@paused
async def test_wait(vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
    running = await begin(vllm_engine, prompts[:4])
    pause = asyncio.ensure_future(vllm_engine.pause_generation("wait"))
    while not await vllm_engine.is_paused():
        await asyncio.sleep(0.005)
    late = asyncio.ensure_future(vllm_engine.complete(prompts[4], temperature=0.0, max_tokens=4))
    assert await ended([pause], 60, "pauses") == [None]
    outputs = await running.end()
    assert reasons(outputs) == ["length"] * 4
    assert [len(output.outputs[0].token_ids) for output in outputs] == [TOKENS] * 4
    await asyncio.sleep(0.3)
    assert not late.done(), "a request was answered during the pause"
    assert vllm_engine.unfinished_requests()["requests"] == 0, "a request was let into the engine during the pause"
    await vllm_engine.resume_generation()
    assert reasons(await ended([late], 30, "requests")) == ["length"]


@paused
async def test_keep(vllm_engine: EngineHandle, prompts: list[list[int]], whole: list[list[int]]) -> None:
    running = await begin(vllm_engine, prompts[:4])
    for _ in range(2):
        await vllm_engine.pause_generation("keep")
        await running.stand_still(vllm_engine)
    late = await waits(vllm_engine, prompts[0])
    await vllm_engine.resume_generation()
    outputs = await running.end()
    assert [list(output.outputs[0].token_ids) for output in outputs] == whole, "the pause changed an answer"
    assert list((await late).outputs[0].token_ids) == whole[0][:4]


@paused
async def test_kept_requests_can_be_aborted(
    vllm_engine: EngineHandle, prompts: list[list[int]], whole: list[list[int]]
) -> None:
    names = [f"kept-{number}" for number in range(4)]
    running = await begin(vllm_engine, prompts[:4], names)
    await vllm_engine.pause_generation("keep")
    await vllm_engine.abort(names[:2])
    first = await ended(running.calls[:2], 5, "requests")
    assert reasons(first) == ["abort"] * 2
    for output, answer in zip(first, whole, strict=False):
        tokens = list(output.outputs[0].token_ids)
        assert tokens == answer[: len(tokens)] != [], "what was generated before the pause is lost"
    assert not any(call.done() for call in running.calls[2:])
    await vllm_engine.resume_generation()
    assert [list(output.outputs[0].token_ids) for output in (await running.end())[2:]] == whole[2:]
    assert await vllm_engine.reset_prefix_cache(), "the scheduler still holds blocks"


@paused
async def test_second_pause(vllm_engine: EngineHandle, prompts: list[list[int]], whole: list[list[int]]) -> None:
    """The next mode applies to what is still there, and one resume is enough."""
    for second, reason in (("abort", "abort"), ("wait", "length")):
        running = await begin(vllm_engine, prompts[:4])
        await vllm_engine.pause_generation("keep")
        await vllm_engine.pause_generation(second)
        outputs = await running.end()
        assert reasons(outputs) == [reason] * 4
        for output, answer in zip(outputs, whole, strict=True):
            tokens = list(output.outputs[0].token_ids)
            assert tokens == answer[: len(tokens)]
        assert await vllm_engine.is_paused()
        await vllm_engine.resume_generation()
        await vllm_engine.resume_generation()
        assert reasons([await vllm_engine.complete(prompts[4], max_tokens=2)]) == ["length"]


@paused
async def test_sleep_and_update(vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]]) -> None:
    """Both are possible during a pause, end what it kept, and do not end the pause."""
    version = vllm_trainer.reference_version + 1
    running = await begin(vllm_engine, prompts[:4])
    await vllm_engine.pause_generation("keep")
    with pytest.raises(ConfigurationError, match="resume_generation"):  # it would wait for ever
        await vllm_trainer.push(vllm_engine, version, running="wait")
    assert not any(call.done() for call in running.calls)
    await vllm_engine.offload_states(1)
    outputs = await running.end()
    assert reasons(outputs) == ["abort"] * 4
    assert all(output.outputs[0].token_ids for output in outputs)
    await vllm_engine.load_states()
    await waits(vllm_engine, prompts[4])
    await vllm_trainer.push(vllm_engine, version)
    late = await waits(vllm_engine, prompts[5])
    await vllm_engine.resume_generation()
    assert (await late).weight_version == vllm_engine.weight_version
    await assert_says(vllm_engine, vllm_trainer, version)


@paused
async def test_cancelled_pause_is_none(vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
    running = await begin(vllm_engine, prompts[:4])
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(vllm_engine.pause_generation("wait"), 0.05)
    while await vllm_engine.is_paused():
        await asyncio.sleep(0.005)
    late = await vllm_engine.complete(prompts[4], temperature=0.0, max_tokens=2)
    assert reasons([late, *await running.end()]) == ["length"] * 5


@paused
async def test_arguments(vllm_engine: EngineHandle) -> None:
    """vLLM's own words for the modes, the cache, and what contradicts itself."""
    prompt = [number % 200 for number in range(300)]
    for arguments, cached in (
        ({"wait_for_inflight_requests": True}, False),
        ({"wait_for_inflight_requests": False, "clear_cache": True}, False),
        ({"clear_cache": False}, True),
        ({"mode": "keep"}, True),
    ):
        await vllm_engine.complete(prompt, max_tokens=1)
        await vllm_engine.pause_generation(**arguments)
        await vllm_engine.resume_generation()
        _, found = await completed(vllm_engine, prompt, max_tokens=1)
        assert (found > 0) == cached, f"{arguments}: {found} tokens came from the cache"
    for wrong in (
        {"mode": "stop"},
        {"mode": "keep", "clear_cache": True},
        {"mode": "keep", "wait_for_inflight_requests": True},
        {"mode": "abort", "wait_for_inflight_requests": True},
    ):
        with pytest.raises(ConfigurationError):
            await vllm_engine.pause_generation(**wrong)
        assert not await vllm_engine.is_paused()


@paused
@pytest.mark.vllm_on_request("executors")
async def test_shutdown_ends_the_wait(
    vllm_engine_factory: Callable[..., EngineHandle], vllm_trainer: Trainer, prompts: list[list[int]]
) -> None:
    engine = vllm_engine_factory(worker_name="paused")
    await vllm_trainer.push(engine, vllm_trainer.reference_version)
    running = await begin(engine, prompts[:2])
    await engine.pause_generation("keep")
    late = await waits(engine, prompts[3])
    await engine._call(engine.target.shutdown)
    for error in await ended([*running.calls, late], 10, "requests"):
        assert isinstance(error, EngineDiedError), f"a request of an engine that was shut down got {error!r}"


@contract(
    "cf-dp-pause-consistent",
    "An engine of several data-parallel replicas answers for all of them, and pauses all; one that cannot do that is "
    "refused at once, with the remedy.",
    references=("vllm-project/vllm#39366", "vllm-project/vllm#55229", "PrimeIntellect-ai/prime-rl#2099"),
    needs=("pause", "runtime"),
)
async def test_replicas_are_paused_together_or_refused(
    vllm_engine_factory: Callable[..., EngineHandle], vllm_trainer: Trainer, prompts: list[list[int]]
) -> None:
    try:
        engine = vllm_engine_factory(worker_name="replicas", data_parallel_size=2)
    except UnsupportedFeatureError as refusal:
        if "data_parallel_size" in str(refusal) and "one engine for each replica" in str(refusal):
            return
        raise
    workers = (await engine.state()).workers
    assert len({worker.pid for worker in workers}) == 2, "one replica answers for both"
    await vllm_trainer.push(engine, vllm_trainer.reference_version)
    running = await begin(engine, prompts[:8])
    for _ in range(3):
        await engine.pause_generation("keep")
        await running.stand_still(engine)
        await engine.resume_generation()
    assert reasons(await running.end()) == ["length"] * 8
