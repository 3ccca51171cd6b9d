"""V1: an engine core that finds too little memory for a KV cache tells the frontend so."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from roll_vllm import failure
from roll_vllm.patches import process
from roll_vllm.patches.patch import Patch


def told(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore._initialize_kv_caches`` that leaves word of too little memory; what it raises stays the same."""

    @wraps(original)
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        with failure.out_of_memory_left(os.environ.get(process.VARIABLE)):
            return original(self, vllm_config)

    return _initialize_kv_caches


PATCHES = (
    Patch(
        name="kv-cache-shortage-told",
        target="vllm.v1.engine.core:EngineCore._initialize_kv_caches",
        versions=">=0.8.4,<0.13",
        replacement=told,
        why="V1: a start with too little memory for a KV cache fails, and the caller gets to know no reason.",
        upstream='vllm/v1/engine/utils.py: wait_for_engine_startup, "Engine core initialization failed"',
        remove_when="vLLM passes the error that ended its engine core on to the frontend",
    ),
)
