"""Every request ends once, in order, with the tokens that were sampled."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model


@contract(
    "gen-one-terminal-output",
    "Of N submitted requests each ends in exactly one finished output, complete and within its token budget.",
    references=("vllm-project/vllm#24029", "vllm-project/vllm#16863"),
)
async def test_every_request_ends_exactly_once(vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
    draw = random.Random(0)

    async def one(number: int) -> tuple[list[Any], int, int]:
        n, budget = draw.choice([1, 1, 1, 2, 4]), draw.randint(1, 12)
        stream = vllm_engine.stream(
            prompts[number % len(prompts)], request_id=f"one-{number}", n=n, max_tokens=budget, temperature=0.9
        )
        return [output async for output in stream], n, budget

    results = await asyncio.wait_for(asyncio.gather(*map(one, range(256))), 120)
    for number, (outputs, n, budget) in enumerate(results):
        assert [output.finished for output in outputs].count(True) == 1
        assert outputs[-1].finished
        assert {output.request_id for output in outputs} == {f"one-{number}"}
        final = {c.index: c for output in outputs for c in output.outputs if c.finish_reason is not None}
        assert sorted(final) == list(range(n))
        for completion in final.values():
            assert completion.finish_reason in ("stop", "length", "abort")
            assert 0 < len(completion.token_ids) <= budget
    assert vllm_engine.unfinished_requests() == {"requests": 0, "parents": 0}


@contract(
    "gen-n-by-output-kind",
    "For every n and output kind the completions are 0 to n-1, and deltas, cumulative and final outputs agree.",
    references=("vllm-project/vllm#16863", "vllm-project/vllm#21948"),
)
@pytest.mark.parametrize("n", [1, 2, 8])
async def test_output_kinds_agree(vllm_engine: EngineHandle, n: int) -> None:
    from vllm.sampling_params import RequestOutputKind

    async def run(kind: RequestOutputKind) -> dict[int, list[int]]:
        tokens: dict[int, list[int]] = {}
        # So hot that the children of one request differ, whatever the model.
        sampling = {"n": n, "seed": 11, "temperature": 500.0, "max_tokens": 10, "output_kind": kind}
        async for output in vllm_engine.stream([3, 1, 4, 1, 5], **sampling):
            for completion in output.outputs:
                fresh = list(completion.token_ids)
                known = tokens.get(completion.index, [])
                tokens[completion.index] = known + fresh if kind is RequestOutputKind.DELTA else fresh
        return tokens

    cumulative, delta, final = [
        await run(kind)
        for kind in (RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY)
    ]
    assert sorted(final) == list(range(n))
    assert all(len(tokens) == 10 for tokens in final.values())
    assert len({tuple(tokens) for tokens in final.values()}) == n, "the children of one request repeat each other"
    assert delta == final
    assert cumulative == final


@contract(
    "gen-token-ids-verbatim",
    "Prompt token ids come back unchanged, and output token ids are the sampled ones, never text encoded again.",
    references=("sgl-project/sglang#26555",),
)
async def test_token_ids_come_back_as_they_are(vllm_engine: EngineHandle, vllm_model: Model) -> None:
    draw = random.Random(1)
    # Any ids at all, special ones and ones that no text encodes to included.
    for length in (1, 2, 17, 100):
        turn = [draw.randrange(vllm_model.vocab_size) for _ in range(length)]
        for _ in range(2):
            output = await vllm_engine.complete(turn, temperature=0.0, max_tokens=5, logprobs=0)
            assert list(output.prompt_token_ids) == turn
            completion = output.outputs[0]
            # With logprobs=0 each row holds the sampled token and no other.
            assert [list(row) for row in completion.logprobs] == [[token] for token in completion.token_ids]
            turn = turn + list(completion.token_ids)
