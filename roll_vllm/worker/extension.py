"""The class that vLLM mixes into its worker (``worker_extension_cls``).

vLLM refuses an extension that has any name in common with the worker, private names included, and its workers
gain names with every release; the prefix keeps ours apart from all of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from roll_vllm.state import WeightsStatus

QUALNAME = f"{__name__}.RollVllmWorkerExtension"


class RollVllmWorkerExtension:
    """Adds two remote calls to a vLLM worker; everything else lives in :class:`WorkerRuntime`."""

    def roll_vllm_init(self, initial: str, frontend: int) -> None:
        """Prepare the worker, once.

        Args:
            initial: what the parameters hold, a value of :class:`WeightsStatus`.
            frontend: the process of the engine's frontend.

        Raises:
            PatchError: a patch could not be applied in this process.
        """
        from roll_vllm.patches import process
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
