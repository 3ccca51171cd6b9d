"""The rollout engine: vLLM's engine plus what reinforcement learning needs from it.

Only extension points of vLLM are used: a subclass in front (one for each engine generation, in
:mod:`roll_vllm.frontends`), ``scheduler_cls`` between, ``worker_extension_cls`` behind. What those cannot do is in
:mod:`roll_vllm.patches`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import enum
import inspect
import itertools
import logging
import os
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from roll_vllm import failure
from roll_vllm.admission import AbortedWhileWaiting, AdmissionGate
from roll_vllm.errors import ConfigurationError, EngineDiedError, RollVllmError, WeightUpdateError
from roll_vllm.patches import process
from roll_vllm.state import TAGS, EngineState, WeightsStatus, WorkerState
from roll_vllm.transfer import collective
from roll_vllm.transfer.bucket import BucketSender
from roll_vllm.transfer.manifest import specs_from
from roll_vllm.transfer.session import Sender, WeightUpdate, sender_for
from roll_vllm.watch import Watch

if TYPE_CHECKING:
    from typing_extensions import Self

    from roll_vllm.executor.placement import Placement

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: What becomes of the running requests in a pause.
PAUSE_MODES = ("abort", "wait", "keep")

#: More than an engine takes in its life; the numbers of adapters of different engines do not meet.
_ADAPTERS = 1_000_000
_engine_numbers = itertools.count()

_DRAIN_POLL_S = 0.01
_DEATH_KNOWN_S = 3.0  # after vLLM noticed it


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What an engine is told beside vLLM's own arguments.

    Attributes:
        allow_dummy_weights: generate also before the first weight update of a ``load_format="dummy"`` engine.
        scratch: directories that nobody needs after the engine; :meth:`RolloutEngine.shutdown` deletes them.
        records: where the engine's processes leave their records of applied patches.
        on_shutdown: called once, at the end of :meth:`RolloutEngine.shutdown`.
        placement: where the Ray executor puts the ranks; None for the executors of one host.
    """

    allow_dummy_weights: bool = False
    scratch: tuple[Path, ...] = ()
    records: Path | None = None
    on_shutdown: Callable[[], None] | None = None
    placement: Placement | None = None


