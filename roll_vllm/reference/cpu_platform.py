"""The platform class that vLLM asks for devices, workers and attention backends."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch
from vllm.platforms.cpu import CpuPlatform

from roll_vllm import versions
from roll_vllm.reference import NAME, stand_ins
from roll_vllm.reference.attention import refuse

# torch.compile of vLLM's small helpers takes 10 s and more in every process, even without Inductor.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

_BLOCK_SIZE = 16  # tokens; vLLM's default on GPUs, and all that the CPU platforms of some releases let pass


def _engine() -> str:
    """The engine generation that is being started, as vLLM decides it."""
    import vllm.envs as envs

    # The variable is gone where there is only one generation left.
    return "V1" if getattr(envs, "VLLM_USE_V1", True) else "V0"


class CpuReferencePlatform(CpuPlatform):
    """vLLM's CPU platform without its compiled operators."""

    dist_backend: str = "gloo"
    simple_compile_backend: str = "eager"
    # Ray counts accelerators by this key, and vLLM's executors know only this one that needs no resource of ours:
    # the workers' machines are started with as many logical GPUs as they shall hold workers.
    ray_device_key: str = "GPU"

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return NAME

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        super().pre_register_and_update(parser)
        stand_ins.install()

    @classmethod
    def supports_v1(cls, model_config: Any) -> bool:
        return True

    @classmethod
    def default_v1(cls, model_config: Any) -> bool:
        return True

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def get_current_memory_usage(cls, device: Any = None) -> float:
        return float(psutil.Process().memory_info().rss)

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        # Plain gloo: the one for CPUs wants the compiled shared-memory collectives.
        return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "roll_vllm.reference.lora.ReferencePunicaWrapper"

    @classmethod
    def get_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> str:
        return f"roll_vllm.reference.attention_{_engine().lower()}.ReferenceAttentionBackend"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Let vLLM's CPU platform adapt the configuration, keep what the caller chose, switch compilation off."""
        cache, parallel, model = vllm_config.cache_config, vllm_config.parallel_config, vllm_config.model_config
        if cache.cache_dtype != "auto":
            raise ValueError(f"{NAME} has no kv_cache_dtype={cache.cache_dtype!r}; leave it at 'auto'")
        if vllm_config.speculative_config is not None:
            raise ValueError(f"{NAME} has no speculative decoding; leave out speculative_config")
        if model is not None and model.use_mla:
            refuse("latent attention (MLA)")
        executor, block_size = parallel.distributed_executor_backend, cache.block_size or _BLOCK_SIZE
        worker, threads = parallel.worker_cls, os.environ.get("OMP_NUM_THREADS")
        cache.block_size = _BLOCK_SIZE
        super().check_and_update_config(vllm_config)
        cache.block_size = block_size
        parallel.distributed_executor_backend = executor
        parallel.disable_custom_all_reduce = True
        if worker == "auto":
            parallel.worker_cls = f"roll_vllm.reference.worker_{_engine().lower()}.ReferenceWorker"
        _restore("OMP_NUM_THREADS", threads)  # vLLM would set it to all cores, for every rank
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        if model is not None:
            model.enforce_eager = True
            model.disable_cascade_attn = True
        _switch_compilation_off(vllm_config.compilation_config)
        stand_ins.install()


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _switch_compilation_off(compilation: Any) -> None:
    # A level and a mode of 0 both mean: no compilation.
    old = versions.satisfies(stand_ins.version(), "<0.11.1")
    setattr(compilation, "level" if old else "mode", 0)
    # The compiled ones are for CUDA, and so is what vLLM calls the native form of experts.
    compilation.custom_ops = ["none", "+unquantized_fused_moe"]
    compilation.cudagraph_capture_sizes = []
    compilation.compile_sizes = []
    if getattr(compilation, "max_capture_size", 0) is None:  # V0's model runner allocates that many rows
        compilation.max_capture_size = 0
    if hasattr(compilation, "cudagraph_mode"):
        from vllm.config import CUDAGraphMode

        compilation.cudagraph_mode = CUDAGraphMode.NONE


def set_threads() -> None:
    """Let this process compute with one thread, unless the environment says how many.

    Several engines, their tests and their reference models share a machine's cores, and threads that wait for each
    other make no progress there.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
