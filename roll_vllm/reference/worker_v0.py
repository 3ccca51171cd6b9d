"""The worker of the V0 engine.

The KV cache is ``worker.cpu_cache``: for each pipeline stage's virtual engine a list with one tensor a layer,
``[2, blocks, block_size, kv_heads, head_size]``. ``worker.model_runner.kv_caches`` lists the same tensors, as in V1.
"""

from __future__ import annotations

from typing import Any

from vllm.worker.cpu_worker import CPUWorker

from roll_vllm.environment import AppliedEnvironment
from roll_vllm.reference import ops
from roll_vllm.reference.cpu_platform import set_threads

ops.install()


class ReferenceWorker(CPUWorker):
    """vLLM's CPU worker, bound to no core."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with AppliedEnvironment({"VLLM_CPU_OMP_THREADS_BIND": "all"}):
            super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        set_threads(self.parallel_config.world_size)
        super().init_device()

    def _init_cache_engine(self) -> None:
        super()._init_cache_engine()
        self.model_runner.kv_caches = [tensor for caches in self.cpu_cache for tensor in caches]