class RolloutEngine(ABC):
    """A vLLM engine that a trainer can feed, put to sleep and trust.

    Everything that vLLM's engine has (``AsyncLLM``, or ``AsyncLLMEngine`` for V0), plus ROLL's calls, under ROLL's
    names and arguments. Create it with :func:`roll_vllm.create_async_llm`.

    Requests pass a gate: they wait while the engine sleeps, is paused or being updated, and are refused with
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
    _options: EngineOptions = EngineOptions()  # also of an engine that did not start
    _gate: AdmissionGate
    _control: asyncio.Lock
    _senders: dict[str, Sender]
    _devices: list[str] | None
    _session_open: bool
    _implicit_open: bool
    _versions: dict[str, int]
    _calls: set[str]
    _frozen: bool = False
    _lora: int
    _loras: int
    _death: EngineDiedError | None
    _death_known: asyncio.Event
    _unanswered: set[asyncio.Future[Any]]
    _watch: Watch | None
    _elsewhere: list[process.Record]

    @classmethod
    async def start(cls, engine_args: Any, options: EngineOptions | None = None) -> Self:
        """Start the engine and its workers' side. Blocks the event loop until the workers are up.

        Args:
            engine_args: vLLM's ``AsyncEngineArgs``.
            options: what vLLM has no arguments for.
        """
        options = options or EngineOptions()
        vllm: Any = cls
        engine: Self
        if options.placement is None:
            engine = vllm.from_engine_args(engine_args)
        else:
            engine = vllm._under_ray(engine_args, options.placement)
        dummy = str(engine_args.load_format) == "dummy" or getattr(engine_args.load_format, "value", "") == "dummy"
        initial = WeightsStatus.NEVER_LOADED if dummy else WeightsStatus.COMPLETE
        engine._options = options
        engine._gate = AdmissionGate(EngineState(initial), options.allow_dummy_weights)
        engine._control = asyncio.Lock()
        engine._senders, engine._versions, engine._calls = {}, {}, set()
        engine._devices = None
        # The workers of V0 engines in one process keep their adapters in one place.
        engine._lora, engine._loras = 0, _ADAPTERS * next(_engine_numbers)
        engine._session_open = engine._implicit_open = False
        engine._death, engine._death_known, engine._watch = None, asyncio.Event(), None
        engine._unanswered = set()
        engine._elsewhere = []
        try:
            await engine.custom_init_worker()
            if options.placement is not None:  # workers on other machines leave no record here
                engine._elsewhere = [process.Record.from_dict(r) for r in await engine._workers("patch_record")]
            engine._check_patches()
            await engine._start_watch()
        except BaseException:
            engine.shutdown()
            raise
        return engine

    def _check_patches(self) -> None:
        """Raise what a process could only record, because vLLM passes no error of a plugin on."""
        for record in self.patch_records():
            if record.error:
                raise RollVllmError(f"process {record.pid} ({record.role}) runs without its patches: {record.error}")

    @classmethod
    def _under_ray(cls, engine_args: Any, placement: Placement) -> Self:
        """vLLM's engine with our Ray executor, which vLLM's own choice of one would never reach on CPU."""
        from vllm.usage.usage_lib import UsageContext

        config = engine_args.create_engine_config(UsageContext.ENGINE_CONTEXT)
        config.parallel_config.distributed_executor_backend = "ray"
        config.parallel_config.placement_group = placement
        vllm: Any = cls
        engine: Self = vllm(
            vllm_config=config,
            executor_class=cls._ray_executor(),
            log_requests=False,
            log_stats=not engine_args.disable_log_stats,
            usage_context=UsageContext.ENGINE_CONTEXT,
        )
        return engine

    # -- death ----------------------------------------------------------------------------------------------

    async def _start_watch(self) -> None:
        """Watch every process of the engine that is on this machine."""
        loop = asyncio.get_running_loop()
        places = await self.worker_placements()
        processes = {self._core_pid(places): "the engine core"}
        if self._options.placement is None:  # the executor knows more than we do about workers of Ray
            for place in places:
                what = f"rank {place['rank']} on node {socket.gethostname()}"
                processes[place["pid"]] = what if place["pid"] not in processes else f"the engine core with {what}"
        processes.pop(os.getpid(), None)

        def report(error: EngineDiedError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who waits
                loop.call_soon_threadsafe(self._died, error)

        self._watch = Watch(processes, self._options.records, report)

    def _died(self, error: EngineDiedError) -> None:
        """Fail everything that waits for the engine, and everything that will ask."""
        self._death = error
        self._death_known.set()
        self._gate.fail(error)
        self._fail_requests(error)
        for call in tuple(self._unanswered):  # also those that nobody waits for any more
            call.cancel()

    @property
    def errored(self) -> bool:
        """Whether the engine is dead."""
        return self._death is not None or bool(self._vllm.errored.fget(self))

    @property
    def dead_error(self) -> BaseException:
        """What it died of."""
        error: BaseException = self._death or self._vllm.dead_error.fget(self)
        return error

    async def check_health(self) -> None:
        """As vLLM's; also raises when a worker is gone.

        Raises:
            EngineDiedError: naming the rank, the node and the cause.
        """
        if self._death is not None:
            raise self._death
        await self._vllm.check_health(self)

    async def _or_death(self, call: Awaitable[_T], timeout: float | None = None) -> asyncio.Future[_T]:
        """Wait for a call, which goes on when the time is up; raise what the engine died of meanwhile."""
        task = asyncio.ensure_future(call)
        self._unanswered.add(task)
        task.add_done_callback(self._unanswered.discard)
        death = asyncio.ensure_future(self._death_known.wait())
        try:
            done, _ = await asyncio.wait([task, death], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            death.cancel()
        answered = task in done and not task.cancelled()
        error = task.exception() if answered else None
        if error is not None and not isinstance(error, RollVllmError):
            await self._hear_of_death(error)
        if self._death is not None and (not answered or error is not None):
            task.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise self._death
        return task

    async def _hear_of_death(self, error: BaseException) -> None:
        """Wait for the watch, if this error of vLLM's may be a death that it does not know to name."""
        errored = bool(self._vllm.errored.fget(self))
        seconds = _DEATH_KNOWN_S if errored else _DEATH_KNOWN_S / 4 if type(error) in (Exception, RuntimeError) else 0
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._death_known.wait(), seconds)

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
    def _require_freezing(self) -> None:
        """Raise ``UnsupportedFeatureError`` if running requests cannot stand still."""

    @abstractmethod
    async def _freeze(self, frozen: bool) -> None:
        """Let running requests stand still, after the step that runs, or go on."""

    @property
    @abstractmethod
    def logprobs_mode(self) -> str:
        """What the log-probabilities in outputs are, by vLLM's names.

        ``raw_logprobs``: the log-softmax of the logits, before temperature, penalties, top-k and top-p.
        ``processed_logprobs``: after them. ``raw_logits`` and ``processed_logits``: no log-softmax at all.
        """

    @abstractmethod
    async def _settle(self) -> None:
        """Wait until what was aborted has left the scheduler."""

    @classmethod
    @abstractmethod
    def _ray_executor(cls) -> Any:
        """The executor class for placement groups."""

    @abstractmethod
    def _core_pid(self, places: Sequence[Mapping[str, Any]]) -> int:
        """The process of the engine core, given where the workers are."""

    @abstractmethod
    def _fail_requests(self, error: Exception) -> None:
        """End every request that is in the engine with this error."""

    def _outputs(self, request_id: str, /, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """vLLM's ``generate``."""
        outputs: AsyncGenerator[Any, None] = self._vllm.generate(self, *args, **kwargs)
        return outputs

    # -- generation -----------------------------------------------------------------------------------------

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """As vLLM's ``generate``; every output carries ``weight_version``, the version it was generated with.

        What was yielded does not change later, and neither do the caller's sampling parameters.

        Raises:
            ConfigurationError: ``lora_request`` names an adapter that was replaced or destroyed.
            WeightsNotReadyError: the engine holds no complete set of weights.
        """
        call = inspect.signature(self._vllm.generate).bind(self, *args, **kwargs).arguments
        request_id = call["request_id"]
        self._calls.add(request_id)
        try:
            async with aclosing(self._outputs(request_id, *args, **kwargs)) as outputs:
                async for output in outputs:
                    if isinstance(output, EngineDiedError):  # 0.8.4 has no better way to end a request
                        raise output
                    output.weight_version = self._versions.get(request_id, self.weight_version)
                    if not output.finished:
                        _detach(output)
                    yield output
        except GeneratorExit:
            # 0.8.4 ends a request whose caller was cancelled while it waited, but not one whose caller walked away.
            await self.abort(request_id)
            raise
        except Exception as error:
            await self._hear_of_death(error)
            if self._death is not None:
                raise self._death from None
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
            self._calls.discard(request_id)

    async def add_request(self, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's ``add_request``, behind the gate."""
        async with self._gate.admitted(request_id):
            if self._takes_lora():
                call = inspect.signature(self._vllm.add_request).bind(self, request_id, *args, **kwargs)
                self._check_adapter(call.arguments.get("lora_request"))
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

    async def abort(self, request_id: str | Iterable[str]) -> list[str]:
        """As vLLM's ``abort``, also for requests that wait for the engine to wake, resume or to be updated.

        Returns:
            The ids that were found. Any other one is harmless, and named in a warning, unless its request is ending.
        """
        names = [request_id] if isinstance(request_id, str) else list(dict.fromkeys(request_id))
        known = self._gate.abort(names).union(self._request_ids())
        await self._end(names)
        unknown = [name for name in names if name not in known and name not in self._calls]
        if unknown:
            logger.warning("abort: there is no request %s; it may have ended before", ", ".join(map(repr, unknown)))
        return [name for name in names if name in known]

    async def _quiesce(self, running: str) -> None:
        """End the running requests by the policy ``"abort"`` or ``"wait"``; the gate must be closed."""
        if running == "wait":
            if self._frozen:
                raise ConfigurationError(
                    "the running requests cannot end: pause_generation(mode='keep') holds them; call "
                    "resume_generation() first, or let them be aborted (running='abort')"
                )
            while self._request_ids():
                if self.errored:
                    raise self.dead_error
                await asyncio.sleep(_DRAIN_POLL_S)
        else:
            await self.abort_all()
        (await self._or_death(self._settle())).result()

    # -- pause ----------------------------------------------------------------------------------------------

    async def pause_generation(
        self,
        mode: str | None = None,
        *,
        wait_for_inflight_requests: bool | None = None,
        clear_cache: bool | None = None,
    ) -> None:
        """As vLLM's (from 0.12.0 on), on every version: requests wait at the gate until :meth:`resume_generation`.

        Sleep, wake, updates and adapters are possible meanwhile. They abort kept requests, as they do running ones,
        and leave the engine paused. Pausing a paused engine applies the new mode to what still runs; one resume is
        enough. A pause that fails or is cancelled is none.

        Args:
            mode: ``"abort"`` (the default) returns the partial outputs of running requests; ``"wait"`` lets them finish
                first; ``"keep"`` lets them stand still, and go on after the resume.
            wait_for_inflight_requests: vLLM 0.12.0's word for the mode: True for ``"wait"``, False for ``"abort"``.
            clear_cache: whether to empty the prefix cache (and vLLM's multimodal cache, where there is one); by
                default True, but False for ``"keep"``, whose requests need theirs.

        Raises:
            ConfigurationError: an unknown mode, or arguments that contradict each other.
            UnsupportedFeatureError: ``"keep"`` on a V1 engine with a scheduler of the caller's own, or with
                ``async_scheduling``.
        """
        waits = wait_for_inflight_requests
        chosen = mode or ("wait" if waits else "abort")
        if chosen not in PAUSE_MODES or (waits is not None and waits != (chosen == "wait")):
            raise ConfigurationError(
                f"mode must be one of {', '.join(PAUSE_MODES)}, and wait_for_inflight_requests is for 'wait' only; "
                f"got mode={mode!r}, wait_for_inflight_requests={waits!r}"
            )
        if chosen == "keep":
            if clear_cache:
                raise ConfigurationError(
                    "mode='keep' cannot clear the cache, which its requests use; leave clear_cache out"
                )
            self._require_freezing()
        async with self._control:
            before = self._gate.state.paused, self._frozen
            self._set_paused(True)
            try:
                async with self._gate.closed():
                    # What is kept goes on only to end.
                    await self._set_frozen(chosen == "keep" or (chosen == "abort" and self._frozen))
                    if chosen != "keep":
                        await self._quiesce(chosen)
                        if clear_cache is not False:
                            await self._clear_caches()
                        await self._set_frozen(False)
            except BaseException:
                if not self.errored:
                    await self._set_frozen(before[1])
                self._set_paused(before[0])
                raise

    async def _clear_caches(self) -> None:
        await self._drop_prefix_cache()
        if hasattr(self._vllm, "reset_mm_cache"):
            await self.reset_mm_cache()

    async def resume_generation(self) -> None:
        """Let requests in again, and kept ones go on; harmless if the engine is not paused."""
        async with self._control:
            await self._set_frozen(False)
            self._set_paused(False)

    async def is_paused(self) -> bool:
        """Whether :meth:`pause_generation` is in force."""
        return self._gate.state.paused

    def _set_paused(self, paused: bool) -> None:
        self._gate.state = dataclasses.replace(self._gate.state, paused=paused)

    async def _set_frozen(self, frozen: bool) -> None:
        if frozen != self._frozen:
            self._frozen = frozen  # before it is so: what is cancelled here may still arrive there
            (await self._or_death(self._freeze(frozen))).result()

    # -- remote calls ---------------------------------------------------------------------------------------

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        """As ``AsyncLLM.collective_rpc``, on every version: one result a rank, in rank order; the timeout always holds.

        Only plain data travels: vLLM 0.8.4 would pickle anything else, and later releases do if told to.

        Raises:
            ConfigurationError: the method is not a name, or an argument is not plain data.
            TimeoutError: no answer in time; the call may still be running in the workers.
            EngineDiedError: a worker is gone.
        """
        if type(method) is not str:
            raise ConfigurationError(
                f"the method must be the name of one of the worker's, got {type(method).__name__}: what vLLM would "
                "pickle is not sent; put the method into a worker_extension_cls"
            )
        _require_plain(method, (args, kwargs))
        # The executor gets no timeout: vLLM's multiprocessing executor leaves late answers in its queues, and
        # every later call would get the answer to the one before. Nor is the call cancelled, for the same reason.
        if self._death is not None:
            raise self._death
        call = await self._or_death(self._call_workers(method, tuple(args), kwargs), timeout)
        if not call.done():
            call.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise TimeoutError(f"no answer to {method!r} from every worker within {timeout:g} s")
        results: list[Any] = call.result()
        return results

    async def _workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker's runtime; one value a rank, or one typed error naming the rank."""
        answers = await self.collective_rpc("roll_vllm_call", args=(method, list(args)))
        return failure.values(answers)

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

    async def device_memory(self, *, reset_peak: bool = False) -> list[dict[str, int]]:
        """Bytes that torch has allocated on each worker's device, in rank order: ``allocated`` now, ``peak`` at most.

        Args:
            reset_peak: let the peak begin anew, before it is read.

        Raises:
            UnsupportedFeatureError: on the CPU.
        """
        return await self._workers("device_memory", reset_peak)

    async def worker_environment(self, names: Sequence[str]) -> list[dict[str, str | None]]:
        """The values of environment variables inside each worker, in rank order; None where unset."""
        return await self._workers("environment", list(names))

    async def device_identities(self) -> list[str]:
        """What names the device of each worker in every process of its host, in rank order; empty for a CPU."""
        if self._devices is None:
            self._devices = await self._workers("device_identity")
        return self._devices

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

    async def worker_placements(self) -> list[dict[str, Any]]:
        """Where each worker runs, asked of the workers themselves, in rank order.

        Returns:
            For each rank its ``rank``, ``pid``, ``node_id`` and ``node_ip`` (Ray's), ``placement_group`` (the id in
            hexadecimal), ``bundle_index`` and ``devices`` (what the worker sees, by the names in the visibility
            variable). Without Ray these are empty, and the index is -1.
        """
        return await self._workers("placement")

    def patch_records(self) -> list[process.Record]:
        """What became of every patch in each process of this engine, as those processes recorded it."""
        here = process.read_records(self._options.records) if self._options.records else []
        known = {record.pid for record in here}
        return [*here, *(record for record in self._elsewhere if record.pid not in known)]

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
                self._lora = 0  # their numbers are not used again
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
                reports = await self._workers("wake", None if tags is None else list(tags))
            except BaseException:
                self._note(await self._workers("state"))
                raise
            self._note(reports)

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
        return (await self._or_death(self._reset_prefix_cache(*args, **kwargs))).result()

    async def _drop_prefix_cache(self) -> None:
        # The aborts may still be on their way through the scheduler, which keeps their blocks until then.
        for _ in range(100):
            if await self.reset_prefix_cache():
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
            transport: ``"bucket"`` (shared memory, trainer on this host; for tensors on the workers' GPUs, memory of
                these) or ``"collective"`` (a process group that is set up on first use).
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
                lost = self._senders.pop(transport) if own and transport == "collective" else None
                if lost is not None:  # its ranks may be out of step now; the next update sets up a new group
                    lost.close()
                await self._abandon_update(error)
                if isinstance(lost, collective.CollectiveSender) and not self.errored:
                    with contextlib.suppress(RollVllmError):  # why the update failed is what the caller must know
                        await self._workers("leave_group", lost.group_name)
                raise
            finally:
                self._session_open = False
                if isinstance(sender, BucketSender):
                    sender.trim()
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
            ConfigurationError: the name is taken, a rank falls outside the group, or the ranks differ in a variable
                that must be equal.
            WeightUpdateError: the others did not come in time (``ROLL_VLLM_COLLECTIVE_TIMEOUT``, 120 s).
        """
        seconds = collective.timeout().total_seconds()  # as set here and now, not when the workers were started
        await self._workers(
            "setup_group", master_address, int(master_port), rank_offset, world_size, group_name, backend, seconds
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
            self._loras += 1
            await self._workers("add_lora", self._loras, _plain_config(request or {}))
            self._lora = self._loras
        return True

    @property
    def lora_request(self) -> Any:
        """The ``LoRARequest`` of the adapter that :meth:`add_lora` took from tensors last; None before that."""
        from roll_vllm.worker.lora import request

        return request(self._lora) if self._lora else None

    async def list_loras(self) -> set[int]:
        """As vLLM's, on every version: the ids of the adapters that are loaded or kept on any rank."""
        if not self._takes_lora():
            return set()
        return set().union(*await self._workers("list_loras"))

    def _check_adapter(self, lora_request: Any) -> None:
        """Refuse a request for an adapter from tensors that is not there any more."""
        from roll_vllm.worker.lora import is_from_tensors

        if not is_from_tensors(lora_request) or lora_request.lora_int_id == self._lora:
            return
        if self._lora:
            now = (
                f"{self.lora_request.lora_name} has taken its place; ask for engine.lora_request whenever you generate"
            )
        else:
            now = "sleep level 2 has destroyed it; send it again, and call add_lora()"
        raise ConfigurationError(f"the adapter {lora_request.lora_name} is not in this engine any more: {now}")

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
        # Before anything is written: nobody can fill the cache again until the set is complete. The workers get ready
        # meanwhile, since either call takes its time to the engine core and back.
        begun, dropped = await asyncio.gather(
            self._workers("begin_update"), self._drop_prefix_cache(), return_exceptions=True
        )
        if isinstance(begun, BaseException):
            raise begun
        if isinstance(dropped, BaseException):
            await self._abandon_update(dropped)
            raise dropped
        self._note(begun)

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
        """End the engine and every process it started; requests that are in it or wait for it fail."""
        watch = getattr(self, "_watch", None)
        if watch is not None:
            watch.close()
        for sender in getattr(self, "_senders", {}).values():
            sender.close()
        if hasattr(self, "_death") and self._death is None:
            with contextlib.suppress(RuntimeError):  # nobody waits on a loop that has ended
                self._died(EngineDiedError("the engine was shut down; create a new one"))
        self._stop()
        for directory in self._options.scratch:
            shutil.rmtree(directory, ignore_errors=True)
        options, self._options = self._options, EngineOptions()
        if options.on_shutdown is not None:
            options.on_shutdown()

    def _stop(self) -> None:
        """vLLM's ``shutdown``."""
        self._vllm.shutdown(self)


_PLAIN = {type(None), bool, int, float, str, bytes}


def _plain_config(value: Any) -> Any:
    """A configuration of PEFT's, with its enumerations as their values and its sets as lists."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain_config(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset, list, tuple)):
        return [_plain_config(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    return value


def _require_plain(method: str, value: Any) -> None:
    """Refuse what would be pickled on its way to the workers. Tensors are plain, subclasses of anything are not."""
    kind = type(value)
    if kind in _PLAIN:
        return
    if kind in (list, tuple):
        for item in value:
            _require_plain(method, item)
    elif kind is dict:
        _require_plain(method, list(value.items()))
    elif (kind.__module__, kind.__qualname__) not in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
        raise ConfigurationError(
            f"an argument of {method!r} is a {kind.__module__}.{kind.__qualname__}, which would be pickled; send None, "
            "numbers, str, bytes, tensors, and lists, tuples and dicts of these"
        )


def _detach(output: Any) -> None:
    """Give an output copies of what vLLM goes on changing while the request runs."""
    for completion in output.outputs:
        completion.token_ids = completion.token_ids[:]
        if completion.logprobs:
            completion.logprobs = completion.logprobs[:]
    output.metrics = copy.copy(output.metrics)
