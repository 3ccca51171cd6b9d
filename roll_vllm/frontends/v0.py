"""The rollout engine on vLLM's V0 engine: a subclass of ``AsyncLLMEngine``, whose rank 0 lives in this process."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vllm.engine.async_llm_engine import AsyncLLMEngine

from roll_vllm.engine import RolloutEngine
from roll_vllm.frontends import local_device

logger = logging.getLogger(__name__)

_POLL_S = 0.01
_END_S = 3.0


class RolloutEngineV0(RolloutEngine, AsyncLLMEngine):
    """See :class:`roll_vllm.RolloutEngine`.

    What V1 does by itself and this class adds: an aborted request ends with one final output that holds its tokens
    (V0 raises ``CancelledError`` in the caller), and remote calls never meet a running step.
    """

    generation = "V0"
    _vllm: ClassVar[Any] = AsyncLLMEngine
    #: The engines of this process, which share vLLM's parallel state.
    _alive: ClassVar[set[int]] = set()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        before = local_device.pool_bytes()
        try:
            AsyncLLMEngine.__init__(self, *args, **kwargs)
        except BaseException:
            if not before and local_device.pool_bytes():
                local_device.end_start()
            raise
        self.vllm_config = kwargs["vllm_config"]
        self._device_gate = local_device.Gate()
        worker = local_device.local_worker(self.engine.model_executor)
        if worker is not None:
            # A step goes on in its thread when the loop that waits for it has ended.
            worker.model_runner.execute_model = self._device_gate.behind(worker.model_runner.execute_model)
        RolloutEngineV0._alive.add(id(self))
        self._stepping = asyncio.Lock()
        self._run_step, self.engine.step_async = self.engine.step_async, self._step
        self._stop_loops, self._stopping = self.engine.stop_remote_worker_execution_loop_async, asyncio.Lock()
        self.engine.stop_remote_worker_execution_loop_async = self._stop_worker_loops
        self._consumers: dict[str, asyncio.Task[Any] | None] = {}
        self._aborted: dict[str, Any] = {}

    # -- remote calls ---------------------------------------------------------------------------------------

    async def engine_step(self, virtual_engine: int) -> bool:
        """As vLLM's ``engine_step``, while no remote call runs. Frozen, all it does is to let aborted requests go."""
        if self._frozen:
            await asyncio.sleep(_POLL_S)
        async with self._stepping:
            step: Any = asyncio.current_task()
            self._unanswered.add(step)  # Ray may never answer it, and everybody else waits for its end
            try:
                return bool(await AsyncLLMEngine.engine_step(self, virtual_engine))
            finally:
                self._unanswered.discard(step)

    async def _step(self, virtual_engine: int) -> list[Any]:
        return [] if self._frozen else list(await self._run_step(virtual_engine))

    def _require_freezing(self) -> None:
        """Nothing: it always works."""

    async def _freeze(self, frozen: bool) -> None:
        async with self._stepping:  # after the step that runs
            # A pause may last longer than the other ranks wait for a step.
            await self.engine.stop_remote_worker_execution_loop_async()

    @property
    def logprobs_mode(self) -> str:
        return "processed_logprobs"  # of which V0 samples, in all releases

    async def _stop_worker_loops(self) -> None:
        """As vLLM's ``stop_remote_worker_execution_loop_async``, which fails if two run at once.

        vLLM calls it when the last request has ended, and remote calls do whenever they come.
        """
        async with self._stopping:
            await self._stop_loops()

    async def _call_workers(self, method: str, args: tuple[Any, ...], kwargs: Any) -> list[Any]:
        async with self._stepping:
            # The other ranks otherwise wait for the next step, and hear nothing else.
            await self.engine.stop_remote_worker_execution_loop_async()
            call = self.engine.model_executor.collective_rpc
            results: list[Any] = await asyncio.to_thread(self._device_gate.behind(call), method, None, args, kwargs)
        return results

    @classmethod
    def _ray_executor(cls) -> Any:
        from roll_vllm.executor.ray_executor_v0 import RayExecutorV0

        return RayExecutorV0

    def _core_pid(self, places: Sequence[Mapping[str, Any]]) -> int:
        return os.getpid()

    def _fail_requests(self, error: Exception) -> None:
        tracker = getattr(self, "_request_tracker", None)
        if tracker is not None:
            tracker.propagate_exception(error)

    # -- requests -------------------------------------------------------------------------------------------

    async def _outputs(self, request_id: str, /, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        self._consumers[request_id] = asyncio.current_task()
        try:
            async for output in AsyncLLMEngine.generate(self, *args, **kwargs):
                yield output
            # vLLM keeps the children of n > 1 for ever.
            parents = self.engine.seq_id_to_seq_group
            for child in [name for name, parent in parents.items() if parent.group_id == request_id]:
                del parents[child]
        except asyncio.CancelledError:
            final = self._aborted.get(request_id)
            if final is None:
                raise
            yield final
        finally:
            self._consumers.pop(request_id, None)
            self._aborted.pop(request_id, None)

    async def _end(self, request_ids: Sequence[str]) -> None:
        if not self.is_running:  # before the first request
            return
        live = set(self._request_ids())
        for request_id in request_ids:
            # vLLM itself aborts a request whose caller was cancelled, and the caller is not to get an output then.
            if request_id in live and self._consumers.get(request_id) is not asyncio.current_task():
                self._aborted[request_id] = self._partial(request_id)
            if request_id in live:
                await AsyncLLMEngine.abort(self, request_id)

    def _partial(self, request_id: str) -> Any:
        """The final output of a request that is being aborted, with what it has generated so far."""
        from vllm.outputs import CompletionOutput, RequestOutput
        from vllm.sampling_params import RequestOutputKind

        completions: dict[int, Any] = {}
        prompt = prompt_ids = None
        for index, group in self._groups(request_id):
            params, sequence = group.sampling_params, group.seqs[0]
            prompt, prompt_ids = group.prompt, group.prompt_token_ids
            # Who asked for differences has got them all.
            told = params.output_kind == RequestOutputKind.DELTA
            empty: Any = [] if params.logprobs is not None else None
            completions[index] = CompletionOutput(
                index,
                "" if told else sequence.output_text,
                [] if told else list(sequence.get_output_token_ids()),
                sequence.get_cumulative_logprob() if params.logprobs is not None else None,
                empty if told or params.logprobs is None else list(sequence.output_logprobs),
                finish_reason="abort",
            )
        outputs = [completions[index] for index in sorted(completions)]
        if not outputs:  # it has not reached the scheduler
            outputs = [CompletionOutput(0, "", [], None, None, finish_reason="abort")]
        return RequestOutput(request_id, prompt, prompt_ids, None, outputs, finished=True)

    def _groups(self, request_id: str) -> Iterator[tuple[int, Any]]:
        """The sequence groups of a request, with the index of each; several with ``n > 1``."""
        parents = self.engine.seq_id_to_seq_group
        for scheduler in self.engine.scheduler:
            for group in [*scheduler.waiting, *scheduler.running, *scheduler.swapped]:
                parent = parents.get(group.request_id)
                if (parent.group_id if parent else group.request_id) == request_id:
                    yield parent.seq_id_to_index[group.request_id] if parent else 0, group
        for parent in {id(parent): parent for parent in parents.values() if parent.group_id == request_id}.values():
            for name, group in parent.finished_reqs.items():
                yield parent.seq_id_to_index[name], group

    def unfinished_requests(self) -> dict[str, int]:
        parents = {parent.group_id for parent in self.engine.seq_id_to_seq_group.values()}
        return {"requests": len(self._request_ids()), "parents": len(parents)}

    def _request_ids(self) -> list[str]:
        tracker = getattr(self, "_request_tracker", None)
        if tracker is None:
            return []
        arriving = [stream.request_id for stream, _ in tracker._new_requests._queue]
        return [*arriving, *tracker._request_streams]

    async def abort_all(self) -> None:
        """As in general. Here requests are aborted by the next step, which is waited for."""
        await RolloutEngine.abort_all(self)
        tracker: Any = getattr(self, "_request_tracker", None)
        while self.is_running and not tracker._aborted_requests.empty():
            if not (tracker.has_new_requests() or self.engine.has_unfinished_requests()):
                break  # no step is to come
            await asyncio.sleep(_POLL_S)
        async with self._stepping:
            pass

    async def _settle(self) -> None:
        # Aborted requests leave the scheduler with the next step.
        while self.is_running and (self._request_tracker.has_new_requests() or self.engine.has_unfinished_requests()):
            await asyncio.sleep(_POLL_S)

    async def _reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        if self._death is not None:  # it is this process that would go on keeping blocks
            raise self._death
        # What was aborted leaves with the next step, if one is to come.
        while (
            self.is_running
            and self.engine.has_unfinished_requests()
            and not self._request_tracker._aborted_requests.empty()
        ):
            await asyncio.sleep(_POLL_S)
        async with self._stepping:
            return self.engine.reset_prefix_cache(*args, **kwargs) is not False

    def _stop(self) -> None:
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        self.shutdown_background_loop()
        self.engine.model_executor.shutdown()
        for worker in getattr(self.engine.model_executor, "workers", ()):
            # vLLM asks its processes to end; one that is busy, or starved, would outlive the engine.
            process = getattr(worker, "process", None)
            if process is not None:
                process.join(_END_S)
                process.kill()
        worker = local_device.local_worker(self.engine.model_executor)
        if worker is not None:  # before the process groups, which its graphs use
            self._end_worker(worker)
        RolloutEngineV0._alive.discard(id(self))
        if not RolloutEngineV0._alive:
            # The next engine may have another number of ranks.
            destroy_model_parallel()
            destroy_distributed_environment()

    def _end_worker(self, worker: Any) -> None:
        """Give back the device memory of the worker in this process, unless something still runs on it."""
        if not self._device_gate.shut(_END_S):
            logger.warning(
                "the device memory of the engine stays taken: a call still runs in its worker; end this process to "
                "have it back"
            )
            return
        try:
            local_device.end(worker)
        except Exception as error:  # such as any use of a device after an error on it
            logger.warning("the device memory of the engine stays taken: %s", error)
