"""Breakages of LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.saboteurs.base import saboteur

# The engines of these contracts are others than the one that a saboteur is given: what breaks is the class.


@saboteur("lora-tensors-parity")
@contextmanager
def applies_the_scale_twice(engine: Any) -> Iterator[None]:
    """Adapters are scaled by alpha / r, and then once more."""
    from roll_vllm.engine import RolloutEngine

    workers = RolloutEngine._workers

    async def scaled(self: Any, method: str, *args: Any) -> Any:
        if method == "add_lora":
            number, config = args
            args = (number, {**config, "lora_alpha": config["lora_alpha"] ** 2 / config["r"]})
        return await workers(self, method, *args)

    with patch.object(RolloutEngine, "_workers", scaled):
        yield


@saboteur("lora-survives-sleep")
@contextmanager
def names_adapters_that_are_gone(engine: Any) -> Iterator[None]:
    """After level 2 the engine still offers the adapter that it has destroyed."""
    from roll_vllm.engine import RolloutEngine

    offload_states = RolloutEngine.offload_states

    async def remembering(self: Any, level: int = 1) -> None:
        adapter = self._lora
        await offload_states(self, level)
        self._lora = adapter

    with patch.object(RolloutEngine, "offload_states", remembering):
        yield
