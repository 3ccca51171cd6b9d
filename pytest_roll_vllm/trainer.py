"""The trainer's side of a test: reference weights, other versions of them, and what they should give."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from roll_vllm.state import WeightsStatus

if TYPE_CHECKING:
    import torch

    from pytest_roll_vllm.engines import EngineHandle
    from pytest_roll_vllm.models import Model
    from pytest_roll_vllm.models.reference import ReferenceModel

#: How vLLM fuses checkpoint tensors: engine name -> checkpoint names, concatenated along dimension 0.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


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
        """Send a complete version through a transport of ``engine.weight_update``."""
        engine.pushed = None
        async with engine.weight_update(transport, **options) as update:
            await update.send(self.weights(version))
        engine.pushed = (self.model.name, version, engine.weight_version)

    async def reset(self, engine: EngineHandle) -> None:
        """Bring a shared engine to where every test starts: awake, idle, reference weights, empty caches."""
        await engine.abort_all()
        state = await engine.state()
        wanted = (self.model.name, self.reference_version, engine.weight_version)
        if engine.pushed != wanted or state.weights is not WeightsStatus.COMPLETE:
            await self.push(engine, self.reference_version)
        if state.is_sleeping:
            await engine.load_states()
        await engine.reset_prefix_cache()

    def engine_tensors(self, version: int) -> Mapping[str, torch.Tensor]:
        """The parameters that a single-rank engine should hold for a version, by engine name.

        Covers the fused projections of Llama-like models; a padded vocabulary is left to the caller.
        """
        import torch

        weights = self.weights(version)
        tensors: dict[str, torch.Tensor] = {}
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
