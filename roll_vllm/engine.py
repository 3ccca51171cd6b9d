"""The rollout engine: vLLM's engine plus what reinforcement learning needs from it.

Only extension points of vLLM are used: a subclass in front (one for each engine generation, in
:mod:`roll_vllm.frontends`), ``scheduler_cls`` between, ``worker_extension_cls`` behind. What those cannot do is in
:mod:`roll_vllm.patches`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from roll_vllm import errors
from roll_vllm.admission import AbortedWhileWaiting, AdmissionGate
from roll_vllm.errors import ConfigurationError, RollVllmError, WeightUpdateError
from roll_vllm.patches import process
from roll_vllm.state import TAGS, EngineState, WeightsStatus, WorkerState
from roll_vllm.transfer.manifest import specs_from
from roll_vllm.transfer.session import Sender, WeightUpdate, sender_for

if TYPE_CHECKING:
    from typing_extensions import Self

_DRAIN_POLL_S = 0.01


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What an engine is told beside vLLM's own arguments.

    Attributes:
        allow_dummy_weights: generate also before the first weight update of a ``load_format="dummy"`` engine.
        scratch: directories that nobody needs after the engine; :meth:`RolloutEngine.shutdown` deletes them.
        records: where the engine's processes leave their records of applied patches.
        on_shutdown: called once, at the end of :meth:`RolloutEngine.shutdown`.
    """

    allow_dummy_weights: bool = False
    scratch: tuple[Path, ...] = ()
    records: Path | None = None
    on_shutdown: Callable[[], None] | None = None


