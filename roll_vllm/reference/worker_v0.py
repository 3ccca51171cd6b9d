"""The worker of the V0 engine: vLLM's worker for GPUs, which asks CUDA for nothing but memory.

The KV cache is ``worker.gpu_cache``: for each virtual engine (one a pipeline stage) a list with one tensor a layer,
``[2, blocks, block_size, kv_heads, head_size]``. ``worker.model_runner.kv_caches`` lists the same tensors, as in V1.
"""

from __future__ import annotations

import torch

from roll_vllm.reference import ops, stand_ins
from roll_vllm.reference.cpu_platform import set_threads

stand_ins.install()
ops.install()

from vllm.distributed import (  # noqa: E402  the worker imports what stands in
    ensure_model_parallel_initialized,
    init_distributed_environment,
    set_custom_all_reduce,
)
from vllm.model_executor.utils import set_random_seed  # noqa: E402
from vllm.worker.worker import Worker  # noqa: E402


class ReferenceWorker(Worker):
    """vLLM's GPU worker, with main memory as its device."""

    def init_device(self) -> None:
        self.device = torch.device("cpu")
        parallel = self.parallel_config
        set_threads()
        set_custom_all_reduce(False)
        init_distributed_environment(
            parallel.world_size, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        ensure_model_parallel_initialized(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        set_random_seed(self.model_config.seed)

    def determine_num_available_blocks(self) -> tuple[int, int]:
        """Return how many blocks ``VLLM_CPU_KVCACHE_SPACE`` grants, and how many may be swapped out."""
        size = self.get_cache_block_size_bytes()
        blocks = int(self.cache_config.cpu_kvcache_space_bytes // size)
        return blocks, min(blocks, int(self.cache_config.swap_space_bytes // size))

    def _init_cache_engine(self) -> None:
        super()._init_cache_engine()
        self.model_runner.kv_caches = [tensor for caches in self.gpu_cache for tensor in caches]
