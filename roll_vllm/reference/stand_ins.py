"""Everything that the reference platform replaces in vLLM and torch, and nothing else does.

Each replacement has a release range: what a later release asks of its platform needs none.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from roll_vllm import versions


def version() -> str:
    """The installed vLLM's version."""
    vllm = versions.installed()
    assert vllm is not None, "only reached from inside vLLM"
    return vllm.version


def install() -> None:
    """Put the permanent stand-ins in place; repeated calls change nothing."""
    if versions.satisfies(version(), "<0.11"):
        _cumem_allocator()
    if versions.satisfies(version(), "<0.10.2"):
        _float32_in_v1()


def _cumem_allocator() -> None:
    """``vllm.cumem_allocator`` links libcuda, and vLLM imports it with the V0 worker, in 0.8.4 with that of V1 too."""
    name = "vllm.cumem_allocator"
    if name in sys.modules:
        return

    def unavailable(*args: Any) -> None:
        raise RuntimeError("vLLM's sleep mode needs CUDA; the CPU reference platform has no CuMemAllocator")

    module = ModuleType(name)
    for function in ("init_module", "python_create_and_map", "python_unmap_and_release"):
        setattr(module, function, unavailable)
    sys.modules[name] = module


def _float32_in_v1() -> None:
    """0.8.4 refuses float32 with the V1 engine because FlashAttention does; PyTorch's attention does not."""
    import torch
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs._is_v1_supported_oracle
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def oracle(self: Any, model_config: Any) -> bool:
        dtype = model_config.dtype
        model_config.dtype = torch.bfloat16
        try:
            return bool(original(self, model_config))
        finally:
            model_config.dtype = dtype

    EngineArgs._is_v1_supported_oracle = oracle


@contextmanager
def cuda_absent() -> Iterator[None]:
    """Let vLLM's GPU model runner of 0.8.4 ask ``torch.cuda`` for properties and synchronisation, while it lasts."""
    import torch

    answers = {
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=1),
        "synchronize": lambda device=None: None,
    }
    before = {name: getattr(torch.cuda, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
        yield
    finally:
        for name, function in before.items():
            setattr(torch.cuda, name, function)
