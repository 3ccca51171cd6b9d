"""Giving a worker's memory back and taking it again: by storage on CPU, by vLLM's memory pool elsewhere.

Level 1 gives back the KV cache; level 2 the weights too. On CPU vLLM has no sleep mode at all, so the
storages of the tensors are resized to nothing and back: every view, tied parameter and ``nn.Parameter``
object stays valid. Buffers and other small tensors, which nobody would send again, stay in memory on CPU, and
are kept on the host elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from roll_vllm.errors import (
    OUT_OF_MEMORY_REMEDY,
    ConfigurationError,
    EngineOutOfMemoryError,
    UnsupportedFeatureError,
)
from roll_vllm.state import TAGS
from roll_vllm.worker.checksums import named_tensors
from roll_vllm.worker.host_copies import CudaPinning, HostCopies

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SLEEP_COPY = "ROLL_VLLM_SLEEP_COPY"
"""Which host memory level 1 copies the weights to: :data:`SLEEP_COPIES` has the choices."""

SLEEP_COPIES = ("on-demand", "prepared", "vllm")
"""Taken by the first sleep, ahead of it in the background, or by vLLM as it does it."""

#: Threads that fault in and lock pages at once, at most.
_MOST_THREADS = 16

POOL_MODULE = "vllm.device_allocator.cumem"

#: The tag of an allocation that vLLM's pool shall not copy, because it is copied already.
_COPIED = "roll_vllm_copied"

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
    """Sleep by releasing tensor storages, where vLLM has no memory pool: on the CPU, and on a few older devices.

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
                _release(storage)
        self._return_free_memory()

    def _return_free_memory(self) -> None:
        """What torch's allocators have free goes back to the system."""
        import torch

        _return_free_pages()
        for kind in {storage.device.type for storages in self._storages.values() for storage in storages} - {"cpu"}:
            torch.get_device_module(kind).empty_cache()

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
                _release(storage)
            self._return_free_memory()
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

    vLLM's level 1 keeps a copy of the weights in host memory, so they wake as they were. Whatever else the model
    holds lies in the weights' memory too: buffers, and tensors kept as plain attributes, such as the scales of an
    attention layer. At level 2 vLLM saves none of them (0.8.4) or the buffers alone; here all of them are.

    On CUDA, that copy is made here, because vLLM takes 40 times as long for the first one as for the next: see
    :mod:`roll_vllm.worker.host_copies`. Where that is not possible, vLLM makes it.

    Args:
        worker: vLLM's worker, with its model loaded and its CUDA graphs captured, which locking pages would disturb.
        copies: where level 1 keeps the weights; by default what :data:`SLEEP_COPY` says.

    Raises:
        ConfigurationError: The variable has no value that it can have.
    """

    def __init__(self, worker: Any, copies: HostCopies | None = None) -> None:
        self._worker = worker
        choice = _choice()
        self._copies = copies or (None if choice == "vllm" else _host_copies(worker))
        if choice == "prepared" and self._copies is not None:
            with self._vllm_instead([]):
                self._copies.prepare([size for _, _, size in _weights()])
        self._sleeping: frozenset[str] = frozenset()
        self._level = 0
        #: What level 2 would lose: tensors of the model and, while they sleep, their content on the host.
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def sleeping(self) -> frozenset[str]:
        """The tags that are given back."""
        return self._sleeping

    def sleep(self, level: int) -> None:
        """Let vLLM's worker sleep at the level, once; from level 1 to 2 by way of a wake."""
        if self._sleeping == frozenset(TAGS) and level <= self._level:
            return
        self.wake(TAGS)
        if level == 2:
            model = self._worker.model_runner.get_model()
            self._saved = [(tensor, tensor.to("cpu", copy=True)) for tensor in _beside_parameters(model)]
        try:
            with _passed_over(self._copy_weights() if level == 1 else []):
                self._worker.sleep(level)
        except AssertionError as error:
            # All is given back by then: vLLM only compares what is free on the device, and others take some of it.
            if "Memory usage increased" not in str(error):
                raise
        self._sleeping, self._level = frozenset(TAGS), level

    def _copy_weights(self) -> list[Any]:
        """Copy the weights to the host; returns the allocations of vLLM's pool that hold them, none if vLLM shall."""
        if self._copies is None:
            return []
        import torch

        started = time.monotonic()
        copy = sys.modules[POOL_MODULE].libcudart.cudaMemcpy
        weights = _weights()
        copied: list[Any] = []
        torch.get_device_module(self._worker.device.type).synchronize(self._worker.device)
        with self._vllm_instead(copied):
            for number, host in self._copies.blocks([size for _, _, size in weights]):
                address, allocation, size = weights[number]
                copy(host.data_ptr(), address, size)
                allocation.cpu_backup_tensor = host
                copied.append(allocation)
            logger.info(
                "copied %d bytes of weights to the host in %.2f s", self._copies.nbytes, time.monotonic() - started
            )
        return copied

    @contextlib.contextmanager
    def _vllm_instead(self, copied: list[Any]) -> Iterator[None]:
        """Give up copies of our own where the host refuses memory for them; none may be left half made."""
        try:
            yield
        except BaseException as error:
            # The pool would take what it finds there for the content of an allocation at any later wake.
            for allocation in copied:
                allocation.cpu_backup_tensor = None
            copied.clear()
            if not isinstance(error, OSError):
                raise
            logger.warning("vLLM itself will copy the weights to the host at sleep level 1: %s", error)
            if self._copies is not None:
                self._copies.close()
            self._copies = None

    def wake(self, tags: Iterable[str]) -> frozenset[str]:
        """Wake the tags, weights first: up to vLLM 0.24 any wake writes saved buffers into the weights' memory."""
        import torch

        wanted = [tag for tag in TAGS if tag in set(tags) and tag in self._sleeping]
        if wanted == ["kv_cache"] and "weights" in self._sleeping:
            wanted = list(TAGS)
        self._check_room(wanted)
        for tag in wanted:
            # From 0.12.0 on, vLLM sets the scales of an fp8 KV cache to 1.0 when it wakes, calibrated or not.
            scales = [] if tag == "weights" else [(scale, scale.clone()) for scale in _kv_scales(self._worker)]
            self._worker.wake_up([tag])
            self._sleeping -= {tag}
            with torch.inference_mode():
                if tag == "weights":
                    for tensor, saved in self._saved:
                        tensor.copy_(saved)
                    self._saved = []
                else:
                    for tensor in _kv_caches(self._worker):
                        tensor.zero_()
                for scale, calibrated in scales:
                    scale.copy_(calibrated)
        return frozenset(wanted)

    def resident_bytes(self) -> dict[str, int]:
        """Bytes of the device held now, by tag, as the pool maps them; empty where its pool is not vLLM's own."""
        sizes = _pool_bytes()
        return {tag: 0 if tag in self._sleeping else size for tag, size in sizes.items()}

    def _check_room(self, tags: Iterable[str]) -> None:
        # vLLM's pool only prints that there is no memory left, and then copies into what it did not get.
        sizes = _pool_bytes()
        needed = sum(sizes.get(tag, 0) for tag in tags)
        if not needed:
            return
        import torch

        free, _ = torch.cuda.mem_get_info()
        if free < needed:
            raise EngineOutOfMemoryError(
                f"waking {' and '.join(tags)} needs {needed} bytes, and the device has {free} free: "
                f"{OUT_OF_MEMORY_REMEDY}. Nothing was taken; free memory and wake again"
            )


