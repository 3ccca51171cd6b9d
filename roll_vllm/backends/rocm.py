"""AMD GPUs. Checked against vLLM's sources and simulated devices only (tests/backends)."""

from __future__ import annotations

from collections.abc import Mapping

from roll_vllm import versions
from roll_vllm.backends.cuda import Cuda


class Rocm(Cuda):
    """AMD GPUs, which torch and vLLM call by CUDA's names in most places."""

    name = "rocm"
    kind = "rocm"
    # HIP falls back to CUDA_VISIBLE_DEVICES, and counts within what ROCr shows it.
    visibility = (("ROCR_VISIBLE_DEVICES",), ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"))
    evidence = "simulated"

    def default_engine(self, vllm_version: str) -> str:
        return self.engines(vllm_version)[0]

    def worker_environment(self, vllm_version: str, environ: Mapping[str, str], ranks: int = 1) -> dict[str, str]:
        # vLLM hands out devices by CUDA's variable, and refuses to start where HIP's says something else.
        visible = next((environ[name] for name in self.visibility[-1] if name in environ), None)
        return {} if visible is None else self.show_only([visible])

    def enable_sleep_mode(self, vllm_version: str, engine: str = "V1") -> bool:
        # Before, vLLM's memory pool is for CUDA only.
        return versions.at_least(vllm_version, "0.11.1")
