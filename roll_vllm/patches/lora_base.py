"""LoRA on CPUs: what has no adapter gets none, also beside what has one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from roll_vllm.patches.patch import Patch


def sparing_base(indices: str) -> Callable[[Any], Any]:
    """``PunicaWrapperCPU.add_lora_...`` that leaves the rows as they are whose adapter index is -1.

    Args:
        indices: the wrapper's attribute with the index of each row.
    """

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def add(self: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
            import torch

            index = getattr(self, indices)
            rows = y.view(-1, y.shape[-1])[: len(index)]
            before = rows.clone()
            result = original(self, y, *args, **kwargs)
            # No row is picked out: how many there are is not known when this is compiled.
            rows.copy_(torch.where(index[: len(rows), None] < 0, before, rows))
            return result

        return add

    return replacement


def _entry(what: str, indices: str) -> Patch:
    return Patch(
        name=f"lora-spares-base-{what}",
        target=f"vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_{what}",
        versions=">=0.8.4,<0.13",
        replacement=sparing_base(indices),
        why="CPU: a request for the base model that runs beside one with an adapter is answered with the adapter, "
        "since there the index -1 means the last slot.",
        upstream="https://github.com/vllm-project/vllm/pull/48421",
        remove_when="vllm/lora/ops/torch_ops/lora_ops.py passes over the index -1",
        relies_on=(
            "vllm.lora.ops.torch_ops.lora_ops:bgmv_shrink",
            "vllm.lora.ops.torch_ops.lora_ops:bgmv_expand",
            "vllm.lora.ops.torch_ops.lora_ops:bgmv_expand_slice",
        ),
    )


PATCHES = (
    _entry("linear", "token_lora_indices"),
    _entry("embedding", "token_lora_indices"),
    _entry("logits", "sampler_indices"),
)