def vllm_pool() -> Any:
    """This process's pool, if it is vLLM's own (NPUs have another)."""
    module = sys.modules.get(POOL_MODULE)
    return module.CuMemAllocator.instance if module else None


def _pool_bytes() -> dict[str, int]:
    """Bytes in this process's pool by tag, asleep or not; empty without vLLM's own pool."""
    pool = vllm_pool()
    if pool is None:
        return {}
    sizes = dict.fromkeys(TAGS, 0)
    for allocation in pool.pointer_to_data.values():
        if allocation.tag in sizes:
            sizes[allocation.tag] += int(allocation.handle[1])
    return sizes


def _weights() -> list[tuple[int, Any, int]]:
    """Address, entry and bytes of each allocation of the weights in this process's pool."""
    entries = vllm_pool().pointer_to_data.items()
    return [(address, entry, int(entry.handle[1])) for address, entry in entries if entry.tag == "weights"]


@contextlib.contextmanager
def _passed_over(allocations: list[Any]) -> Iterator[None]:
    """Have vLLM's pool give the memory of allocations back without a copy; a wake finds the one that is there."""
    for allocation in allocations:
        allocation.tag = _COPIED
    try:
        yield
    finally:
        for allocation in allocations:
            allocation.tag = "weights"


def _choice() -> str:
    choice = os.environ.get(SLEEP_COPY, "").strip() or SLEEP_COPIES[0]
    if choice not in SLEEP_COPIES:
        raise ConfigurationError(f"{SLEEP_COPY}={choice!r}: set it to one of {', '.join(SLEEP_COPIES)}, or unset it")
    return choice


def _host_copies(worker: Any) -> HostCopies | None:
    """Host memory for the weights of a worker; None where only vLLM's own way is known to work."""
    import torch

    # Not on ROCm, which has the same calls, but where nobody has tried them.
    if torch.version.cuda is None or vllm_pool() is None or not sys.modules[POOL_MODULE].is_pin_memory_available():
        return None
    neighbours = int(getattr(worker.parallel_config, "world_size", 1))
    threads = min(_MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // neighbours))
    return HostCopies(CudaPinning(worker.device.index or 0), threads)


def _beside_parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors of a model that share no storage with a parameter; what is listed twice, once."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[tuple[int, int], torch.Tensor] = {}
    for _, tensor in named_tensors(model):
        if tensor.untyped_storage()._cdata not in parameters:
            found.setdefault((tensor.data_ptr(), tensor.nbytes), tensor.detach())
    return list(found.values())


def _kv_scales(worker: Any) -> list[torch.Tensor]:
    """The scales of keys and values that the attention layers of a model hold."""
    named = named_tensors(worker.model_runner.get_model())
    return [tensor.detach() for name, tensor in named if name.endswith(("k_scale", "v_scale"))]


def _kv_caches(worker: Any) -> Iterator[torch.Tensor]:
    """The tensors of a worker's KV cache, whatever lists vLLM keeps them in."""
    pending = [getattr(worker, "gpu_cache", None) or getattr(worker.model_runner, "kv_caches", None) or []]
    while pending:
        for item in pending.pop():
            if hasattr(item, "zero_"):
                yield item
            else:
                pending.append(item)


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
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise EngineOutOfMemoryError(f"out of memory while {action} ({error}): {OUT_OF_MEMORY_REMEDY}") from error


def _fill(storage: torch.UntypedStorage, value: int) -> None:
    import torch

    torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).fill_(value)


def _release(storage: torch.UntypedStorage) -> None:
    """Free a storage and the pages behind it."""
    if storage.device.type == "cpu":
        _return_pages(storage)
    storage.resize_(0)


def _return_pages(storage: torch.UntypedStorage) -> None:
    """Give the pages of a storage back that is about to be freed: a thread's own heap would keep the last ones."""
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _return_free_pages() -> None:
    # glibc keeps freed blocks below its mmap threshold; without this the process would not get smaller.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
