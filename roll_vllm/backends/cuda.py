"""NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from roll_vllm.backends.base import Backend, Kind


class Cuda(Backend):
    """NVIDIA GPUs, by vLLM's official wheels."""

    name = "cuda"
    kind: ClassVar[Kind] = "cuda"
    torch_device = "cuda"
    ray_resource = "GPU"
    communication = "nccl"
    visibility: ClassVar[tuple[tuple[str, ...], ...]] = (("CUDA_VISIBLE_DEVICES",),)

    def _worker_class(self, vllm_version: str, engine: str) -> str:
        return "vllm.worker.worker.Worker" if engine == "V0" else "vllm.v1.worker.gpu_worker.Worker"

    def worker_environment(self, vllm_version: str, environ: Mapping[str, str], ranks: int = 1) -> dict[str, str]:
        from roll_vllm import devices

        return devices.by_index(environ)

    def enable_sleep_mode(self, vllm_version: str, engine: str = "V1") -> bool:
        return True

    def release_allocator(self, environ: Mapping[str, str]) -> None:
        import torch

        from roll_vllm.environment import allocator_setting

        # Before it is initialised, the allocator has not read the variables yet.
        if torch.cuda.is_initialized():
            torch.cuda.memory._set_allocator_settings(allocator_setting(environ))
