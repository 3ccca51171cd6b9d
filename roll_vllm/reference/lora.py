"""LoRA layers: vLLM's arithmetic for CPUs, except for tokens without an adapter.

Their adapter has index -1, which the kernels for GPUs pass over; the CPU's take it for the last slot, and add
whatever adapter that one holds or held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


@contextmanager
def _unchanged(output: torch.Tensor, indices: torch.Tensor) -> Iterator[None]:
    """Keep the rows of ``output``, flattened to two dimensions, whose adapter index is -1."""
    rows = output.view(-1, output.shape[-1])[: len(indices)]
    without = indices[: len(rows)] < 0
    before = rows[without].clone()
    yield
    rows[without] = before


class ReferencePunicaWrapper(PunicaWrapperCPU):
    """Adds adapters to the outputs of layers, in place."""

    def add_lora_linear(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _unchanged(y, self.token_lora_indices):
            return super().add_lora_linear(y, *args, **kwargs)

    def add_lora_embedding(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _unchanged(y, self.token_lora_indices):
            return super().add_lora_embedding(y, *args, **kwargs)

    def add_lora_logits(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with _unchanged(y, self.sampler_indices):
            return super().add_lora_logits(y, *args, **kwargs)
