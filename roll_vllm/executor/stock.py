"""Where vLLM keeps its Ray executor: it moved, and has two of them where there are two engines."""

from __future__ import annotations

import importlib
from typing import Any

from roll_vllm import versions
from roll_vllm.errors import ConfigurationError


def _version() -> str:
    installed = versions.installed()
    if installed is None:
        raise ConfigurationError("vLLM is not installed here; install one of the tested versions")
    return installed.version


#: From here on there is one engine, and its executor samples in a call of its own.
ONE_ENGINE = versions.at_least(_version(), "0.11.1")


def worker_wrapper() -> Any:
    """vLLM's ``RayWorkerWrapper``."""
    return importlib.import_module(f"vllm.{'v1.' if ONE_ENGINE else ''}executor.ray_utils").RayWorkerWrapper


def executor(generation: str) -> Any:
    """vLLM's ``RayDistributedExecutor`` for an engine generation."""
    if generation == "V0":
        return importlib.import_module("vllm.executor.ray_distributed_executor").RayDistributedExecutor
    module = "ray_executor" if ONE_ENGINE else "ray_distributed_executor"
    return importlib.import_module(f"vllm.v1.executor.{module}").RayDistributedExecutor
