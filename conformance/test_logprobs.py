"""Log-probabilities line up with the tokens and are the trainer's."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from conformance.oracles import assert_parity
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.trainer import Trainer

aligned = contract(
    "lp-aligned-and-finite",
    "Every generated token, of aborted requests too, has one finite log-probability that is not positive.",
    references=("vllm-project/vllm#42259", "sgl-project/sglang#26555"),
)


def check_alignment(completion: Any) -> None:
    assert len(completion.logprobs) == len(completion.token_ids)
    for token, row in zip(completion.token_ids, completion.logprobs, strict=True):
        assert token in row, f"the sampled token {token} has no log-probability"
        assert math.isfinite(row[token].logprob)
        assert row[token].logprob <= 1e-6


@aligned
@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 1},
        {"top_p": 0.5, "temperature": 1.3},
        {"min_tokens": 6, "temperature": 0.0},
        {"stop": ["1"], "temperature": 0.0},
        {"logit_bias": {7: 50.0}, "temperature": 1.0},
        {"n": 3, "temperature": 1.0},
    ],
    ids=["top_k", "top_p", "min_tokens", "stop", "logit_bias", "n"],
)
async def test_aligned(vllm_engine: EngineHandle, prompts: list[list[int]], sampling: dict[str, Any]) -> None:
    sampling = {"max_tokens": 16, "logprobs": 2, **sampling}
    for output in await asyncio.gather(*(vllm_engine.complete(prompt, **sampling) for prompt in prompts[:4])):
        for completion in output.outputs:
            assert completion.token_ids
            check_alignment(completion)


@aligned
async def test_aligned_after_abort(vllm_engine: EngineHandle) -> None:
    tokens = 0
    async for output in vllm_engine.stream([1, 2, 3], request_id="cut", max_tokens=900, temperature=0.0, logprobs=1):
        check_alignment(output.outputs[0])
        tokens = len(output.outputs[0].token_ids)
        if tokens == 5:
            await vllm_engine.abort("cut")
    assert 5 <= tokens < 900


@contract(
    "lp-parity-trainer",
    "The engine's log-probabilities are those of the trainer's forward pass with the same weights.",
    references=("NVIDIA-NeMo/RL#902", "verl-project/verl#6240"),
)
async def test_parity(vllm_engine: EngineHandle, continuous_trainer: Trainer, prompts: list[list[int]]) -> None:
    version = continuous_trainer.reference_version
    await continuous_trainer.push(vllm_engine, version)
    await assert_parity(vllm_engine, continuous_trainer, version, prompts, max_tokens=48)


@contract(
    "lp-parity-after-update",
    "The log-probabilities stay the trainer's after every further update and after every sleep and wake.",
    references=("verl-project/verl#7904", "vllm-project/vllm#44371"),
)
async def test_parity_after_updates(
    vllm_engine: EngineHandle, continuous_trainer: Trainer, prompts: list[list[int]]
) -> None:
    first = continuous_trainer.reference_version
    for version, level in ((first + 1, None), (first + 2, 1), (first + 3, 2)):
        if level is not None:
            await vllm_engine.offload_states(level)
            await vllm_engine.load_states()
        await continuous_trainer.push(vllm_engine, version)
        await assert_parity(vllm_engine, continuous_trainer, version, prompts[:6], max_tokens=16)
    await vllm_engine.offload_states(1)
    await vllm_engine.load_states()
    await assert_parity(vllm_engine, continuous_trainer, first + 3, prompts[:6], max_tokens=16)
