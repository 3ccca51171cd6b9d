"""The trainer's side of a test: reference weights, other versions of them, and what they should give."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_roll_vllm.waiting import waiting
from roll_vllm.state import WeightsStatus

if TYPE_CHECKING:
    import torch

    from pytest_roll_vllm.engines import EngineHandle
    from pytest_roll_vllm.models import Model
    from pytest_roll_vllm.models.reference import ReferenceModel

#: How vLLM fuses checkpoint tensors: engine name -> checkpoint names, concatenated along dimension 0.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
#: And those of experts, which it stacks: engine name -> the names in an expert, of Qwen3-MoE or of Mixtral.
_EXPERTS = {"w13_weight": (("gate_proj", "w1"), ("up_proj", "w3")), "w2_weight": (("down_proj", "w2"),)}


class Trainer:
    """Holds the weights of one model in as many versions as a test asks for.

    Args:
        model: the model that is trained.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._weights = functools.lru_cache(maxsize=4)(model.weights)

    @property
    def reference_version(self) -> int:
        """The version that every test finds in the engine."""
        return self.model.reference_version

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        """All checkpoint tensors of a version; a new mapping of tensors that must not be changed in place."""
        return dict(self._weights(version))

    @functools.cached_property
    def reference(self) -> ReferenceModel:
        """The Hugging Face forward pass of this model, the independent opinion on any version."""
        from pytest_roll_vllm.models.reference import ReferenceModel

        return ReferenceModel(self.model)

    @functools.cached_property
    def rounded_reference(self) -> ReferenceModel:
        """The same forward pass in the model's own dtype: shows what that dtype's rounding does."""
        from pytest_roll_vllm.models.reference import ReferenceModel

        return ReferenceModel(self.model, self.model.dtype)

    async def push(self, engine: EngineHandle, version: int, *, transport: str = "bucket", **options: Any) -> None:
        """Send a complete version through a transport of ``Target.update``."""
        engine.pushed = None
        with waiting(f"updating {self.model.name} to version {version}, transport {transport}"):
            await engine.update(self.weights(version), transport=transport, **options)
        engine.pushed = self._holds(engine, version)

    def _holds(self, engine: EngineHandle, version: int) -> tuple[Any, ...]:
        """What an engine is marked with that holds a version; not any more once somebody else updates it."""
        return self.model.name, version, getattr(engine, "weight_version", None)

    async def reset(self, engine: EngineHandle) -> None:
        """Bring a shared engine to where every test starts: awake, running, idle, reference weights, empty caches."""
        if "pause" in engine.supported:
            await engine.resume_generation()
        if "abort" in engine.supported:
            await engine.abort_all()
        state = await engine.state() if "state" in engine.supported else None
        stale = state is not None and state.weights is not WeightsStatus.COMPLETE
        if "update" in engine.supported and (stale or engine.pushed != self._holds(engine, self.reference_version)):
            await self.push(engine, self.reference_version)
        if "sleep" in engine.supported and (state is None or state.is_sleeping):
            await engine.wake_up()
        if "cache.reset" in engine.supported:
            await engine.reset_prefix_cache()

    def engine_tensors(self, version: int) -> Mapping[str, torch.Tensor]:
        """The parameters that a single-rank engine should hold for a version, by engine name.

        Covers the fused projections of Llama-like models and stacked experts; a padded vocabulary is left to the
        caller.
        """
        import torch

        weights = self.weights(version)
        tensors = _stacked_experts(weights)
        for name, tensor in weights.items():
            for fused, parts in _FUSED.items():
                part = next((p for p in parts if f".{p}." in name), None)
                if part is not None:
                    names = [name.replace(f".{part}.", f".{p}.") for p in parts]
                    tensors[name.replace(part, fused)] = torch.cat([weights[n] for n in names])
                    break
            else:
                tensors[name] = tensor
        if self.model.tied:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        return tensors

    def expected(self, prompt: list[int], max_tokens: int, version: int) -> list[int]:
        """The greedy continuation under a version, by the reference forward pass."""
        return self.reference.greedy(prompt, max_tokens, version)


def _stacked_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the experts' tensors out of ``weights``; returns them as vLLM stacks them, by engine name."""
    import torch

    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name in [name for name in weights if ".experts." in name]:
        block, _, rest = name.partition(".experts.")
        number, part, _ = rest.split(".")
        experts.setdefault(f"{block}.experts", {}).setdefault(int(number), {})[part] = weights.pop(name)
    tensors = {}
    for block, by_number in experts.items():
        for fused, parts in _EXPERTS.items():
            names = [next(name for name in alternatives if name in by_number[0]) for alternatives in parts]
            stack = [torch.cat([by_number[number][name] for name in names]) for number in sorted(by_number)]
            tensors[f"{block}.{fused}"] = torch.stack(stack)
    return tensors
