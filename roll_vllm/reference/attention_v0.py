"""The attention backend of the V0 engine: the metadata of vLLM's CPU backend, computed with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from vllm.attention.backends.torch_sdpa import TorchSDPABackend, TorchSDPABackendImpl, TorchSDPAMetadataBuilder

from roll_vllm.reference.attention import attend, refuse, write_cache


class ReferenceAttentionBackend(TorchSDPABackend):
    """vLLM's CPU backend with the cache layout of V1: ``[2, blocks, block_size, kv_heads, head_size]``."""

    @staticmethod
    def get_impl_cls() -> type[ReferenceAttentionImpl]:
        return ReferenceAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[ReferenceMetadataBuilder]:
        return ReferenceMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        return (2, num_blocks, block_size, num_kv_heads, head_size)

    @staticmethod
    def copy_blocks(kv_caches: list[torch.Tensor], src_to_dists: torch.Tensor) -> None:
        """Copy blocks, for sequences that part; ``src_to_dists`` is ``[copies, 2]``: from, to."""
        source, target = src_to_dists.unbind(1)
        for kv_cache in kv_caches:
            kv_cache[:, target] = kv_cache[:, source]


class ReferenceMetadataBuilder(TorchSDPAMetadataBuilder):
    """Describes every prompt as a chunk of one: then block tables are there for the cached beginning."""

    def __init__(self, input_builder: Any) -> None:
        super().__init__(input_builder)
        self.chunked_prefill = True


class ReferenceAttentionImpl(TorchSDPABackendImpl):
    """Attention of decoder-only models."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.attn_type != "decoder":
            refuse("encoder attention")
        if self.alibi_slopes is not None:
            refuse("ALiBi")

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return ``[tokens, heads * head_size]``: prompts first, then single tokens."""
        query = query.view(-1, self.num_heads, self.head_size)
        key = key.view(-1, self.num_kv_heads, self.head_size)
        value = value.view(-1, self.num_kv_heads, self.head_size)
        write_cache(key, value, kv_cache, attn_metadata.slot_mapping)
        result = torch.empty_like(query)
        prompts = attn_metadata.num_prefill_tokens
        if prompts:
            attend(
                result[:prompts],
                query[:prompts],
                kv_cache,
                attn_metadata.prefill_block_tables,
                attn_metadata.query_start_loc.tolist(),
                attn_metadata.kv_start_loc.diff().tolist(),
                scale=self.scale,
                window=self.sliding_window,
            )
        if attn_metadata.num_decode_tokens:
            attend(
                result[prompts:],
                query[prompts:],
                kv_cache,
                attn_metadata.block_tables,
                list(range(attn_metadata.num_decode_tokens + 1)),
                attn_metadata.seq_lens_tensor.tolist(),
                scale=self.scale,
                window=self.sliding_window,
            )
        return result.view(-1, self.num_heads * self.head_size)
