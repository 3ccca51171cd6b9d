"""The class that vLLM mixes into its worker (``worker_extension_cls``).

vLLM refuses an extension that has any name in common with the worker, private names included, and its workers
gain names with every release; the prefix keeps ours apart from all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from roll_vllm.state import WeightsStatus

QUALNAME = f"{__name__}.RollVllmWorkerExtension"


class RollVllmWorkerExtension:
    """Adds two remote calls to a vLLM worker; everything else lives in :class:`WorkerRuntime`."""

    def roll_vllm_init(self, initial: str) -> None:
        """Prepare the worker, once.

        Args:
            initial: what the parameters hold, a value of :class:`WeightsStatus`.
        """
        from roll_vllm.worker.runtime import WorkerRuntime

        if "roll_vllm_runtime" not in vars(self):
            vars(self)["roll_vllm_runtime"] = WorkerRuntime(self, WeightsStatus(initial))

    def roll_vllm_call(self, method: str, args: Sequence[Any] = ()) -> dict[str, Any]:
        """Run a method of the worker's runtime; returns ``{"value": …}`` or ``{"error": …, "message": …}``."""
        result: dict[str, Any] = vars(self)["roll_vllm_runtime"].call(method, args)
        return result
