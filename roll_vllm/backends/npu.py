"""Ascend NPUs. Checked against the sources of vllm-ascend and simulated devices only (tests/backends)."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from roll_vllm import versions
from roll_vllm.backends.base import Backend

logger = logging.getLogger(__name__)

_ALLOCATOR = "PYTORCH_NPU_ALLOC_CONF"


class Npu(Backend):
    """Ascend NPUs, by the platform plugin ``vllm-ascend``, whose releases follow vLLM's."""

    name = "npu"
    kind = "npu"
    torch_device = "npu"
    ray_resource = "NPU"
    communication = "hccl"
    visibility = (("ASCEND_RT_VISIBLE_DEVICES",),)
    evidence = "simulated"

    def engines(self, vllm_version: str) -> tuple[str, ...]:
        # vllm-ascend gave up V0 before vLLM did.
        return super().engines(vllm_version) if versions.satisfies(vllm_version, "<0.10") else ("V1",)

    def _worker_class(self, vllm_version: str, engine: str) -> str:
        return f"vllm_ascend.worker.worker{'_v1' if engine == 'V1' else ''}.NPUWorker"

    def worker_environment(self, vllm_version: str, environ: Mapping[str, str], ranks: int = 1) -> dict[str, str]:
        # Ray workers inherit the variables of the node, not of this process: see environment.py, which also takes
        # expandable segments out of what is set.
        return {} if _ALLOCATOR in environ else {_ALLOCATOR: ""}

    def enable_sleep_mode(self, vllm_version: str, engine: str = "V1") -> bool:
        # The first V1 workers only log that they cannot sleep.
        return engine == "V0" or versions.at_least(vllm_version, "0.10.2")

    def release_allocator(self, environ: Mapping[str, str]) -> None:
        import torch

        from roll_vllm.environment import allocator_setting

        npu = getattr(torch, "npu", None)  # there once torch_npu is imported
        if npu is None or not npu.is_initialized():
            return
        # torch_npu 2.5.1 to 2.8.0 cannot change the settings of a running allocator.
        change = getattr(npu.memory, "_set_allocator_settings", None)
        options = environ.get(_ALLOCATOR, "")
        if change is not None:
            change(allocator_setting({_ALLOCATOR: options}))
        elif "expandable_segments:True" in options:
            logger.warning(
                "the NPU allocator of this process already runs with %s=%r, and torch_npu cannot change it; an "
                "engine inside this process cannot sleep: unset the variable before the process starts",
                _ALLOCATOR,
                options,
            )
