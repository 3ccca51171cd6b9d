"""A start that finds too little memory for a KV cache: vLLM's own code, with an executor that has none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roll_vllm import failure
from roll_vllm.errors import OUT_OF_MEMORY_REMEDY, EngineOutOfMemoryError
from roll_vllm.patches import process


def core(available: int) -> Any:
    """What the method needs of an engine core, with one attention layer and so many bytes for it."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    fields = {"block_size": 16, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32, "use_mla": False}
    taken = inspect.signature(FullAttentionSpec).parameters
    spec = FullAttentionSpec(**{name: value for name, value in fields.items() if name in taken})
    executor = SimpleNamespace(
        get_kv_cache_specs=lambda: [{"layer": spec}], determine_available_memory=lambda: [available]
    )
    return SimpleNamespace(model_executor=executor)


@pytest.mark.parametrize(
    ("available", "message"),
    [(0, "No available memory for the cache blocks"), (4096, "larger than the available KV cache memory")],
)
def test_the_reason_is_left(
    patched: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, available: int, message: str
) -> None:
    owner = patched("kv-cache-shortage-told")
    monkeypatch.setenv(process.VARIABLE, str(tmp_path))
    config = SimpleNamespace(  # what all releases ask of one before they notice
        model_config=SimpleNamespace(max_model_len=4096, original_max_model_len=4096),
        cache_config=SimpleNamespace(num_gpu_blocks_override=None, block_size=16),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        kv_events_config=None,
        kv_transfer_config=None,
    )
    with pytest.raises(ValueError, match=message):
        owner._initialize_kv_caches(core(available), config)
    left = failure.read(tmp_path)
    assert isinstance(left, EngineOutOfMemoryError)
    assert message in str(left)
    assert str(left).endswith(OUT_OF_MEMORY_REMEDY)
