"""Aborting ends the request, keeps what was generated, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any
from unittest.mock import patch

import pytest

from conformance.oracles import ended, pids, resident_bytes
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.trainer import Trainer

#: Far more than an engine generates before a test aborts it.
LONG: dict[str, Any] = {"max_tokens": 900, "temperature": 0.0}

unblocks = contract(
    "abort-unblocks-caller",
    "Every caller whose request is aborted gets one final output within two seconds.",
    references=("vllm-project/vllm#22197",),
    needs=("abort",),
)


@unblocks
@pytest.mark.vllm_needs("sleep")
async def test_aborted_while_asleep(vllm_engine: EngineHandle) -> None:
    await vllm_engine.sleep(1)
    call = asyncio.ensure_future(vllm_engine.complete([1, 2, 3], request_id="early", **LONG))
    await asyncio.sleep(0.2)
    assert not call.done()
    await vllm_engine.abort("early")
    output = await asyncio.wait_for(call, 2)
    assert output.finished
    assert [completion.finish_reason for completion in output.outputs] == ["abort"]
    assert not output.outputs[0].token_ids


@unblocks
async def test_aborted_callers_return(vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
    names = [f"unblock-{number}" for number in range(16)]
    calls = [
        asyncio.ensure_future(vllm_engine.complete(prompts[i % len(prompts)], request_id=name, **LONG))
        for i, name in enumerate(names)
    ]
    await asyncio.sleep(0.3)
    assert not any(call.done() for call in calls)
    await vllm_engine.abort(names)
    for output in await asyncio.wait_for(asyncio.gather(*calls), 2):
        assert output.finished
        assert output.outputs[0].finish_reason == "abort"


@contract(
    "abort-keeps-partial",
    "An aborted request returns the tokens it had, a prefix of the whole answer; a queued one returns none.",
    references=("verl-project/verl#4453", "NovaSky-AI/SkyRL#537", "sgl-project/sglang#11673"),
    needs=("abort.partial",),
)
async def test_partial_outputs_survive(
    vllm_engine: EngineHandle, vllm_engine_args: dict[str, Any], prompts: list[list[int]]
) -> None:
    from vllm.sampling_params import RequestOutputKind

    whole = (await vllm_engine.greedy([prompts[2]], 60))[0]
    seats = int(vllm_engine_args["max_num_seqs"])
    for seen in (2, 12):
        names = [f"partial-{seen}-{number}" for number in range(seats + 4)]
        streamed: set[int] = set()
        progress = asyncio.Event()

        async def one(
            number: int, names: list[str] = names, seen: int = seen, streamed: Any = streamed, progress: Any = progress
        ) -> Any:
            kind = [RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY][number % 2]
            last = None
            async for last in vllm_engine.stream(
                prompts[2], request_id=names[number], output_kind=kind, logprobs=0, **LONG
            ):
                if len(last.outputs[0].token_ids) >= seen:
                    streamed.add(number)
                if len(streamed) >= seats // 2:  # every second one streams, so all seats are taken
                    progress.set()
            return last

        calls = [asyncio.ensure_future(one(number)) for number in range(len(names))]
        # On a device the first log-probabilities compile a kernel.
        await asyncio.wait_for(progress.wait(), 120)
        await vllm_engine.abort(names)
        completions = [output.outputs[0] for output in await asyncio.wait_for(asyncio.gather(*calls), 5)]
        lengths = [len(completion.token_ids) for completion in completions]
        assert sorted(lengths)[:4] == [0, 0, 0, 0], "the requests without a seat cannot have tokens"
        assert all(lengths[:seats]), "a running request came back without its tokens"
        for completion in completions:
            tokens = list(completion.token_ids)[: len(whole)]
            assert tokens == whole[: len(tokens)], "the partial answer is not a prefix of the whole one"
            assert len(completion.logprobs) == len(completion.token_ids)


leaves_nothing = contract(
    "abort-leaves-no-state",
    "After many aborts and cancellations, also of n>1, neither the frontend nor the scheduler keeps anything.",
    references=("vllm-project/vllm#14326", "vllm-project/vllm#51629", "vllm-project/vllm#57062"),
    needs=("runtime",),
)


@leaves_nothing
async def test_walking_away_ends_the_request(vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
    stream: Any = vllm_engine.stream(prompts[1], request_id="left", **LONG)
    await anext(stream)
    await stream.aclose()
    assert vllm_engine.unfinished_requests() == {"requests": 0, "parents": 0}
    assert await vllm_engine.reset_prefix_cache(), "the scheduler still holds blocks"


@leaves_nothing
async def test_nothing_is_left(vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]]) -> None:
    draw = random.Random(2)

    async def rounds(count: int) -> None:
        for number in range(count):
            name, n = f"left-{draw.random()}", draw.choice([1, 8])
            sampling = {**LONG, "temperature": 1.0, "n": n}
            call = asyncio.ensure_future(vllm_engine.complete(prompts[number % 12], request_id=name, **sampling))
            await asyncio.sleep(draw.choice([0, 0, 0.001, 0.02]))
            if draw.random() < 0.5:
                call.cancel()
            elif n == 8 and draw.random() < 0.5:
                await vllm_engine.abort([f"{index}_{name}" for index in range(8)])
                await vllm_engine.abort(name)
            else:
                await vllm_engine.abort(name)
                call.cancel()
            results = await asyncio.gather(call, return_exceptions=True)
            errors = [one for one in results if isinstance(one, Exception)]
            assert not errors, f"n={n}: {errors}"

    await rounds(20)
    before = resident_bytes(await pids(vllm_engine))
    await rounds(100)
    await asyncio.sleep(0.2)
    assert vllm_engine.unfinished_requests() == {"requests": 0, "parents": 0}
    # The scheduler refuses to empty its cache while any request holds blocks.
    assert await vllm_engine.reset_prefix_cache(), "the scheduler still holds blocks"
    grown = resident_bytes(await pids(vllm_engine)) - before
    assert grown < 20 * 2**20, f"the engine grew by {grown / 2**20:.0f} MiB"


effective = contract(
    "abort-effective-or-loud",
    "An abort by the caller's own id ends the request; an id that matches nothing is reported and harmless, also when "
    "it is repeated; an error of vLLM's abort is raised.",
    references=("NovaSky-AI/SkyRL#1243", "NovaSky-AI/SkyRL#1250", "microsoft/agent-lightning#589"),
    needs=("abort", "runtime"),
)

#: Ids that callers may choose.
NAMES = ["1", "0_1", "a/b c", "\u00e9-\u4e16", "x" * 300]


async def abort(engine: EngineHandle, names: str | list[str]) -> list[str]:
    """The engine's own ``abort``, which says what it found."""
    found: list[str] = await engine._call(engine.engine.abort, names)
    return found


