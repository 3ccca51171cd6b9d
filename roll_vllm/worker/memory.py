"""Giving a worker's memory back and taking it again: by storage on CPU, by vLLM's memory pool elsewhere.

Level 1 gives back the KV cache; level 2 the weights too. On CPU vLLM has no sleep mode at all, so the
storages of the tensors are resized to nothing and back: every view, tied parameter and ``nn.Parameter``
object stays valid. Buffers and other small tensors stay in memory; they are what nobody would send again.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from roll_vllm.errors import OUT_OF_MEMORY_REMEDY, EngineOutOfMemoryError, UnsupportedFeatureError
from roll_vllm.state import TAGS

if TYPE_CHECKING:
    import torch

#: Bytes that read as NaN in every floating-point dtype: what was not restored shows at once.
POISON = 0xFF


class SleepMemory(Protocol):
    """Gives memory back by level, takes it again by tag."""

    @property
    def sleeping(self) -> frozenset[str]:
        """The tags that are given back."""

    def sleep(self, level: int) -> None:
        """Give back the KV cache (level 1), or the KV cache and the weights (level 2)."""

    def wake(self, tags: Iterable[str]) -> frozenset[str]:
        """Take the tags' memory again; returns those that were asleep. The KV cache comes back zeroed."""

    def resident_bytes(self) -> dict[str, int]:
        """Bytes held now, by tag."""


def _unique_storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages.setdefault(storage._cdata, storage)
    return list(storages.values())


class StorageMemory:
    """Sleep by releasing tensor storages, for the CPU backend.

    Args:
        model: the module whose parameters are the weights.
        kv_caches: the KV cache tensors.
    """

    def __init__(self, model: torch.nn.Module, kv_caches: Iterable[torch.Tensor]) -> None:
        keep = {storage._cdata for storage in _unique_storages(model.buffers())}
        self._storages: dict[str, list[torch.UntypedStorage]] = {
            "weights": [s for s in _unique_storages(model.parameters()) if s._cdata not in keep],
            "kv_cache": _unique_storages(kv_caches),
        }
        self._sizes: dict[str, list[int]] = {}

    @property
    def sleeping(self) -> frozenset[str]:
        """The tags that are given back."""
        return frozenset(self._sizes)

    def sleep(self, level: int) -> None:
        """Release the storages of the level's tags that are awake, and the pages behind them."""
        tags = [tag for tag in (("kv_cache",) if level == 1 else TAGS) if tag not in self._sizes]
        for tag in tags:
            if not all(storage.resizable() for storage in self._storages[tag]):
                raise UnsupportedFeatureError(
                    f"sleep level {level} cannot give {tag} back: something in the worker called Tensor.numpy() on "
                    "it, after which torch does not resize it; use a copy there, or sleep level 1"
                )
        for tag in tags:
            self._sizes[tag] = [storage.nbytes() for storage in self._storages[tag]]
            for storage in self._storages[tag]:
                storage.resize_(0)
        _return_free_pages()

    def wake(self, tags: Iterable[str]) -> frozenset[str]:
        """Allocate again: zeros for the KV cache, the poison pattern for weights."""
        waking = self.sleeping.intersection(tags)
        done = []
        try:
            for tag in waking:
                for storage, size in zip(self._storages[tag], self._sizes[tag], strict=True):
                    storage.resize_(size)
                    done.append(storage)
                    _fill(storage, 0 if tag == "kv_cache" else POISON)
        except (RuntimeError, MemoryError) as error:
            for storage in done:
                storage.resize_(0)
            _return_free_pages()
            raise EngineOutOfMemoryError(
                f"waking {' and '.join(sorted(waking))} needs {sum(sum(self._sizes[tag]) for tag in waking)} bytes, "
                f"which the host does not have: {OUT_OF_MEMORY_REMEDY}. Nothing was taken; free memory and wake again"
            ) from error
        for tag in waking:
            del self._sizes[tag]
        return waking

    def resident_bytes(self) -> dict[str, int]:
        """Bytes held now, by tag."""
        return {tag: sum(s.nbytes() for s in storages) for tag, storages in self._storages.items()}


class PoolMemory:
    """Sleep by vLLM's own memory pool (``enable_sleep_mode``), for accelerators.

    vLLM's level 1 keeps a copy of the weights in host memory, so they wake as they were.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._sleeping: frozenset[str] = frozenset()
        self._level = 0

    @property
    def sleeping(self) -> frozenset[str]:
        """The tags that are given back."""
        return self._sleeping

    def sleep(self, level: int) -> None:
        """Let vLLM's worker sleep at the level, once; from level 1 to 2 by way of a wake."""
        if self._sleeping == frozenset(TAGS) and level <= self._level:
            return
        self.wake(TAGS)
        self._worker.sleep(level)
        self._sleeping, self._level = frozenset(TAGS), level

    def wake(self, tags: Iterable[str]) -> frozenset[str]:
        """Wake the tags, weights first: up to vLLM 0.24 any wake writes saved buffers into the weights' memory."""
        wanted = [tag for tag in TAGS if tag in set(tags) and tag in self._sleeping]
        if wanted == ["kv_cache"] and "weights" in self._sleeping:
            wanted = list(TAGS)
        for tag in wanted:
            self._worker.wake_up([tag])
            self._sleeping -= {tag}
        return frozenset(wanted)

    def resident_bytes(self) -> dict[str, int]:
        """Bytes held now, by tag; unknown to vLLM's pool, hence empty."""
        return {}


@contextlib.contextmanager
def out_of_memory_explained(action: str) -> Iterator[None]:
    """Turn an allocator's out-of-memory error into one that names the two remedies."""
    import torch

    try:
        yield
    except EngineOutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        # The CPU allocator raises a plain RuntimeError ("DefaultCPUAllocator: can't allocate memory").
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise EngineOutOfMemoryError(f"out of memory while {action} ({error}): {OUT_OF_MEMORY_REMEDY}") from error


def _fill(storage: torch.UntypedStorage, value: int) -> None:
    import torch

    torch.empty(0, dtype=torch.uint8).set_(storage).fill_(value)


def _return_free_pages() -> None:
    # glibc keeps freed blocks below its mmap threshold; without this the process would not get smaller.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
