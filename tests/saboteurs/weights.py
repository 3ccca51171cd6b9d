"""Breakages of weight updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.saboteurs.base import in_worker, saboteur

in_worker("skip-one-tensor", "wu-a-b-a", "wu-every-parameter-reached", "lp-parity-after-update")
in_worker("swap-gate-and-up", "wu-a-b-a", "wu-every-parameter-reached")
in_worker("add-instead-of-copy", "wu-repeat-and-split-invariant", "wu-a-b-a")
in_worker("round-the-weights", "lp-parity-trainer", "wu-every-parameter-reached")
in_worker("ignore-unknown-names", "wu-every-parameter-reached", "wu-versioned-and-fail-closed")
in_worker("lose-updates-while-asleep", "wu-while-asleep", "sl-tag-order")
in_worker("skip-updates-on-one-rank", "wu-all-ranks-all-transports", ranks=2)
in_worker("acknowledge-early-on-one-rank", "wu-all-ranks-all-transports", ranks=2)


@saboteur("wu-invalidates-prefix-cache", "sl-level1-identity")
@contextmanager
def keeps_the_prefix_cache(engine: Any) -> Iterator[None]:
    """Updates and sleep leave the prefix cache as it is."""

    async def nothing() -> None:
        pass

    with patch.object(engine.engine, "_drop_prefix_cache", nothing):
        yield


@saboteur("wu-cache-reset-not-ignored")
@contextmanager
def calls_every_reset_a_success(engine: Any) -> Iterator[None]:
    """A prefix cache that is in use is said to be empty, as by vLLM before 0.12.0."""
    reset = engine.engine._reset_prefix_cache

    async def done() -> bool:
        await reset()
        return True

    with patch.object(engine.engine, "_reset_prefix_cache", done):
        yield


@saboteur("wu-versioned-and-fail-closed")
@contextmanager
def never_counts(engine: Any) -> Iterator[None]:
    """The weight version stays where it is."""
    note = engine.engine._note

    def without_version(reports: Any, **changes: Any) -> None:
        changes.pop("weight_version", None)
        note(reports, **changes)

    with patch.object(engine.engine, "_note", without_version):
        yield


@saboteur("wu-versioned-and-fail-closed")
@contextmanager
def forgives_failures(engine: Any) -> Iterator[None]:
    """A failed update leaves the state complete."""
    from dataclasses import replace

    from roll_vllm.state import WeightsStatus

    state = engine.engine.state

    async def complete() -> Any:
        return replace(await state(), weights=WeightsStatus.COMPLETE)

    with patch.object(engine.engine, "state", complete):
        yield
