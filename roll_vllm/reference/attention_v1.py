"""The attention backend of the V1 engine: the metadata of vLLM's FlashAttention, computed with PyTorch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from roll_vllm.reference.attention import attend, refuse, write_cache


class ReferenceAttentionBackend(FlashAttentionBackend):
    """FlashAttention's cache layout and metadata, without FlashAttention."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_supported_dtypes(cls) -> list[torch.dtype]:
        return cls.supported_dtypes

    @staticmethod
    def get_impl_cls() -> type[ReferenceAttentionImpl]:
        return ReferenceAttentionImpl


class ReferenceAttentionImpl(FlashAttentionImpl):
    """Attention of decoder-only models."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "attn_type", "decoder") != "decoder":
            refuse("encoder attention")
        if self.alibi_slopes is not None or self.logits_soft_cap or getattr(self, "sinks", None) is not None:
            refuse("ALiBi, soft cap or attention sinks")

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute ``output`` ``[tokens, heads, head_size]``; rows behind the batch's last token are padding."""
        assert output is not None, "the backend accepts an output buffer, so vLLM passes one"
        if attn_metadata is None:  # a dummy run, with no cache yet
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        if getattr(self, "kv_sharing_target_layer_name", None) is None:
            write_cache(key[:tokens], value[:tokens], kv_cache, attn_metadata.slot_mapping[:tokens])
        attend(
            output.view(-1, self.num_heads, self.head_size),
            query.view(-1, self.num_heads, self.head_size),
            kv_cache,
            attn_metadata.block_table,
            attn_metadata.query_start_loc.tolist(),
            attn_metadata.seq_lens.tolist(),
            scale=self.scale,
            causal=getattr(attn_metadata, "causal", True),
            window=self.sliding_window[0] + 1 or None,
        )
        return output
