"""A model's buffers (rotary tables, scales) survive sleep level 2, whichever tag wakes first."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from roll_vllm.patches.patch import Patch

_SAVED = "_roll_vllm_buffers"


def saved(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Worker.sleep`` that keeps the buffers, which level 2 gives back with the weights."""

    @wraps(original)
    def sleep(self: Any, level: int = 1) -> None:
        if level == 2 and not vars(self).get(_SAVED):
            buffers = self.model_runner.model.named_buffers()
            vars(self)[_SAVED] = {name: buffer.cpu().clone() for name, buffer in buffers}
        original(self, level)

    return sleep


def restored(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Worker.wake_up`` that puts them back where their memory is there again."""

    @wraps(original)
    def wake_up(self: Any, tags: list[str] | None = None) -> None:
        original(self, tags)
        if _with_weights(tags) and vars(self).get(_SAVED):
            kept = vars(self).pop(_SAVED)
            for name, buffer in self.model_runner.model.named_buffers():
                if name in kept:
                    buffer.data.copy_(kept[name])

    return wake_up


def held_back(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Worker.wake_up`` that hides vLLM's own copies from a wake that leaves the weights asleep."""

    @wraps(original)
    def wake_up(self: Any, tags: list[str] | None = None) -> None:
        if _with_weights(tags):
            original(self, tags)
            return
        kept, self._sleep_saved_buffers = self._sleep_saved_buffers, {}
        try:
            original(self, tags)
        finally:
            self._sleep_saved_buffers = kept

    return wake_up


def _with_weights(tags: list[str] | None) -> bool:
    return tags is None or "weights" in tags


def _entry(name: str, target: str, versions: str, replacement: Callable[[Any], Any]) -> Patch:
    lost = replacement is not held_back
    return Patch(
        name=name,
        target=target,
        versions=versions,
        replacement=replacement,
        why="Sleep level 2 frees the buffers, which no weight update sends again: rotary tables come back undefined."
        if lost
        else "Any wake writes the saved buffers: waking the KV cache first writes into memory that is not there.",
        upstream="vllm/v1/worker/gpu_worker.py: 0.8.4 saves no buffers, 0.10.2 does"
        if lost
        else "vllm/v1/worker/gpu_worker.py: wake_up restores on every tag, in 0.28.0 only with the weights",
        remove_when="0.8.4 is no longer supported" if lost else "every supported release looks at the tags",
    )


_V0 = "vllm.worker.worker:Worker"
_V1 = "vllm.v1.worker.gpu_worker:Worker"

PATCHES = (
    _entry("sleep-saves-buffers-v0", f"{_V0}.sleep", ">=0.8.4,<0.8.5", saved),
    _entry("sleep-saves-buffers-v1", f"{_V1}.sleep", ">=0.8.4,<0.8.5", saved),
    _entry("wake-restores-buffers-v0", f"{_V0}.wake_up", ">=0.8.4,<0.8.5", restored),
    _entry("wake-restores-buffers-v1", f"{_V1}.wake_up", ">=0.8.4,<0.8.5", restored),
    _entry("wake-holds-buffers-v0", f"{_V0}.wake_up", ">=0.10.2,<0.11", held_back),
    _entry("wake-holds-buffers-v1", f"{_V1}.wake_up", ">=0.10.2,<0.13", held_back),
)
