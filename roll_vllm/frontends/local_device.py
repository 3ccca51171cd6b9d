"""Gives back the device memory of a V0 engine, whose worker lives in the calling process and outlives it there.

vLLM's memory pool (``CuMemAllocator``) is one for the process and never shrinks, so that no second engine could start.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import gc
import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from functools import wraps
from types import TracebackType
from typing import Any

from roll_vllm.errors import EngineDiedError
from roll_vllm.worker.memory import POOL_MODULE, vllm_pool

logger = logging.getLogger(__name__)


class Gate:
    """Lets threads work on the device until it is shut, and tells when none of them is at it any more."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = False

    def __enter__(self) -> None:
        with self._changed:
            if self._shut:
                raise EngineDiedError("the engine was shut down; create a new one")
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def behind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which now runs inside only."""

        @wraps(function)
        def gated(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return gated

    def shut(self, timeout: float) -> bool:
        """Let nobody in any more; returns whether everybody is out after ``timeout`` seconds."""
        with self._changed:
            self._shut = True
            return self._changed.wait_for(lambda: not self._inside, timeout)


def local_worker(executor: Any) -> Any:
    """The worker that lives in this process and has a device of its own; None without one, and on a CPU."""
    worker = getattr(getattr(executor, "driver_worker", None), "worker", None)
    kind = getattr(getattr(worker, "device", None), "type", "cpu")
    return None if kind == "cpu" else worker


def end(worker: Any) -> None:
    """Give back the device memory of a worker in this process that nothing runs in any more; it is void then."""
    import torch

    pooled = bool(worker.model_config.enable_sleep_mode)
    runtime = vars(worker).get("roll_vllm_runtime")  # not there where the start failed
    asleep = runtime.state()["sleeping"] if runtime is not None else ()
    device = torch.get_device_module(worker.device.type)
    device.synchronize(worker.device)
    # The engine, its configuration and wrappers of methods still lead to the worker, and it to graphs and tensors.
    vars(worker).clear()
    del runtime
    gc.collect()
    if pooled:
        release_pool(asleep)
    device.empty_cache()


def end_start() -> None:
    """Give back what a start that failed has left in the pool, where it would keep every other one from starting."""
    import torch

    try:
        torch.cuda.synchronize()
        release_pool(())
    except Exception as error:  # such as any use of a device after an error on it
        logger.warning("the device memory of the engine that did not start stays taken: %s", error)


def pool_bytes() -> int:
    """Bytes that vLLM's pool has in this process, asleep or not."""
    pool = vllm_pool()
    return int(pool.get_current_usage()) if pool is not None else 0


def release_pool(asleep: Collection[str]) -> None:
    """Empty vLLM's pool of this process, as if nothing had ever been in it.

    Args:
        asleep: the tags whose memory is given back already.
    """
    pool = vllm_pool()
    if pool is None:
        return
    entries = dict(pool.pointer_to_data)
    # vLLM keeps rotary embeddings for the next model of the same shape, and their tables lie in the pool.
    getattr(sys.modules.get("vllm.model_executor.layers.rotary_embedding"), "_ROPE_DICT", {}).clear()
    _empty_tensors((address, int(entry.handle[1])) for address, entry in entries.items())
    # torch's pools keep the addresses, without memory behind them, and must never end: torch would free each address
    # by a callback that knows it no more (and that 0.8.4 lets go of), or abort the process where a tensor is left.
    for kept in pool.allocator_and_pools.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    pool.allocator_and_pools.clear()
    pool.pointer_to_data.clear()
    refused: list[str] = []
    for entry in entries.values():
        if entry.tag in asleep:
            continue
        try:
            sys.modules[POOL_MODULE].unmap_and_release(entry.handle)
        except RuntimeError as error:
            refused.append(str(error))
    if refused:
        logger.warning(
            "%d of %d pieces of the ended engine's device memory were not given back: %s",
            len(refused),
            len(entries),
            refused[0],
        )


def _empty_tensors(blocks: Iterable[tuple[int, int]]) -> None:
    """Empty the tensors that are still referred to: to read them would be an error on the device, for all in it."""
    import torch

    ordered = sorted(blocks)
    starts = [address for address, _ in ordered]
    for found in gc.get_objects():
        # Not isinstance, which asks the object itself.
        if not issubclass(type(found), torch.Tensor):
            continue
        with contextlib.suppress(RuntimeError, NotImplementedError):  # tensors without a storage, or one for ever
            storage = found.untyped_storage()
            place = bisect.bisect_right(starts, storage.data_ptr()) - 1
            if place >= 0 and storage.data_ptr() < sum(ordered[place]) and storage.nbytes():
                storage.resize_(0)
