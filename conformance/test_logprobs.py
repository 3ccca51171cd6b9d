"""Log-probabilities line up with the tokens and are the trainer's."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

from conformance.oracles import assert_parity, parity_bounds
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import ConfigurationError, create_async_llm, versions

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
@pytest.mark.vllm_needs("abort.partial")
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
    needs=("update",),
)
async def test_parity(vllm_engine: EngineHandle, continuous_trainer: Trainer, prompts: list[list[int]]) -> None:
    version = continuous_trainer.reference_version
    await continuous_trainer.push(vllm_engine, version)
    await assert_parity(vllm_engine, continuous_trainer, version, prompts, max_tokens=48)


@contract(
    "lp-parity-after-update",
    "The log-probabilities stay the trainer's after every further update and after every sleep and wake.",
    references=("verl-project/verl#7904", "vllm-project/vllm#44371"),
    needs=("update",),
)
async def test_parity_after_updates(
    vllm_engine: EngineHandle, continuous_trainer: Trainer, prompts: list[list[int]]
) -> None:
    first = continuous_trainer.reference_version
    for version, level in ((first + 1, None), (first + 2, 1), (first + 3, 2)):
        if level is not None and "sleep.level2" in vllm_engine.supported:
            await vllm_engine.sleep(level)
            await vllm_engine.wake_up()
        await continuous_trainer.push(vllm_engine, version)
        await assert_parity(vllm_engine, continuous_trainer, version, prompts[:6], max_tokens=16)
    if "sleep" in vllm_engine.supported:
        await vllm_engine.sleep(1)
        await vllm_engine.wake_up()
        await assert_parity(vllm_engine, continuous_trainer, first + 3, prompts[:6], max_tokens=16)


explicit = contract(
    "lp-mode-explicit",
    "The engine says whether temperature is in its log-probabilities, they are what it says and not the other thing, "
    "and a mode that it does not have is refused.",
    references=("huggingface/trl#4159", "PrimeIntellect-ai/prime-rl#697", "vllm-project/vime#64"),
    needs=("update", "runtime"),
)

MODES = ("raw_logprobs", "processed_logprobs")


async def assert_mode(engine: EngineHandle, trainer: Trainer, prompts: list[list[int]]) -> None:
    """The log-probabilities are the reference forward pass's by the advertised mode, and not by the other one."""
    assert engine.logprobs_mode in MODES
    version = trainer.reference_version
    for temperature in (0.7, 1.3):
        sampling: dict[str, Any] = {"temperature": temperature, "max_tokens": 16, "logprobs": 0}
        outputs = await asyncio.gather(*(engine.complete(prompt, **sampling) for prompt in prompts))
        off: dict[str, list[float]] = {mode: [] for mode in MODES}
        rounding: list[float] = []
        for output in outputs:
            prompt, tokens = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
            raw = trainer.reference.logprobs([prompt + tokens], version)[0][len(prompt) - 1 :]
            processed = (raw / temperature).log_softmax(dim=-1)
            if trainer.model.dtype != "float32":
                rounded = trainer.rounded_reference.logprobs([prompt + tokens], version)[0][len(prompt) - 1 :]
                rounding += [float(abs(rounded[i, t] - raw[i, t])) / temperature for i, t in enumerate(tokens)]
            for mode, rows in zip(MODES, (raw, processed), strict=True):
                for row, token, entry in zip(rows, tokens, output.outputs[0].logprobs, strict=True):
                    off[mode].append(abs(float(row[token]) - entry[token].logprob))
        _, bound = parity_bounds(rounding)
        advertised, other = sorted(MODES, key=lambda mode: mode != engine.logprobs_mode)
        assert max(off[advertised]) <= bound, (
            f"at temperature {temperature} {advertised} are off by {max(off[advertised]):.2g}, allowed is {bound:.2g}"
        )
        # On average: in a dtype that rounds, single tokens may be off by as much as the two modes differ.
        near, far = (sum(off[mode]) / len(off[mode]) for mode in (advertised, other))
        assert far > 3 * near, (
            f"at temperature {temperature} nothing tells {advertised} from {other}: {near:.2g}, {far:.2g}"
        )


@explicit
async def test_logprobs_are_what_the_engine_says(
    vllm_engine: EngineHandle, continuous_trainer: Trainer, prompts: list[list[int]]
) -> None:
    await continuous_trainer.push(vllm_engine, continuous_trainer.reference_version)
    await assert_mode(vllm_engine, continuous_trainer, prompts[:6])


@explicit
@pytest.mark.vllm_on_request("executors")
@pytest.mark.vllm_version(">=0.10.2")
@pytest.mark.vllm_generation("V1")
async def test_the_other_mode(
    vllm_engine_factory: Callable[..., EngineHandle], continuous_trainer: Trainer, prompts: list[list[int]]
) -> None:
    engine = vllm_engine_factory(worker_name="processed", logprobs_mode="processed_logprobs")
    assert engine.logprobs_mode == "processed_logprobs"
    await continuous_trainer.push(engine, continuous_trainer.reference_version)
    await assert_mode(engine, continuous_trainer, prompts[:6])


@explicit
async def test_other_modes_are_refused(
    vllm_engine: EngineHandle, vllm_engine_args: dict[str, Any], vllm_version: str
) -> None:
    wrong = ["logprobs", "raw"]
    if vllm_engine.generation == "V0" or versions.satisfies(vllm_version, "<0.10"):
        wrong += [mode for mode in MODES if mode != vllm_engine.logprobs_mode]
    for mode in wrong:
        with pytest.raises(ConfigurationError, match="logprobs_mode"):
            (await create_async_llm(**vllm_engine_args, logprobs_mode=mode)).shutdown()
