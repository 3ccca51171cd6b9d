"""Breakages of pausing, in the frontend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.saboteurs.base import saboteur


@saboteur("pause-modes")
@contextmanager
def lets_kept_requests_run(engine: Any) -> Iterator[None]:
    """A pause with the mode keep holds new requests back, and running ones go on."""

    async def nothing(frozen: bool) -> None:
        pass

    with patch.object(engine.engine, "_freeze", nothing):
        yield


@saboteur("pause-modes")
@contextmanager
def aborts_kept_requests(engine: Any) -> Iterator[None]:
    """As vLLM does that knows two modes only."""
    pause = engine.engine.pause_generation

    async def two_modes(mode: str | None = None, **rest: Any) -> None:
        await pause("abort" if mode == "keep" else mode, **rest)

    with patch.object(engine.engine, "pause_generation", two_modes):
        yield


@saboteur("pause-modes")
@contextmanager
def admits_during_a_pause(engine: Any) -> Iterator[None]:
    """Running requests are dealt with, and new ones enter."""
    gate = engine.engine._gate
    is_open = gate._open

    def ignoring(waited: bool) -> bool:
        state = gate._state
        gate._state = dataclasses.replace(state, paused=False)
        try:
            return bool(is_open(waited))
        finally:
            gate._state = state

    with patch.object(gate, "_open", ignoring):
        yield


@saboteur("pause-modes")
@contextmanager
def loses_tokens_in_a_pause(engine: Any) -> Iterator[None]:
    """What was kept comes back after the resume without its last two tokens."""
    generate, resume = engine.engine.generate, engine.engine.resume_generation
    resumes: list[None] = []

    async def resuming() -> None:
        if await engine.engine.is_paused():
            resumes.append(None)
        await resume()

    async def losing(*args: Any, **kwargs: Any) -> Any:
        before = len(resumes)
        async for output in generate(*args, **kwargs):
            if len(resumes) > before:
                for completion in output.outputs:
                    completion.token_ids = list(completion.token_ids)[:-2]
            yield output

    with patch.object(engine.engine, "generate", losing), patch.object(engine.engine, "resume_generation", resuming):
        yield


@saboteur("cf-dp-pause-consistent")
@contextmanager
def takes_replicas_for_one(engine: Any) -> Iterator[None]:
    """Who asks for several replicas in one engine gets one, without a word."""
    with patch("roll_vllm.factory._check_replicas", lambda engine_args: engine_args.pop("data_parallel_size", None)):
        yield
