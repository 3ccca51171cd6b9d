"""The weights of mixture-of-experts layers can be loaded more than once, and count as they are.

On x86 CPUs, releases before 0.12 hand the experts to IPEX, which packs a copy of their weights that no update reaches,
and which CPU builds do not ask for: without it such a model does not start.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from roll_vllm.errors import UnsupportedFeatureError
from roll_vllm.patches.patch import Patch


def loaders_kept(original: Callable[..., Any]) -> Callable[..., Any]:
    """``UnquantizedFusedMoEMethod.process_weights_after_loading`` that keeps what was attached to the parameters.

    On a CPU it keeps the parameters, too, and computes with PyTorch.
    """

    @wraps(original)
    def process_weights_after_loading(self: Any, layer: Any) -> None:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            layer.ipex_fusion = partial(_experts, layer)  # what forward_cpu calls
            return
        attached = {name: dict(vars(getattr(layer, name))) for name in ("w13_weight", "w2_weight")}
        original(self, layer)
        for name, attributes in attached.items():
            parameter = vars(getattr(layer, name))
            for key, value in attributes.items():
                parameter.setdefault(key, value)

    return process_weights_after_loading


def _experts(
    layer: Any,
    x: Any,
    use_grouped_topk: bool,
    top_k: int,
    router_logits: Any,
    renormalize: bool,
    topk_group: int | None,
    num_expert_group: int | None,
    custom_routing_function: Any,
    scoring_func: str,
    e_score_correction_bias: Any,
) -> Any:
    """The experts of one layer, one after the other, from the weights as they are now.

    Args:
        layer: holds ``w13_weight`` ``[experts, 2 * intermediate, hidden]``, gate first, and ``w2_weight``
            ``[experts, hidden, intermediate]``.
        x: ``[tokens, hidden]``.
        top_k: how many experts each token gets.
        router_logits: ``[tokens, experts]``.
        renormalize: whether the weights of a token's experts add up to 1.

    Raises:
        UnsupportedFeatureError: the model routes in another way than by a softmax over all experts.
    """
    from torch.nn.functional import linear, silu

    if use_grouped_topk or custom_routing_function is not None or scoring_func != "softmax":
        raise UnsupportedFeatureError(
            "on a CPU with vLLM 0.8.4, experts are chosen by the softmax over all of them only; use a model that does "
            "so (Mixtral, Qwen2-MoE, Qwen3-MoE), or a newer vLLM"
        )
    weights, chosen = router_logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    output = x.new_zeros(x.shape)
    for number in range(len(layer.w13_weight)):
        token, place = (chosen == number).nonzero(as_tuple=True)
        gate, up = linear(x[token], layer.w13_weight[number]).chunk(2, dim=-1)
        result = linear(silu(gate) * up, layer.w2_weight[number])
        output.index_add_(0, token, (result * weights[token, place, None]).to(x.dtype))
    return output


def nothing_packed(original: Callable[..., Any]) -> Callable[..., Any]:
    """``IPEXFusedMOE.__init__`` that leaves the weights as they are, as vLLM does on CPUs of other makes."""

    @wraps(original)
    def __init__(self: Any, layer: Any) -> None:
        from vllm.model_executor.layers.fused_moe.cpu_fused_moe import CPUFusedMOE

        CPUFusedMOE.__init__(self, layer)

    return __init__


def computed_by_torch(original: Callable[..., Any]) -> Callable[..., Any]:
    """``IPEXFusedMOE.__call__`` that is vLLM's own for CPUs of other makes, in plain PyTorch."""

    @wraps(original)
    def __call__(self: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.model_executor.layers.fused_moe.cpu_fused_moe import CPUFusedMOE

        return CPUFusedMOE.__call__(self, layer, *args, **kwargs)

    return __call__


_CPU_EXPERTS = "vllm.model_executor.layers.fused_moe.cpu_fused_moe"

PATCHES = (
    Patch(
        name="moe-loaders-kept",
        target="vllm.model_executor.layers.fused_moe.layer:UnquantizedFusedMoEMethod.process_weights_after_loading",
        versions=">=0.8.4,<0.8.5",
        replacement=loaders_kept,
        why="After the first load the experts' parameters are new ones without weight_loader, so a second load fails.",
        upstream="https://github.com/vllm-project/vllm/issues/17429",
        remove_when="0.8.4 is no longer supported",
        relies_on=("vllm.model_executor.layers.fused_moe.layer:UnquantizedFusedMoEMethod.forward_cpu",),
    ),
    Patch(
        name="moe-weights-unpacked",
        target=f"{_CPU_EXPERTS}:IPEXFusedMOE.__init__",
        versions=">=0.10.2,<0.12",
        replacement=nothing_packed,
        why="CPU, x86: IPEX packs a copy of the experts, which updates do not reach; without IPEX there is no start.",
        upstream=f"{_CPU_EXPERTS.replace('.', '/')}.py: IPEXFusedMOE",
        remove_when="0.11.1 is no longer supported (0.12.0 computes from the weights themselves)",
        relies_on=(f"{_CPU_EXPERTS}:CPUFusedMOE.__init__",),
    ),
    Patch(
        name="moe-by-torch",
        target=f"{_CPU_EXPERTS}:IPEXFusedMOE.__call__",
        versions=">=0.10.2,<0.12",
        replacement=computed_by_torch,
        why="The other half of moe-weights-unpacked: the experts are computed from their weights.",
        upstream=f"{_CPU_EXPERTS.replace('.', '/')}.py: IPEXFusedMOE",
        remove_when="0.11.1 is no longer supported",
        relies_on=(f"{_CPU_EXPERTS}:CPUFusedMOE.__call__",),
    ),
)
