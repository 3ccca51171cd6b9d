"""vLLM 0.12.0 on CPUs: a norm reads what it is given, and not what lies beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from roll_vllm.patches.patch import Patch


def of_slices(original: Callable[..., Any]) -> Callable[..., Any]:
    """``RMSNorm.forward_cuda``, which CPUs run too, with inputs that their kernel can read: contiguous ones."""

    @wraps(original)
    def forward_cuda(self: Any, x: Any, residual: Any = None) -> Any:
        if x.device.type == "cpu" and residual is None:
            x = x.contiguous()
        return original(self, x, residual)

    return forward_cuda


PATCHES = (
    Patch(
        name="cpu-norm-of-slices",
        target="vllm.model_executor.layers.layernorm:RMSNorm.forward_cuda",
        versions=">=0.12,<0.13",
        replacement=of_slices,
        why="CPU, eager: the norms of q and k (Qwen3) read other elements than theirs, and the model speaks nonsense.",
        upstream="https://github.com/vllm-project/vllm/pull/31643",
        remove_when="0.12.0 is no longer supported",
    ),
)
