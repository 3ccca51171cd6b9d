"""Our own tests, on the plugin's fixtures."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_roll_vllm.contracts import contract


@pytest.mark.vllm_version(">=0.10")
@contract("tiny-follows-the-trainer", "After every update the answers are those of the trainer's weights.")
async def test_answers_follow_the_trainer(vllm_engine: Any, vllm_trainer: Any) -> None:
    for version in (vllm_trainer.reference_version + 1, vllm_trainer.reference_version):
        await vllm_trainer.push(vllm_engine, version)
        assert await vllm_engine.greedy([[5, 6, 7]], 6) == [vllm_trainer.expected([5, 6, 7], 6, version)]


def test_our_arguments_reach_the_engine(vllm_engine_args: dict[str, Any]) -> None:
    assert vllm_engine_args["max_num_batched_tokens"] == 1024
