"""Every request ends once, in order, with the tokens that were sampled."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable
from typing import Any

import pytest

from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer


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
    if "runtime" in vllm_engine.supported:
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


@contract(
    "gen-no-aliasing",
    "Neither an output that was handed out nor the caller's sampling parameters change afterwards.",
    references=("vllm-project/vllm#36405", "verl-project/verl#6364"),
)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["CUMULATIVE", "DELTA", "FINAL_ONLY"])
async def test_what_was_handed_out_stays(
    vllm_engine: EngineHandle, prompts: list[list[int]], kind: str, n: int
) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    def contents(output: Any) -> dict[str, Any]:
        return {**vars(output), "outputs": [vars(completion) for completion in output.outputs]}

    params = SamplingParams(
        n=n, seed=3, temperature=500.0, max_tokens=12, min_tokens=2, logprobs=1, ignore_eos=True,
        stop=["\u4e16"], output_kind=RequestOutputKind[kind],
    )  # fmt: skip
    given = copy.deepcopy(params)
    answers = []
    for turn in range(2):  # the same object again, as for the next turn of a conversation
        handed: list[tuple[Any, dict[str, Any]]] = []
        stream = vllm_engine.generate({"prompt_token_ids": prompts[3]}, params, request_id=f"own-{kind}-{n}-{turn}")
        async for output in stream:
            handed.append((output, copy.deepcopy(contents(output))))
        for output, before in handed:
            now = contents(output)
            changed = [name for name in now if now[name] != before[name]]
            assert not changed, f"{', '.join(changed)} of an output changed after it was handed out"
        assert params == given, f"the sampling parameters were changed: {params}"
        tokens: dict[int, list[int]] = {index: [] for index in range(n)}
        for output, _ in handed:
            for completion in output.outputs:
                fresh = list(completion.token_ids)
                tokens[completion.index] = tokens[completion.index] + fresh if kind == "DELTA" else fresh
                assert len(completion.logprobs) == len(fresh)
        assert all(len(said) == 12 for said in tokens.values())
        answers.append(tokens)
    assert answers[0] == answers[1]


seeds = contract(
    "gen-seed-policy",
    "The same request seed gives the same tokens; engines that were started without a seed sample different ones.",
    references=("verl-project/verl#5179", "huggingface/trl#7040", "vllm-project/vllm#17929"),
    needs=("update",),
)


@seeds
async def test_request_seeds_repeat(vllm_engine: EngineHandle, prompts: list[list[int]]) -> None:
    async def sampled(**seed: int) -> list[list[int]]:
        # So hot that nothing is likely, whatever the model.
        sampling: dict[str, Any] = {"temperature": 500.0, "max_tokens": 24, **seed}
        outputs = await asyncio.gather(*(vllm_engine.complete(prompt, **sampling) for prompt in prompts[:4]))
        return [list(output.outputs[0].token_ids) for output in outputs]

    first = await sampled(seed=7)
    other = await sampled(seed=8)
    await sampled()
    for _ in range(2):
        assert await sampled(seed=7) == first
    assert all(one != two for one, two in zip(first, other, strict=True)), "another seed gives the same tokens"
    assert await sampled() != await sampled(), "without a seed a request gives the same tokens again"


@seeds
@pytest.mark.vllm_on_request("executors")
async def test_engines_sample_differently(
    vllm_engine_args: dict[str, Any],
    vllm_engine_factory: Callable[..., EngineHandle],
    vllm_trainer: Trainer,
    prompts: list[list[int]],
) -> None:
    said = []
    for name in ("one", "two"):
        engine = vllm_engine_factory(worker_name=name, seed=None)
        await vllm_trainer.push(engine, vllm_trainer.reference_version)
        outputs = await asyncio.gather(
            *(engine.complete(prompts[number % len(prompts)], temperature=500.0, max_tokens=64) for number in range(64))
        )
        said.append([list(output.outputs[0].token_ids) for output in outputs])
        await asyncio.to_thread(engine.close)
    differ = sum(one != two for one, two in zip(*said, strict=True))
    assert differ >= 60, f"two engines gave the same answer to {64 - differ} of 64 prompts"
