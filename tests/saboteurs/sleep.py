"""Breakages of sleep and wake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.saboteurs.base import in_worker, saboteur

in_worker("damage-weights-at-wake", "sl-level1-identity")
in_worker("forget-buffers", "sl-level2-buffers")
in_worker("wake-every-tag", "sl-tag-order", "sl-idempotent")
in_worker("keep-the-memory", "sl-memory-freed", "sl-state-truthful")
in_worker("choke-on-the-second-sleep", "sl-idempotent")
in_worker("call-destroyed-weights-complete", "sl-level2-requires-reload")


@saboteur("sl-state-truthful", "sl-tag-order")
@contextmanager
def says_it_is_awake(engine: Any) -> Iterator[None]:
    """is_sleeping answers from a flag that nobody sets, as after a sleep by worker call."""

    async def awake() -> bool:
        return False

    with patch.object(engine.engine, "is_sleeping", awake):
        yield
