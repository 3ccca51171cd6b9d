"""Experts that load again and are computed from their weights; fp8 scales that find their place (0.8.4)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from on_vllm import SELECTED

from roll_vllm.errors import UnsupportedFeatureError

for_fp8 = pytest.mark.skipif(
    all(patch.name != "fp8-qkv-block-scales" for patch in SELECTED), reason="0.8.4 alone needs fp8-qkv-block-scales"
)
for_experts = pytest.mark.skipif(
    all(patch.name != "moe-loaders-kept" for patch in SELECTED), reason="0.8.4 alone needs moe-loaders-kept"
)


def experts(owner: Any) -> tuple[Any, torch.nn.Module]:
    layer = torch.nn.Module()
    method = owner()
    method.create_weights(
        layer, num_experts=2, hidden_size=4, intermediate_size_per_partition=3, params_dtype=torch.float32,
        weight_loader="the loader", other=1,
    )  # fmt: skip
    return method, layer


@for_experts
def test_upstream_loses_the_loaders() -> None:
    from vllm.model_executor.layers.fused_moe.layer import UnquantizedFusedMoEMethod

    method, layer = experts(UnquantizedFusedMoEMethod)
    method.process_weights_after_loading(layer)
    assert not hasattr(layer.w13_weight, "weight_loader")


@for_experts
def test_experts_keep_their_loaders(patched: Callable[[str], Any]) -> None:
    method, layer = experts(patched("moe-loaders-kept"))
    layer.w13_weight.data.fill_(1.0)
    for _ in range(2):
        before = layer.w13_weight
        method.process_weights_after_loading(layer)
        assert layer.w13_weight is not before
        for parameter in (layer.w13_weight, layer.w2_weight):
            assert (parameter.weight_loader, parameter.other) == ("the loader", 1)
    assert layer.w13_weight.eq(1.0).all()


def routed(layer: torch.nn.Module, x: torch.Tensor, router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """What the experts must give, token by token."""
    rows = []
    for token, logits in zip(x, router_logits, strict=True):
        weights, chosen = logits.softmax(dim=-1).topk(top_k)
        row = torch.zeros_like(token)
        for weight, expert in zip(weights / weights.sum(), chosen, strict=True):
            gate, up = (layer.w13_weight[expert] @ token).chunk(2)
            row += weight * (layer.w2_weight[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def layer_of_experts() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Four experts with random weights, five tokens, and their router logits."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Module()
    for name, shape in (("w13_weight", (4, 6, 8)), ("w2_weight", (4, 8, 3))):
        values = torch.randn(shape, generator=generator)
        layer.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))
    return layer, torch.randn(5, 8, generator=generator), torch.randn(5, 4, generator=generator)


@for_experts
def test_experts_on_a_cpu_are_computed_from_their_weights(
    patched: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    owner = patched("moe-loaders-kept")
    layer, x, logits = layer_of_experts()
    before = layer.w13_weight
    owner().process_weights_after_loading(layer)
    assert layer.w13_weight is before

    def computed(scoring: str = "softmax") -> torch.Tensor:
        result: torch.Tensor = owner().forward_cpu(layer, x, False, 2, logits, True, scoring_func=scoring)
        return result

    for _ in range(2):
        assert torch.allclose(computed(), routed(layer, x, logits, 2), atol=1e-5)
        layer.w13_weight.data.neg_()
    with pytest.raises(UnsupportedFeatureError, match="softmax"):
        computed("sigmoid")


def test_experts_are_not_packed(patched: Callable[[str], Any]) -> None:
    patched("moe-weights-unpacked")
    owner = patched("moe-by-torch")
    layer, x, logits = layer_of_experts()
    for _ in range(2):
        result = owner(layer)(layer, x, False, 2, logits, True, global_num_experts=4)
        assert torch.allclose(result, routed(layer, x, logits, 2), atol=1e-5)
        layer.w13_weight.data.neg_()


@pytest.mark.parametrize("is_patched", [False, True])
def test_norms_of_slices(patched: Callable[[str], Any], is_patched: bool) -> None:
    if all(patch.name != "cpu-norm-of-slices" for patch in SELECTED):
        pytest.skip("0.12.0 alone needs cpu-norm-of-slices")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("needs the kernel of a CPU build")
    if is_patched:
        patched("cpu-norm-of-slices")
    with set_current_vllm_config(VllmConfig()):
        norm = RMSNorm(8)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))[:, :16].view(5, 2, 8)
    assert torch.allclose(norm.forward_cuda(x), norm.forward_native(x), atol=1e-5) is is_patched


ROWS, COLUMNS = 4, 2
HEADS, KV_HEADS, SIZE = 4, 2, 8


def projections(owner: Any) -> Any:
    """What the loader asks a QKVParallelLinear with 4 heads and 2 key-value heads of 8 rows, on one rank."""
    linear = SimpleNamespace(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=SIZE,
        num_kv_head_replicas=1,
        quant_method=SimpleNamespace(quant_config=SimpleNamespace(weight_block_size=[ROWS, COLUMNS])),
    )
    for name in ("_get_shard_offset_mapping", "_get_shard_size_mapping"):
        setattr(linear, name, getattr(owner, name).__get__(linear))
    return linear


def load(loader: Any, linear: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from vllm.model_executor.parameter import BlockQuantScaleParameter, ModelWeightParameter

    rows = (HEADS + 2 * KV_HEADS) * SIZE
    weight = ModelWeightParameter(
        data=torch.full((rows, 4), -1.0), input_dim=1, output_dim=0, weight_loader=lambda *_: None
    )
    scale = BlockQuantScaleParameter(
        data=torch.full((rows // ROWS, 4 // COLUMNS), -1.0), input_dim=1, output_dim=0, weight_loader=lambda *_: None
    )
    for shard, heads, value in (("q", HEADS, 1.0), ("k", KV_HEADS, 2.0), ("v", KV_HEADS, 3.0)):
        loader(linear, weight, torch.full((heads * SIZE, 4), value), shard)
        loader(linear, scale, torch.full((heads * SIZE // ROWS, 4 // COLUMNS), value), shard)
    return weight.data[:, 0], scale.data[:, 0]


@for_fp8
def test_upstream_misplaces_block_scales(one_rank: None) -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        load(QKVParallelLinear.weight_loader_v2, projections(QKVParallelLinear))


@for_fp8
def test_block_scales_of_projections(one_rank: None, patched: Callable[[str], Any]) -> None:
    owner = patched("fp8-qkv-block-scales")
    for _ in range(2):
        weight, scale = load(owner.weight_loader_v2, projections(owner))
        assert weight.tolist() == [1.0] * 32 + [2.0] * 16 + [3.0] * 16
        assert scale.tolist() == [1.0] * 8 + [2.0] * 4 + [3.0] * 4
