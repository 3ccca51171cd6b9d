"""Fixtures that only the suite itself needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer


@pytest.fixture
def continuous_trainer(
    vllm_model: Model,
    vllm_model_factory: Callable[[str], Model],
    vllm_trainer_factory: Callable[[Model], Trainer],
) -> Trainer:
    """A trainer whose weights give every token a probability that depends on all of the context.

    The counting model's answer looks at the last token only, so it cannot tell a stale KV cache; random
    weights of the same shape can, and the same engine takes them.
    """
    twin = {"counting": "random", "counting-tied": "random-tied"}.get(vllm_model.name)
    return vllm_trainer_factory(vllm_model_factory(twin) if twin else vllm_model)


@pytest.fixture
def prompts(vllm_model: Model) -> list[list[int]]:
    """Twelve prompts of varied length and content, the same in every run."""
    size = vllm_model.vocab_size
    return [[(7 * i + 3 * j * j + 11 * i * j) % size for j in range(3 + 5 * i)] for i in range(12)]
