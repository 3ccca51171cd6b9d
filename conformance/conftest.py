"""Fixtures that only the suite itself needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conformance.worker import QUALNAME
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.options import Settings
from pytest_roll_vllm.trainer import Trainer


@pytest.fixture
def vllm_engine_args(vllm_engine_args: dict[str, Any], vllm_settings: Settings) -> dict[str, Any]:
    """With the suite's questions to workers. All engines of the runtime have them: V0 mixes one extension into a
    worker class that all engines of a process share, and refuses a second one."""
    if vllm_settings.missing("runtime"):
        return vllm_engine_args
    return {"worker_extension_cls": QUALNAME, **vllm_engine_args}


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
    kind, dash, body = vllm_model.name.partition("-")
    return vllm_trainer_factory(vllm_model_factory(f"random{dash}{body}") if kind == "counting" else vllm_model)


@pytest.fixture
def prompts(vllm_model: Model) -> list[list[int]]:
    """Twelve prompts of varied length and content, the same in every run."""
    size = vllm_model.vocab_size
    return [[(7 * i + 3 * j * j + 11 * i * j) % size for j in range(3 + 5 * i)] for i in range(12)]
