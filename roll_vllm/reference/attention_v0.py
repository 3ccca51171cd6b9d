"""The attention backend of the V0 engine: the metadata of vLLM's FlashAttention, computed with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from vllm.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl, FlashAttentionMetadataBuilder

from roll_vllm.reference.attention import attend, refuse, write_cache


class ReferenceAttentionBackend(FlashAttentionBackend):
    """FlashAttention's cache layout and metadata, without FlashAttention."""

    @staticmethod
    def get_impl_cls() -> type[ReferenceAttentionImpl]:
        return ReferenceAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[ReferenceMetadataBuilder]:
        return ReferenceMetadataBuilder

    @staticmethod
    def copy_blocks(kv_caches: list[torch.Tensor], src_to_dists: torch.Tensor) -> None:
        """Copy blocks, for sequences that part; ``src_to_dists`` is ``[copies, 2]``: from, to."""
        for kv_cache in kv_caches:
            ReferenceAttentionBackend.swap_blocks(kv_cache, kv_cache, src_to_dists)

    @staticmethod
    def swap_blocks(src_kv_cache: torch.Tensor, dst_kv_cache: torch.Tensor, src_to_dst: torch.Tensor) -> None:
        """Copy blocks from one cache to another; ``src_to_dst`` is ``[copies, 2]``: from, to."""
        source, target = src_to_dst.unbind(1)
        dst_kv_cache[:, target] = src_kv_cache[:, source]


class ReferenceMetadataBuilder(FlashAttentionMetadataBuilder):
    """Gives every prompt its block table, as for a chunk of one: a reference needs no second way to attend."""

    def _add_seq_group(self, inter_data: Any, chunked_prefill_enabled: bool, prefix_cache_hit: bool) -> None:
        super()._add_seq_group(inter_data, True, prefix_cache_hit)


class ReferenceAttentionImpl(FlashAttentionImpl):
    """Attention of decoder-only models."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.attn_type != "decoder":
            refuse("encoder attention")
        if self.alibi_slopes is not None or self.logits_soft_cap:
            refuse("ALiBi or soft cap")

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
        """Compute ``output`` ``[tokens, heads, head_size]``: prompts first, then single tokens."""
        assert output is not None, "the backend accepts an output buffer, so vLLM passes one"
        write_cache(key, value, kv_cache, attn_metadata.slot_mapping)
        attend(
            output,
            query,
            kv_cache,
            attn_metadata.block_tables,
            attn_metadata.query_start_loc.tolist(),
            attn_metadata.seq_lens_tensor.tolist(),
            scale=self.scale,
            window=self.sliding_window[0] + 1 or None,
        )
        return output
