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


@contextmanager
def _asking_for(choose: Any) -> Iterator[None]:
    """Every request gets the adapter that ``choose(engine, prompt, lora_request)`` returns."""
    from roll_vllm.engine import RolloutEngine

    generate = RolloutEngine.generate

    async def other(self: Any, prompt: Any, params: Any, **kwargs: Any) -> Any:
        kwargs["lora_request"] = choose(self, prompt, kwargs.get("lora_request"))
        async for output in generate(self, prompt, params, **kwargs):
            yield output

    with patch.object(RolloutEngine, "generate", other):
        yield


@saboteur("lora-right-version-used")
@contextmanager
def takes_cached_prompts_for_the_base(engine: Any) -> Iterator[None]:
    """A prompt that was answered before is answered without the adapter."""
    seen: set[str] = set()

    def choose(engine: Any, prompt: Any, request: Any) -> Any:
        known = str(prompt) in seen
        seen.add(str(prompt))
        return None if known else request

    with _asking_for(choose):
        yield


@saboteur("lora-right-version-used")
@contextmanager
def lends_the_adapter_to_everybody(engine: Any) -> Iterator[None]:
    """Requests for the base model get the adapter that is there, too."""
    with _asking_for(lambda engine, prompt, request: request or engine.lora_request):
        yield


@saboteur("lora-right-version-used")
@contextmanager
def answers_with_the_next_adapter(engine: Any) -> Iterator[None]:
    """A request for an adapter that was replaced is answered with what took its place."""
    with _asking_for(lambda engine, prompt, request: request and engine.lora_request):
        yield


@saboteur("lora-no-accumulation")
@contextmanager
def keeps_replaced_adapters(engine: Any) -> Iterator[None]:
    """Adapters get descending numbers, so that none is older than the new one, and all of them stay."""
    from roll_vllm.engine import RolloutEngine

    add_lora = RolloutEngine.add_lora
    engines: list[Any] = []

    async def descending(self: Any, *args: Any, **kwargs: Any) -> bool:
        if self not in engines:
            engines.append(self)
            self._loras += 10_000
        self._loras -= 2
        return bool(await add_lora(self, *args, **kwargs))

    try:
        with patch.object(RolloutEngine, "add_lora", descending):
            yield
    finally:
        for one in engines:
            one._loras += 20_000  # above all that were used
