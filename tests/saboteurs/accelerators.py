"""Breakages that only a device with memory of its own can show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.saboteurs.base import in_worker, saboteur
from tests.saboteurs.worker import FROM_START, UNBEARING

ACCELERATORS = ("cuda", "rocm", "npu")

in_worker("keep-what-was-sent", "mem-sync-bounded", backends=("cuda", "rocm"))
in_worker("damage-weights-at-every-wake", "sl-two-engines", backends=ACCELERATORS)


@saboteur("env-memory-profiling-tolerant", starts_engine=True, backends=ACCELERATORS)
@contextmanager
def bears_no_neighbours(engine: Any) -> Iterator[None]:
    """The workers profile the device's memory as vLLM does."""
    with patch.dict(os.environ, {UNBEARING: "1"}):
        yield


@saboteur("wu-bucketed-is-fast", backends=ACCELERATORS)
@contextmanager
def sends_tensor_by_tensor(engine: Any) -> Iterator[None]:
    """An update makes a call for every tensor."""
    from roll_vllm.transfer.bucket import items_of
    from roll_vllm.transfer.session import WeightUpdate

    send = WeightUpdate.send

    async def singly(self: Any, named_tensors: Any) -> None:
        for name, tensor in items_of(named_tensors):
            await send(self, {name: tensor})

    with patch.object(WeightUpdate, "send", singly):
        yield


@saboteur("sl-kv-side-state", starts_engine=True, backends=ACCELERATORS)
@contextmanager
def forgets_calibrated_scales(engine: Any) -> Iterator[None]:
    """A KV cache wakes with scales of 1.0, as in vLLM 0.12.0."""
    with patch.dict(os.environ, {FROM_START: "reset-scales-at-wake"}):
        yield
