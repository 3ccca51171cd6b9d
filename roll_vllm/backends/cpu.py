"""The CPU, by a CPU build of vLLM or by our reference platform on an official wheel."""

from __future__ import annotations

from collections.abc import Mapping

from roll_vllm import versions
from roll_vllm.backends.base import Backend

_BINDING = "VLLM_CPU_OMP_THREADS_BIND"


class Cpu(Backend):
    """The CPU, by a build of vLLM for it."""

    name = "cpu"
    kind = "cpu"
    torch_device = "cpu"
    ray_resource = "CPU"
    communication = "gloo"

    def engines(self, vllm_version: str) -> tuple[str, ...]:
        # vLLM's own CPU platform never had both.
        return ("V0",) if versions.satisfies(vllm_version, "<0.9") else ("V1",)

    def _worker_class(self, vllm_version: str, engine: str) -> str:
        return f"vllm.{'v1.' if engine == 'V1' else ''}worker.cpu_worker.CPUWorker"

    def worker_environment(self, vllm_version: str, environ: Mapping[str, str], ranks: int = 1) -> dict[str, str]:
        # Several ranks share the cores: vLLM would give one NUMA node to each, which most hosts do not have.
        return _unbound(vllm_version, environ, ranks) if ranks > 1 else {}

    def enable_sleep_mode(self, vllm_version: str, engine: str = "V1") -> bool:
        return False  # vLLM refuses it

    def release_allocator(self, environ: Mapping[str, str]) -> None:
        """Nothing: there are no expandable segments in main memory."""


class CpuReference(Cpu):
    """The CPU, by an official wheel with :mod:`roll_vllm.reference`."""

    name = "cpu-reference"

    def engines(self, vllm_version: str) -> tuple[str, ...]:
        return Backend.engines(self, vllm_version)  # all that the release has for GPUs

    def _worker_class(self, vllm_version: str, engine: str) -> str:
        return f"roll_vllm.reference.worker_{engine.lower()}.ReferenceWorker"

    def worker_environment(self, vllm_version: str, environ: Mapping[str, str], ranks: int = 1) -> dict[str, str]:
        from roll_vllm.reference import VARIABLE

        # What binds threads to cores is compiled, too.
        return {VARIABLE: "1", **_unbound(vllm_version, environ, ranks)}


def _unbound(vllm_version: str, environ: Mapping[str, str], ranks: int) -> dict[str, str]:
    """Bind no thread to a core, unless the user said how."""
    if _BINDING in environ:
        return {}
    # "all" for each rank, until there was a word for it.
    old = versions.satisfies(vllm_version, "<0.11.1")
    return {_BINDING: "|".join(["all"] * ranks) if old else "nobind"}
