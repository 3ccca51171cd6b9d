"""The rollout engine on vLLM's V1 engine: a subclass of ``AsyncLLM``, with the engine core in another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vllm.v1.engine.async_llm import AsyncLLM

from roll_vllm.engine import RolloutEngine
from roll_vllm.errors import UnsupportedFeatureError
from roll_vllm.scheduling import FREEZE, QUALNAME, THAW, BlocksInUseError


class RolloutEngineV1(RolloutEngine, AsyncLLM):
    """See :class:`roll_vllm.RolloutEngine`."""

    generation = "V1"
    _vllm: ClassVar[Any] = AsyncLLM

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        AsyncLLM.__init__(self, *args, **kwargs)
        self.vllm_config = kwargs["vllm_config"]  # 0.8.4 does not keep it

    async def _call_workers(self, method: str, args: tuple[Any, ...], kwargs: Any) -> list[Any]:
        results: list[Any] = await self.engine_core.collective_rpc_async(method, None, args, kwargs)
        return results

    async def _end(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:  # 0.8.4 takes one at a time
            await AsyncLLM.abort(self, request_id)
        # vllm-project/vllm#51629: aborting the last child by its own id leaves the parent's entry behind.
        parents = self.output_processor.parent_requests
        for parent in [key for key, value in parents.items() if not value.child_requests]:
            del parents[parent]

    @classmethod
    def _ray_executor(cls) -> Any:
        from roll_vllm.executor.ray_executor import RayExecutorV1

        return RayExecutorV1

    def _core_pid(self, places: Sequence[Mapping[str, Any]]) -> int:
        if (manager := getattr(self.engine_core.resources, "engine_manager", None)) is not None:
            return int(manager.processes[0].pid)
        return int(self.engine_core.resources.core_engines[0].proc_handle.proc.pid)  # 0.8.4

    def _fail_requests(self, error: Exception) -> None:
        for state in self.output_processor.request_states.values():
            if state.queue is None:
                continue
            if hasattr(self.output_processor, "propagate_error"):
                state.queue.put(error)
            else:  # 0.8.4 has no errors in its queues
                error.finished = True  # type: ignore[attr-defined]
                state.queue.output = error
                state.queue.ready.set()

    def unfinished_requests(self) -> dict[str, int]:
        processor = self.output_processor
        return {"requests": len(processor.request_states), "parents": len(processor.parent_requests)}

    def _request_ids(self) -> list[str]:
        processor = self.output_processor
        return [*processor.parent_requests, *processor.request_states]

    def _require_freezing(self) -> None:
        scheduler = self.vllm_config.scheduler_config.scheduler_cls
        if scheduler != QUALNAME:
            raise UnsupportedFeatureError(
                f"mode='keep' needs the runtime's own scheduler, and this engine has {scheduler}; start it without "
                "scheduler_cls and async_scheduling, or pause with mode='wait' or 'abort'"
            )

    async def _freeze(self, frozen: bool) -> None:
        # As a call and not as an abort, which nobody confirms.
        await self.engine_core.call_utility_async("abort_requests", [FREEZE if frozen else THAW])

    @property
    def logprobs_mode(self) -> str:
        mode = getattr(self.vllm_config.model_config, "logprobs_mode", "raw_logprobs")  # 0.8.4 has no other
        return str(getattr(mode, "value", mode))

    async def _settle(self) -> None:
        """Nothing: the engine core takes aborts and what follows in order."""

    async def _reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        try:
            # Up to 0.11.1 this returns nothing, whatever happened: our scheduler's error is the answer.
            return await AsyncLLM.reset_prefix_cache(self, *args, **kwargs) is not False
        except Exception as error:
            # It comes as text from the engine core.
            if BlocksInUseError.TEXT in str(error):
                return False
            raise
