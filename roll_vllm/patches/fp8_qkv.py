"""vLLM 0.8.4: the block scales of an fp8 checkpoint reach fused query, key and value projections."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from roll_vllm.patches.patch import Patch


def scales_by_block(original: Callable[..., Any]) -> Callable[..., Any]:
    """``QKVParallelLinear.weight_loader_v2`` that counts block scales in blocks, as merged columns are."""

    @wraps(original)
    def weight_loader_v2(self: Any, param: Any, loaded_weight: Any, loaded_shard_id: str | None = None) -> None:
        from vllm.model_executor.parameter import BlockQuantScaleParameter

        if loaded_shard_id is None or not isinstance(param, BlockQuantScaleParameter):
            original(self, param, loaded_weight, loaded_shard_id)
            return
        rows = self.quant_method.quant_config.weight_block_size[0]
        param.load_qkv_weight(
            loaded_weight=loaded_weight,
            num_heads=self.num_kv_head_replicas,
            shard_id=loaded_shard_id,
            shard_offset=-(-self._get_shard_offset_mapping(loaded_shard_id) // rows),
            shard_size=-(-self._get_shard_size_mapping(loaded_shard_id) // rows),
        )

    return weight_loader_v2


PATCHES = (
    Patch(
        name="fp8-qkv-block-scales",
        target="vllm.model_executor.layers.linear:QKVParallelLinear.weight_loader_v2",
        versions=">=0.8.4,<0.8.5",
        replacement=scales_by_block,
        why="Scales of 128 rows each are looked for at the offsets of single rows, so block-quantised fp8 checkpoints "
        "with separate q, k and v do not load.",
        upstream="https://github.com/vllm-project/vllm/pull/11523 (review: only merged columns are handled)",
        remove_when="0.8.4 is no longer supported",
        relies_on=("vllm.model_executor.parameter:_ColumnvLLMParameter.load_qkv_weight",),
    ),
)
