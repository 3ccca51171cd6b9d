"""The target ``roll_vllm``: the engine of ``create_async_llm``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_roll_vllm.targets import CAPABILITIES, FULL, Capability, Support, Target

if TYPE_CHECKING:
    import torch

    from roll_vllm.engine import RolloutEngine
    from roll_vllm.state import EngineState


class RollVllm(Target):
    """The rollout engine.

    Attributes:
        rollout_engine: the engine itself, for the contracts that need more of it than a target has (``runtime``).
    """

    name = "roll_vllm"
    capabilities: ClassVar[Mapping[str, Capability]] = {
        **dict.fromkeys(CAPABILITIES, FULL),
        "update.collective": Capability(
            Support.VERSIONED,
            "rank 0 of a V0 engine lives in the caller's process, and cannot form a group with it",
            engines=("V1",),
        ),
    }
    rollout_engine: RolloutEngine

    async def start(self, arguments: Mapping[str, Any]) -> None:
        from roll_vllm import create_async_llm

        self.rollout_engine = await create_async_llm(**arguments)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        named = {} if lora_request is None else {"lora_request": lora_request}
        return self.rollout_engine.generate(prompt, sampling_params, request_id=request_id, **named)

    async def shutdown(self) -> None:
        if hasattr(self, "rollout_engine"):
            self.rollout_engine.shutdown()

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self.rollout_engine.abort(request_ids)

    async def update(self, weights: Mapping[str, torch.Tensor], *, transport: str = "bucket", **options: Any) -> None:
        """As :class:`Target`; ``options`` are those of ``RolloutEngine.weight_update``."""
        async with self.rollout_engine.weight_update(transport, **options) as update:
            await update.send(weights)

    async def sleep(self, level: int = 1) -> None:
        await self.rollout_engine.offload_states(level)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        await self.rollout_engine.load_states(tags)

    async def add_lora(self, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Any:
        from roll_vllm import BucketSender

        with BucketSender() as sender:
            for payload in sender.payloads(tensors):
                ranks = self.rollout_engine.vllm_config.parallel_config.world_size
                await self.rollout_engine.update_parameter_in_bucket([payload] * ranks, is_lora=True)
        await self.rollout_engine.add_lora(config)
        return self.rollout_engine.lora_request

    async def pause_generation(self, mode: str = "abort") -> None:
        await self.rollout_engine.pause_generation(mode)

    async def resume_generation(self) -> None:
        await self.rollout_engine.resume_generation()

    async def state(self) -> EngineState:
        return await self.rollout_engine.state()

    async def checksums(self) -> list[dict[str, str]]:
        return await self.rollout_engine.checksums()

    async def reset_prefix_cache(self) -> bool:
        return await self.rollout_engine.reset_prefix_cache()
