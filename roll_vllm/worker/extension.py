"""The class that vLLM mixes into its worker (``worker_extension_cls``).

vLLM refuses an extension that has any name in common with the worker, private names included, and its workers
gain names with every release; the prefix keeps ours apart from all of them. The one name without it is an attribute
that vLLM sets on the worker itself, before it starts, and that a property here receives.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from roll_vllm import failure
from roll_vllm.patches import process
from roll_vllm.state import WeightsStatus

QUALNAME = f"{__name__}.RollVllmWorkerExtension"


def meeting_place(method: str | None, environ: Mapping[str, str]) -> str | None:
    """Where the ranks of an engine meet: a file instead of a port of the loopback address.

    torch's store would listen on all interfaces, whatever address it is given.

    Args:
        method: torch's ``init_method``, as vLLM gives it.
        environ: the worker's variables; without an engine's directory in it nothing is changed.
    """
    directory = environ.get(process.VARIABLE, "")
    if method is None or not method.startswith("tcp://127.") or not directory or set(directory) & set("?#;"):
        return method
    # vLLM's CPU worker takes what follows the last colon for a name.
    return f"file://{directory}/meeting:{method.rpartition(':')[2]}"


#: What a worker does until it is up, in all releases and both engine generations.
_STARTING = (
    "init_device",
    "load_model",
    "determine_available_memory",
    "determine_num_available_blocks",
    "initialize_from_config",
    "initialize_cache",
    "compile_or_warm_up_model",
)


def tell_of_too_little_memory(worker: Any) -> None:
    """Let a worker leave word of what ends its start for want of memory: vLLM's executors keep it to themselves."""

    def telling(name: str) -> Any:
        @functools.wraps(getattr(type(worker), name))
        def start(*args: Any, **kwargs: Any) -> Any:
            with failure.out_of_memory_left(os.environ.get(process.VARIABLE)):
                return getattr(type(worker), name)(worker, *args, **kwargs)  # now, so that a late patch counts

        return start

    vars(worker).update({name: telling(name) for name in _STARTING if hasattr(type(worker), name)})


class RollVllmWorkerExtension:
    """Adds two remote calls to a vLLM worker; everything else lives in :class:`WorkerRuntime`."""

    @property
    def distributed_init_method(self) -> str | None:
        """The worker's own attribute of this name, changed by :func:`meeting_place` when it is set."""
        method: str | None = vars(self).get("distributed_init_method")  # 0.8.4 asks before it is set
        return method

    @distributed_init_method.setter
    def distributed_init_method(self, method: str | None) -> None:
        vars(self)["distributed_init_method"] = meeting_place(method, os.environ)
        tell_of_too_little_memory(self)

    def roll_vllm_init(self, initial: str, frontend: int) -> None:
        """Prepare the worker, once.

        Args:
            initial: what the parameters hold, a value of :class:`WeightsStatus`.
            frontend: the process of the engine's frontend.

        Raises:
            PatchError: a patch could not be applied in this process.
        """
        from roll_vllm.worker.lifeline import watch_parent
        from roll_vllm.worker.runtime import WorkerRuntime

        if "roll_vllm_runtime" in vars(self):
            return
        process.require("worker")
        if os.getpid() != frontend:  # rank 0 of a V0 engine lives in the caller's process
            watch_parent()
        vars(self)["roll_vllm_runtime"] = WorkerRuntime(self, WeightsStatus(initial))

    def roll_vllm_call(self, method: str, args: Sequence[Any] = ()) -> dict[str, Any]:
        """Run a method of the worker's runtime; returns ``{"value": …}`` or ``{"error": …, "message": …}``."""
        result: dict[str, Any] = vars(self)["roll_vllm_runtime"].call(method, args)
        return result