@effective
@pytest.mark.parametrize("n", [1, 3])
async def test_the_callers_id_is_enough(vllm_engine: EngineHandle, prompts: list[list[int]], n: int) -> None:
    sampling = {**LONG, "n": n, "temperature": 1.0}
    calls = [
        asyncio.ensure_future(vllm_engine.complete(prompts[i], request_id=name, **sampling))
        for i, name in enumerate(NAMES)
    ]
    bystander = asyncio.ensure_future(vllm_engine.complete(prompts[5], max_tokens=40, temperature=0.0))
    await asyncio.sleep(0.2)
    assert not any(call.done() for call in calls)
    for name, call in zip(NAMES, calls, strict=True):
        assert await abort(vllm_engine, name) == [name], f"the request {name[:20]!r} was not found"
        (output,) = await ended([call], 2, "aborted requests")
        assert output.request_id == name
        assert [completion.finish_reason for completion in output.outputs] == ["abort"] * n
    (output,) = await ended([bystander], 30, "other requests")
    assert output.outputs[0].finish_reason == "length", "an abort met somebody else's request"


@effective
async def test_unknown_ids_are_reported(
    vllm_engine: EngineHandle, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    runs = asyncio.ensure_future(vllm_engine.complete(prompts[1], request_id="runs", **LONG))
    other = asyncio.ensure_future(vllm_engine.complete(prompts[2], max_tokens=40, temperature=0.0))
    await asyncio.sleep(0.2)
    with caplog.at_level(logging.WARNING, "roll_vllm"):
        assert await abort(vllm_engine, ["nobody", "runs"]) == ["runs"]
        assert "'nobody'" in caplog.text
        assert "'runs'" not in caplog.text
        await runs
        for _ in range(2):
            assert await abort(vllm_engine, "runs") == []
        assert caplog.text.count("'runs'") == 2
        caplog.clear()
        # Whoever walks away, or is aborted twice before the output is taken, has done nothing wrong.
        stream: Any = vllm_engine.stream(prompts[3], **LONG)
        await anext(stream)
        await stream.aclose()
        gone = asyncio.ensure_future(vllm_engine.complete(prompts[3], **LONG))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await vllm_engine.abort_all()
        assert not caplog.records, caplog.text
    assert (await other).outputs[0].finish_reason in ("length", "abort")
    assert vllm_engine.unfinished_requests() == {"requests": 0, "parents": 0}


@effective
async def test_errors_of_the_abort_are_raised(vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
    def other_signature(self: Any, request_id: str, internal: bool) -> None:
        raise AssertionError("called with the arguments of no release")

    call = asyncio.ensure_future(vllm_engine.complete(prompts[1], request_id="stays", **LONG))
    await asyncio.sleep(0.2)
    with patch.object(vllm_engine.engine._vllm, "abort", other_signature), pytest.raises(TypeError, match="internal"):
        await abort(vllm_engine, "stays")
    assert not call.done()
    assert await abort(vllm_engine, "stays") == ["stays"]
    assert (await ended([call], 2, "aborted requests"))[0].outputs[0].finish_reason == "abort"