class RolloutEngine(ABC):
    """A vLLM engine that a trainer can feed, put to sleep and trust.

    Everything that vLLM's engine has (``AsyncLLM``, or ``AsyncLLMEngine`` for V0), plus ROLL's calls, under ROLL's
    names and arguments. Create it with :func:`roll_vllm.create_async_llm`.

    Requests pass a gate: they wait while the engine sleeps or is being updated, and are refused with
    ``WeightsNotReadyError`` when it is awake without one complete set of weights. Sleep, wake and update
    exclude each other. Sleep and update abort the requests that run; the callers get what was generated.

    Attributes:
        generation: ``V0`` or ``V1``.
        vllm_config: vLLM's configuration.
    """

    generation: ClassVar[str]
    vllm_config: Any

    #: vLLM's engine class that the frontend derives from.
    _vllm: ClassVar[Any]
    _options: EngineOptions
    _gate: AdmissionGate
    _control: asyncio.Lock
    _senders: dict[str, Sender]
    _session_open: bool
    _implicit_open: bool
    _versions: dict[str, int]
    _lora: int

    @classmethod
    async def start(cls, engine_args: Any, options: EngineOptions | None = None) -> Self:
        """Start the engine and its workers' side. Blocks the event loop until the workers are up.

        Args:
            engine_args: vLLM's ``AsyncEngineArgs``.
            options: what vLLM has no arguments for.
        """
        options = options or EngineOptions()
        vllm: Any = cls
        engine: Self = vllm.from_engine_args(engine_args)
        dummy = str(engine_args.load_format) == "dummy" or getattr(engine_args.load_format, "value", "") == "dummy"
        initial = WeightsStatus.NEVER_LOADED if dummy else WeightsStatus.COMPLETE
        engine._options = options
        engine._gate = AdmissionGate(EngineState(initial), options.allow_dummy_weights)
        engine._control = asyncio.Lock()
        engine._senders, engine._versions, engine._lora = {}, {}, 0
        engine._session_open = engine._implicit_open = False
        try:
            await engine.custom_init_worker()
            engine._check_patches()
        except BaseException:
            engine.shutdown()
            raise
        return engine

    def _check_patches(self) -> None:
        """Raise what a process could only record, because vLLM passes no error of a plugin on."""
        for record in self.patch_records():
            if record.error:
                raise RollVllmError(f"process {record.pid} ({record.role}) runs without its patches: {record.error}")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Everything of vLLM's engine."""

    # -- what differs between the generations ---------------------------------------------------------------

    @abstractmethod
    async def _call_workers(self, method: str, args: tuple[Any, ...], kwargs: Any) -> list[Any]:
        """Call a method of every worker; one result a rank, in rank order."""

    @abstractmethod
    async def _end(self, request_ids: Sequence[str]) -> None:
        """Abort requests that are in the engine; each caller gets one final output."""

    @abstractmethod
    def unfinished_requests(self) -> dict[str, int]:
        """What the frontend still keeps: the number of ``requests`` and of ``parents`` (``n > 1``)."""

    @abstractmethod
    def _request_ids(self) -> list[str]:
        """The ids of all requests in the engine, as their callers know them."""

    @abstractmethod
    async def _reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Empty the prefix cache. Returns whether it is empty now: it cannot be while blocks are in use."""

    @abstractmethod
    async def _settle(self) -> None:
        """Wait until what was aborted has left the scheduler."""

    def _outputs(self, request_id: str, /, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """vLLM's ``generate``."""
        outputs: AsyncGenerator[Any, None] = self._vllm.generate(self, *args, **kwargs)
        return outputs

    # -- generation -----------------------------------------------------------------------------------------

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """As vLLM's ``generate``; every output carries ``weight_version``, the version it was generated with.

        Raises:
            WeightsNotReadyError: the engine holds no complete set of weights.
        """
        call = inspect.signature(self._vllm.generate).bind(self, *args, **kwargs).arguments
        request_id = call["request_id"]
        try:
            async with aclosing(self._outputs(request_id, *args, **kwargs)) as outputs:
                async for output in outputs:
                    output.weight_version = self._versions.get(request_id, self.weight_version)
                    yield output
        except GeneratorExit:
            # 0.8.4 ends a request whose caller was cancelled while it waited, but not one whose caller walked away.
            await self.abort(request_id)
            raise
        except Exception as error:
            # From 0.10.2 on vLLM wraps whatever add_request raises; ours says more than the wrapper.
            own = error if isinstance(error, (AbortedWhileWaiting, RollVllmError)) else error.__cause__
            if isinstance(own, AbortedWhileWaiting):
                yield self._never_started(request_id, call["prompt"], call["sampling_params"])
            elif isinstance(own, RollVllmError):
                raise own from None
            else:
                raise
        finally:
            self._versions.pop(request_id, None)

    async def add_request(self, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's ``add_request``, behind the gate."""
        async with self._gate.admitted(request_id):
            self._versions[request_id] = self.weight_version
            return await self._vllm.add_request(self, request_id, *args, **kwargs)

    def _never_started(self, request_id: str, prompt: Any, params: Any) -> Any:
        """The final output of a request that was aborted while it waited at the gate."""
        from vllm.outputs import CompletionOutput, RequestOutput

        tokens = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        empty: Any = [] if params.logprobs is not None else None
        completions = [CompletionOutput(index, "", [], None, empty, finish_reason="abort") for index in range(params.n)]
        output = RequestOutput(request_id, None, tokens, None, completions, finished=True)
        output.weight_version = self.weight_version
        return output

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """As vLLM's ``abort``, also for requests that wait for the engine to wake or to be updated."""
        names = [request_id] if isinstance(request_id, str) else list(request_id)
        self._gate.abort(names)
        await self._end(names)

    async def _quiesce(self, running: str) -> None:
        """End the running requests by the policy ``"abort"`` or ``"wait"``; the gate must be closed."""
        if running == "wait":
            while self._request_ids():
                if self.errored:
                    raise self.dead_error
                await asyncio.sleep(_DRAIN_POLL_S)
        else:
            await self.abort_all()
        await self._settle()

    # -- remote calls ---------------------------------------------------------------------------------------

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        """As ``AsyncLLM.collective_rpc``, on every version: one result a rank, in rank order; the timeout always holds.

        Raises:
            TimeoutError: no answer in time; the call may still be running in the workers.
        """
        # The executor gets no timeout: vLLM's multiprocessing executor leaves late answers in its queues, and
        # every later call would get the answer to the one before. Nor is the call cancelled, for the same reason.
        call = asyncio.ensure_future(self._call_workers(method, tuple(args), kwargs))
        done, _ = await asyncio.wait([call], timeout=timeout)
        if not done:
            call.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise TimeoutError(f"no answer to {method!r} from every worker within {timeout:g} s")
        results: list[Any] = call.result()
        return results

    async def _workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker's runtime; one value a rank, or one typed error naming the rank."""
        answers = await self.collective_rpc("roll_vllm_call", args=(method, list(args)))
        for answer in answers:
            if "error" in answer:
                kind: type[RollVllmError] = getattr(errors, answer["error"])
                raise kind(f"{answer['message']} [rank {answer['rank']}]")
        return [answer["value"] for answer in answers]

    async def custom_init_worker(self) -> None:
        """Prepare the workers; done by ``create_async_llm``, harmless when repeated."""
        await self.collective_rpc("roll_vllm_init", args=(self._gate.state.weights.value, os.getpid()))

    # -- state ----------------------------------------------------------------------------------------------

    @property
    def weight_version(self) -> int:
        """Number of complete weight updates since the engine started."""
        return self._gate.state.weight_version

    async def state(self) -> EngineState:
        """What the engine can do now, asked of every worker."""
        return self._state_from(await self._workers("state"))

    def _state_from(self, reports: Sequence[Mapping[str, Any]]) -> EngineState:
        workers = tuple(WorkerState.from_report(report) for report in reports)
        order = list(WeightsStatus)
        return dataclasses.replace(
            self._gate.state,
            weights=max((worker.weights for worker in workers), key=order.index),
            sleeping=frozenset().union(*(worker.sleeping for worker in workers)),
            workers=workers,
        )

    def _note(self, reports: Sequence[Mapping[str, Any]], **changes: Any) -> None:
        """Let the gate judge by what the workers just reported."""
        self._gate.state = dataclasses.replace(self._state_from(reports), workers=(), **changes)

    async def checksums(self) -> list[dict[str, str]]:
        """XXH3 of every parameter, buffer and plain tensor attribute: one mapping by name a rank.

        Raises:
            EngineAsleepError: the weights are asleep.
        """
        return await self._workers("checksums")

    async def worker_environment(self, names: Sequence[str]) -> list[dict[str, str | None]]:
        """The values of environment variables inside each worker, in rank order; None where unset."""
        return await self._workers("environment", list(names))

    async def ping(self, delays: Sequence[float] = (), timeout: float | None = None) -> list[int]:
        """Every worker's rank, in rank order: do all of them answer?

        Args:
            delays: seconds that each rank waits before it answers, by rank; none by default.
            timeout: seconds to wait for all of them.

        Raises:
            TimeoutError: some did not answer in time.
        """
        answers = await self.collective_rpc("roll_vllm_call", timeout, ("ping", [list(delays)]))
        return [answer["value"] for answer in answers]

    def patch_records(self) -> list[process.Record]:
        """What became of every patch in each process of this engine, as those processes recorded it."""
        return process.read_records(self._options.records) if self._options.records else []

    async def abort_all(self) -> None:
        """Abort everything that runs or waits in the scheduler; the callers get what was generated."""
        await self.abort(self._request_ids())

    # -- sleep ----------------------------------------------------------------------------------------------

    async def offload_states(self, level: int = 1) -> None:
        """Give memory back: the KV cache (level 1), or the KV cache and the weights (level 2).

        Running requests are aborted first, their partial outputs delivered; requests that arrive later wait.
        Repeating it is harmless, and level 2 after level 1 gives the weights back too.

        Raises:
            ConfigurationError: a level other than 1 and 2.
        """
        if level not in (1, 2) or isinstance(level, bool):
            raise ConfigurationError(
                f"sleep level must be 1 (give back the KV cache) or 2 (weights and KV cache), got {level!r}"
            )
        async with self._control, self._gate.closed():
            await self._quiesce("abort")
            await self._drop_prefix_cache()
            if level == 2:
                self._implicit_open = False
                self._lora = 0
            self._note(await self._workers("sleep", level))

    async def load_states(self, tags: Sequence[str] | None = None) -> None:
        """Wake the tags ``"weights"`` and ``"kv_cache"``, both when None, in any order.

        After level 2 the weights' memory is back but empty: until a complete update, requests that waited go on
        waiting and new ones are refused.

        Raises:
            ConfigurationError: an unknown tag.
            EngineOutOfMemoryError: the memory is not there; nothing was taken.
        """
        unknown = [tag for tag in tags or () if tag not in TAGS]
        if unknown or isinstance(tags, str):
            raise ConfigurationError(f"tags must be a list of {', '.join(TAGS)}, got {tags!r}")
        async with self._control, self._gate.closed():
            try:
                await self._workers("wake", None if tags is None else list(tags))
            finally:
                self._note(await self._workers("state"))

    async def sleep(self, level: int = 1) -> None:
        """vLLM's name for :meth:`offload_states`."""
        await self.offload_states(level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """vLLM's name for :meth:`load_states`."""
        await self.load_states(tags)

    async def is_sleeping(self) -> bool:
        """Whether any worker has given memory back, asked of the workers themselves."""
        return (await self.state()).is_sleeping

    async def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """As vLLM's ``reset_prefix_cache``; returns on every version whether the cache is empty now.

        It cannot be emptied while a running request holds blocks.
        """
        return await self._reset_prefix_cache(*args, **kwargs)

    async def _drop_prefix_cache(self) -> None:
        # The aborts may still be on their way through the scheduler, which keeps their blocks until then.
        for _ in range(100):
            if await self._reset_prefix_cache():
                return
            await asyncio.sleep(_DRAIN_POLL_S)
        raise WeightUpdateError(
            "the prefix cache could not be emptied because blocks are still in use; abort all requests and try again"
        )

    # -- weights --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def weight_update(
        self, transport: str = "bucket", *, sender: Sender | None = None, running: str = "abort"
    ) -> AsyncIterator[WeightUpdate]:
        """One complete set of weights, all or nothing: ``async with engine.weight_update() as u: await u.send(w)``.

        The prefix cache is emptied first. On leaving the block every parameter must have been reached; then the
        weight version goes up by one. If that fails, or the block raises after something was written, the
        engine is inconsistent and refuses to generate until an update succeeds. Sleeping weights are woken;
        the KV cache goes on sleeping.

        Args:
            transport: ``"bucket"`` (shared memory, trainer on this host) or ``"collective"`` (a process group
                that is set up on first use).
            sender: a ``BucketSender`` or ``CollectiveSender`` of the caller's own instead of the engine's.
            running: what happens to running requests: ``"abort"`` returns their partial outputs, ``"wait"``
                lets them finish first.

        Raises:
            ConfigurationError: unknown transport or policy.
            WeightUpdateError: the set was incomplete or did not fit.
        """
        if running not in ("abort", "wait"):
            raise ConfigurationError(f"running must be 'abort' or 'wait', got {running!r}")
        async with self._control, self._gate.closed():
            own = sender is None
            if sender is None:
                sender = await sender_for(self, transport, self._senders)
            await self._begin_update(running)
            self._session_open = True
            update = WeightUpdate(self, sender)
            try:
                yield update
                reports = await self._workers("finish_update")
            except BaseException as error:
                if own and transport == "collective":
                    # Its ranks may be out of step now; the next update sets up a new group.
                    self._senders.pop(transport).close()
                await self._abandon_update(error)
                raise
            finally:
                self._session_open = False
            update.counts = {key: reports[0][key] for key in ("replayed", "loaded")}
            self._commit_update(reports)

    async def update_parameter_in_bucket(
        self, serialized_named_tensors: Sequence[bytes], is_lora: bool = False
    ) -> None:
        """Load one bucket of checkpoint tensors (ROLL's call).

        Outside :meth:`weight_update` the buckets that follow each other form one set: the first opens it, and
        it completes by itself when every parameter has been reached.

        Args:
            serialized_named_tensors: one payload a rank, from ``BucketSender.payloads`` or
                ``serialize_named_weights``.
            is_lora: the tensors are a LoRA adapter's, by PEFT's names; kept until :meth:`add_lora`.

        Raises:
            WeightUpdateError: the bucket does not fit its metadata or the model.
        """
        if isinstance(serialized_named_tensors, (bytes, str)) or not serialized_named_tensors:
            raise WeightUpdateError("serialized_named_tensors must be a list with one payload for each rank")
        world_size = self.vllm_config.parallel_config.world_size
        if len(serialized_named_tensors) < world_size:
            raise WeightUpdateError(
                f"{len(serialized_named_tensors)} payloads for {world_size} ranks; give one for each rank"
            )
        receive = self._receive_lora if is_lora else self._receive
        await receive("receive_bucket", list(serialized_named_tensors))

    async def setup_collective_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Let every worker join a process group whose rank 0 is the trainer. Blocks until all have joined.

        Args:
            master_address: host that rank 0 listens on.
            master_port: its TCP port.
            rank_offset: added to a worker's rank to give its rank in the group; at least 1.
            world_size: ranks in the group, the trainer included.
            group_name: the same on every rank.
            backend: ``gloo`` on CPU, ``nccl`` on NVIDIA and AMD, ``hccl`` on Ascend.

        Raises:
            ConfigurationError: the name is taken, or a rank falls outside the group.
            WeightUpdateError: the others did not come in time (``ROLL_VLLM_COLLECTIVE_TIMEOUT``, 120 s).
        """
        await self._workers(
            "setup_group", master_address, int(master_port), rank_offset, world_size, group_name, backend
        )

    async def broadcast_parameter(
        self,
        names: Sequence[str],
        dtypes: Sequence[Any],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        is_lora: bool = False,
    ) -> None:
        """Receive tensors that rank 0 of the group broadcasts at the same time, and load them (ROLL's call).

        Args:
            names: checkpoint names, in the order of the broadcasts.
            dtypes: torch dtypes or their names.
            shapes: shapes.
            group_name: a group made by :meth:`setup_collective_group`.
            is_lora: the tensors are a LoRA adapter's, by PEFT's names; kept until :meth:`add_lora`.
        """
        receive = self._receive_lora if is_lora else self._receive
        specs = specs_from(names, dtypes, shapes)
        await receive(
            "receive_broadcast",
            [spec.name for spec in specs],
            [spec.dtype for spec in specs],
            [list(spec.shape) for spec in specs],
            group_name,
        )

    async def process_weights_after_loading(self) -> None:
        """Run vLLM's post-load step on the weights as they are; ends a set that ``update_parameter_in_bucket``
        or ``broadcast_parameter`` began.

        Raises:
            WeightUpdateError: that set is not complete.
        """
        async with self._control, self._gate.closed():
            await self._quiesce("abort")
            if self._implicit_open:
                try:
                    reports = await self._workers("finish_update")
                except WeightUpdateError as error:
                    await self._abandon_update(error)
                    raise
                self._commit_update(reports)
            await self._drop_prefix_cache()
            await self._workers("process_weights_after_loading")

    async def add_lora(self, peft_config: Any = None, *, lora_request: Any = None) -> bool:
        """Take the adapter that was sent with ``is_lora=True`` (ROLL's call), or as vLLM's ``add_lora``.

        An adapter from tensors gets a new id and name each time, and takes the place of the one before; running
        requests are aborted, their partial outputs delivered. :attr:`lora_request` is what ``generate`` wants then.

        Args:
            peft_config: PEFT's ``adapter_config`` as a mapping, with ``r``, ``lora_alpha`` and ``target_modules``;
                or a ``LoRARequest`` of vLLM, for an adapter from a directory.
            lora_request: vLLM's name for the latter.

        Raises:
            ConfigurationError: the engine was started without ``enable_lora=True``, or the adapter does not fit.
        """
        request = peft_config if lora_request is None else lora_request
        if not self._takes_lora():
            raise ConfigurationError(
                "this engine takes no LoRA adapters; start it with enable_lora=True (and max_lora_rank as needed)"
            )
        if request is not None and not isinstance(request, Mapping):
            return await self._vllm.add_lora(self, request) is not False  # V0 says nothing, or raises
        async with self._control, self._gate.closed():
            await self._quiesce("abort")
            number = self._lora + 1
            await self._workers("add_lora", number, dict(request or {}))
            self._lora = number
        return True

    @property
    def lora_request(self) -> Any:
        """The ``LoRARequest`` of the adapter that :meth:`add_lora` took from tensors last; None before that."""
        from roll_vllm.worker.lora import request

        return request(self._lora) if self._lora else None

    def _takes_lora(self) -> bool:
        return self.vllm_config.lora_config is not None

    async def _receive_lora(self, method: str, *args: Any) -> None:
        if not self._takes_lora():
            raise ConfigurationError("is_lora=True: this engine takes no LoRA adapters; start it with enable_lora=True")
        async with self._control:
            await self._workers(method, *args, True)

    async def _receive(self, method: str, *args: Any) -> None:
        if self._session_open:
            await self._workers(method, *args)
            return
        async with self._control, self._gate.closed():
            if not self._implicit_open:
                await self._begin_update("abort")
            try:
                states = await self._workers(method, *args)
                touched = any(state["weights"] == WeightsStatus.UPDATING.value for state in states)
                self._implicit_open = touched
                if touched and not any(state["missing"] for state in states):
                    self._commit_update(await self._workers("finish_update"))
                else:
                    self._note(states)
            except BaseException as error:
                await self._abandon_update(error)
                raise

    async def _begin_update(self, running: str) -> None:
        await self._quiesce(running)
        # Before anything is written: nobody can fill the cache again until the set is complete.
        await self._drop_prefix_cache()
        self._note(await self._workers("begin_update"))

    def _commit_update(self, reports: Sequence[Mapping[str, Any]]) -> None:
        self._implicit_open = False
        self._note(reports, weight_version=self.weight_version + 1, reason="")

    async def _abandon_update(self, error: BaseException) -> None:
        self._implicit_open = False
        if self.errored:
            return
        written = any(await self._workers("abandon_update"))
        self._note(await self._workers("state"), **({"reason": str(error)} if written else {}))

    def shutdown(self) -> None:
        """End the engine and every process it started."""
        for sender in getattr(self, "_senders", {}).values():
            sender.close()
        self._stop()
        for directory in self._options.scratch:
            shutil.rmtree(directory, ignore_errors=True)
        options, self._options = self._options, EngineOptions()
        if options.on_shutdown is not None:
            options.on_shutdown()

    def _stop(self) -> None:
        """vLLM's ``shutdown``."""
        self._vllm.shutdown(self)
