"""Tests of your own on the plugin's engines; there is nothing to import or to configure but what differs for you.

Run them with ``tox exec -e vllm0.12.0-cpu -- pytest examples/test_my_integration.py``, or with your own vLLM and
model: ``pytest --vllm-model path/to/model examples/test_my_integration.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.trainer import Trainer


@pytest.fixture
def vllm_engine_args(vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
    """The plugin's arguments and our own; all tests of this module share one engine that has them."""
    return {**vllm_engine_args, "max_num_seqs": 4, "max_num_batched_tokens": 1024}


# A plain test passes coroutines to run().
def test_level_1_sleep_keeps_the_answers(vllm_engine: EngineHandle) -> None:
    before = vllm_engine.run(vllm_engine.greedy([[1, 2, 3]], max_tokens=8))
    vllm_engine.run(vllm_engine.offload_states(level=1))
    vllm_engine.run(vllm_engine.load_states())
    assert vllm_engine.run(vllm_engine.greedy([[1, 2, 3]], max_tokens=8)) == before


# An async test awaits them; no other plugin is needed.
async def test_outputs_carry_the_weight_version(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    await vllm_trainer.push(vllm_engine, vllm_trainer.reference_version + 1)
    output = await vllm_engine.complete([1, 2, 3], temperature=0.0, max_tokens=2)
    assert output.weight_version == vllm_engine.weight_version


# With a contract, the outcome appears in the summary and in report.json.
@contract("my-answers-follow-the-weights", "After every update the engine says what the trainer's weights say.")
@pytest.mark.parametrize("step", [1, 2])
async def test_answers_follow_the_weights(vllm_engine: EngineHandle, vllm_trainer: Trainer, step: int) -> None:
    version = vllm_trainer.reference_version + step
    await vllm_trainer.push(vllm_engine, version)
    prompt = [5, 6, 7]
    assert await vllm_engine.greedy([prompt], max_tokens=6) == [vllm_trainer.expected(prompt, 6, version)]
