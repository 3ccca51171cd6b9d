"""The worker of the V0 engine.

The KV cache is ``worker.cpu_cache``: for each pipeline stage's virtual engine a list with one tensor a layer,
``[2, blocks, block_size, kv_heads, head_size]``. ``worker.model_runner.kv_caches`` lists the same tensors, as in V1.
"""

from __future__ import annotations

import weakref
from typing import Any

from vllm.worker.cpu_model_runner import ModelInputForCPUBuilder
from vllm.worker.cpu_worker import CPUWorker

from roll_vllm.environment import AppliedEnvironment
from roll_vllm.reference import ops
from roll_vllm.reference.cpu_platform import set_threads

ops.install()


class ReferenceInputBuilder(ModelInputForCPUBuilder):
    """Tells the engine how much of a prompt was found in the prefix cache, as the builder for GPUs does."""

    def _compute_prompt_input_tokens(self, data: Any, group: Any, sequence: Any, sequence_id: int) -> None:
        super()._compute_prompt_input_tokens(data, group, sequence, sequence_id)
        if group.computed_block_nums:
            sequence.update_num_cached_tokens(len(group.computed_block_nums) * self.block_size)


class ReferenceWorker(CPUWorker):
    """vLLM's CPU worker, bound to no core."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with AppliedEnvironment({"VLLM_CPU_OMP_THREADS_BIND": "all"}):
            super().__init__(*args, **kwargs)
        self.model_runner.builder = ReferenceInputBuilder(weakref.proxy(self.model_runner))

    def init_device(self) -> None:
        set_threads()
        super().init_device()

    def _init_cache_engine(self) -> None:
        super()._init_cache_engine()
        self.model_runner.kv_caches = [tensor for caches in self.cpu_cache for tensor in caches]
