"""vLLM 0.8.4: the weights of mixture-of-experts layers can be loaded more than once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from roll_vllm.patches.patch import Patch


def loaders_kept(original: Callable[..., Any]) -> Callable[..., Any]:
    """``UnquantizedFusedMoEMethod.process_weights_after_loading`` that keeps what was attached to the parameters."""

    @wraps(original)
    def process_weights_after_loading(self: Any, layer: Any) -> None:
        attached = {name: dict(vars(getattr(layer, name))) for name in ("w13_weight", "w2_weight")}
        original(self, layer)
        for name, attributes in attached.items():
            parameter = vars(getattr(layer, name))
            for key, value in attributes.items():
                parameter.setdefault(key, value)

    return process_weights_after_loading


PATCHES = (
    Patch(
        name="moe-loaders-kept",
        target="vllm.model_executor.layers.fused_moe.layer:UnquantizedFusedMoEMethod.process_weights_after_loading",
        versions=">=0.8.4,<0.8.5",
        replacement=loaders_kept,
        why="After the first load the experts' parameters are new ones without weight_loader, so a second load fails.",
        upstream="https://github.com/vllm-project/vllm/issues/17429",
        remove_when="0.8.4 is no longer supported",
    ),
)
