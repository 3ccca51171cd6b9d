"""An engine that starts bears neighbours on its device that give memory back meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from roll_vllm.patches.patch import Patch


def unshaken(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Worker.determine_available_memory`` that does not ask for less free memory than there was at the start."""

    @wraps(original)
    def determine_available_memory(self: Any) -> Any:
        snapshot = self.init_snapshot
        kept, snapshot.free_memory = snapshot.free_memory, snapshot.total_memory
        try:
            return original(self)
        finally:
            snapshot.free_memory = kept

    return determine_available_memory


def unshaken_084(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for 0.8.4, which keeps a number instead of a snapshot."""

    @wraps(original)
    def determine_available_memory(self: Any) -> Any:
        kept, self.init_gpu_memory = self.init_gpu_memory, sys.maxsize
        try:
            return original(self)
        finally:
            self.init_gpu_memory = kept

    return determine_available_memory


def unasked(original: Callable[..., Any]) -> Callable[..., Any]:
    """V0's check by itself, which then checks nothing."""

    @wraps(original)
    def _assert_memory_footprint_increased_during_profiling(self: Any) -> None:
        return None

    return _assert_memory_footprint_increased_during_profiling


def _entry(name: str, target: str, versions: str, replacement: Callable[[Any], Any]) -> Patch:
    return Patch(
        name=name,
        target=target,
        versions=versions,
        replacement=replacement,
        why="The start fails where another process on the device gave memory back meanwhile, as colocated trainers do.",
        upstream="https://github.com/vllm-project/vllm/issues/56830",
        remove_when="every supported release counts its own memory only",
    )


_V0 = "vllm.worker.worker:Worker._assert_memory_footprint_increased_during_profiling"
_V1 = "vllm.v1.worker.gpu_worker:Worker.determine_available_memory"

PATCHES = (
    _entry("profiling-bears-neighbours-v0", _V0, ">=0.8.4,<0.11", unasked),
    _entry("profiling-bears-neighbours-v1", _V1, ">=0.8.4,<0.8.5", unshaken_084),
    _entry("profiling-bears-neighbours-v1", _V1, ">=0.10.2,<0.13", unshaken),
)
