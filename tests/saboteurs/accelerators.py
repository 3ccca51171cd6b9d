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

#: As the tests of graphs start their engine.
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}}

in_worker("keep-what-was-sent", "mem-sync-bounded", backends=("cuda", "rocm"))
in_worker("damage-weights-at-every-wake", "sl-two-engines", backends=ACCELERATORS)
in_worker("move-what-graphs-read", "wu-graphs-stay-live", backends=("cuda", "rocm"), arguments=GRAPHS)
in_worker("explain-no-lack-of-memory", "err-out-of-memory", backends=("cuda", "rocm"))
in_worker("skip-a-tensor-of-another-process", "wu-devices-by-other-names", backends=("cuda",))
in_worker("keep-senders-memory", "wu-bucket-on-device", backends=("cuda", "rocm"))


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
