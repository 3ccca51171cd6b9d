"""The worker of the V1 engine.

The KV cache is ``worker.model_runner.kv_caches``, one tensor a layer,
``[2, blocks, block_size, kv_heads, head_size]``, as everywhere in V1.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.utils import set_random_seed

from roll_vllm import versions
from roll_vllm.reference import ops, stand_ins
from roll_vllm.reference.cpu_platform import set_threads

ops.install()

# Until 0.10.2 the V1 engine has no worker for CPUs.
_HAS_CPU_WORKER = versions.at_least(stand_ins.version(), "0.10.2")
_WAITS_WITHOUT_TOKENS = not versions.at_least(stand_ins.version(), "0.11.0")

if _HAS_CPU_WORKER:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as ReferenceModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    class ReferenceWorker(CPUWorker):
        """vLLM's CPU worker, bound to no core."""

        def init_device(self) -> None:
            self.device = torch.device("cpu")  # Ray's worker wrapper asks for it
            set_threads()
            init_worker_distributed_environment(
                self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
            )
            set_random_seed(self.model_config.seed)
            self.model_runner = ReferenceModelRunner(self.vllm_config, self.device)

        def execute_model(self, scheduler_output: Any) -> Any:
            # Such a step only says which requests have ended, and 0.10.2's rank waits for what none before it sends.
            if _WAITS_WITHOUT_TOKENS and not scheduler_output.total_num_scheduled_tokens:
                return self.model_runner.execute_model(scheduler_output)
            return super().execute_model(scheduler_output)

else:
    stand_ins.install()  # a worker process may get here first
    from vllm.distributed import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
        set_custom_all_reduce,
    )
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    class ReferenceModelRunner(GPUModelRunner):  # type: ignore[no-redef]
        """vLLM's GPU model runner, which asks CUDA for little more than its name."""

        def __init__(self, vllm_config: Any, device: torch.device) -> None:
            with stand_ins.cuda_absent():
                super().__init__(vllm_config, device)

        def _get_prompt_logprobs_dict(self, *args: Any, **kwargs: Any) -> Any:
            with stand_ins.cuda_absent():
                return super()._get_prompt_logprobs_dict(*args, **kwargs)

    class ReferenceWorker(Worker):  # type: ignore[no-redef]
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
            self.model_runner = ReferenceModelRunner(self.vllm_config, self.device)

        def determine_available_memory(self) -> int:
            """Return what ``VLLM_CPU_KVCACHE_SPACE`` grants, in bytes."""
            return int(self.cache_config.cpu_kvcache_space_bytes)
