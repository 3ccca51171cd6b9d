"""Attention over a paged KV cache, in plain PyTorch. Shared by all releases and both engine generations."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def write_cache(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Store the keys and values of new tokens.

    Args:
        key: ``[tokens, kv_heads, head_size]``.
        value: Likewise.
        kv_cache: ``[2, blocks, block_size, kv_heads, head_size]``, written in place.
        slots: int64 ``[tokens]``: block times block size plus position in the block; negative for padding.
    """
    if bool((slots < 0).any()):
        real = slots >= 0
        key, value, slots = key[real], value[real], slots[real]
    # A view, not a reshape: what is written to a copy would be lost.
    flat = kv_cache.view(2, -1, *kv_cache.shape[3:])
    flat[0].index_copy_(0, slots, key.to(kv_cache.dtype))
    flat[1].index_copy_(0, slots, value.to(kv_cache.dtype))


def attend(
    output: torch.Tensor,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_starts: list[int],
    lengths: list[int],
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> None:
    """Attend from new tokens to everything before them; several sequences, one after the other.

    Args:
        output: ``[tokens, heads, head_size]``, written in place.
        query: Likewise; the new tokens of all sequences in a row.
        kv_cache: ``[2, blocks, block_size, kv_heads, head_size]``; holds the new tokens already.
        block_table: int ``[sequences, at least as many blocks as the longest has]``.
        query_starts: Where each sequence begins in ``query``, and at last their end.
        lengths: The length of each sequence, with its new tokens.
        scale: What the scores are multiplied with.
        causal: Whether a token sees only what comes before it.
        window: How many tokens a token sees, itself included; ``None`` for all.
    """
    block_size = kv_cache.shape[2]
    for index, length in enumerate(lengths):
        start, end = query_starts[index], query_starts[index + 1]
        count = end - start
        if not count:
            continue
        blocks = block_table[index, : -(-length // block_size)]
        key, value = kv_cache[:, blocks].flatten(1, 2)[:, :length].transpose(1, 2)
        mask = _mask(count, length, window) if causal and (window or count > 1) else None
        output[start:end] = scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            key[None],
            value[None],
            attn_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[0],
        )[0].transpose(0, 1)


def _mask(count: int, length: int, window: int | None) -> torch.Tensor:
    """Return bool ``[count, length]``: what each of the last ``count`` tokens sees."""
    seen = torch.ones(count, length, dtype=torch.bool).tril_(length - count)
    return seen.triu_(length - count - window + 1) if window else seen


def refuse(what: str) -> None:
    """Raise because a model asks for a kind of attention that the reference does not have."""
    raise NotImplementedError(f"the CPU reference platform has no {what}; run this model on a GPU or a CPU build")
