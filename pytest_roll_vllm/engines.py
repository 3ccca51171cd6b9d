"""Engines for tests: each on its own event-loop thread, shared by every test with the same configuration.

A test's event loop lives as long as the test, an engine much longer; so an engine gets a loop of its own,
and a handle carries calls there from whatever loop, or none, the test runs in.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_roll_vllm.targets import CAPABILITIES
from pytest_roll_vllm.waiting import waiting

if TYPE_CHECKING:
    from pytest_roll_vllm.targets import Target
    from roll_vllm.engine import RolloutEngine

T = TypeVar("T")


class LoopThread:
    """An event loop that runs on a thread of its own until :meth:`stop`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on the loop, from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Cancel what still runs on the loop, as ``asyncio.run`` does, stop it and wait for its thread."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:  # for a while: some wait for an answer of an engine that has gone
                await asyncio.wait(others, timeout=5)

        wait([self.submit(end())], timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()


class EngineHandle:
    """A target that can be used from any event loop, and from plain tests through :meth:`run`.

    Every attribute of the target is there, and of the rollout engine where that is the target: coroutine methods are
    awaited, ``generate`` is iterated and ``weight_update`` entered as on the engine itself.

    Attributes:
        target: what is tested; touch it only on its own loop.
        engine: the rollout engine in it, or the target itself if it is another.
        pushed: what a trainer pushed last, and what it was called then: see ``Trainer.push``.
        supported: the capabilities that the target has here.
    """

    def __init__(self, target: Any, thread: LoopThread, supported: Iterable[str] = CAPABILITIES) -> None:
        self.target: Target = target
        self.engine: RolloutEngine = getattr(target, "rollout_engine", target)
        self.pushed: tuple[Any, ...] | None = None
        self.supported = frozenset(supported)
        self._thread = thread
        self._running: set[str] = set()
        self._closed = False

    @classmethod
    def start(
        cls, create: Callable[[], Coroutine[Any, Any, Any]], supported: Iterable[str] = CAPABILITIES
    ) -> EngineHandle:
        """Start a target on a new loop thread and wait until it is up."""
        _outlive_engines()
        thread = LoopThread("vllm-engine")
        try:
            return cls(thread.submit(create()).result(), thread, supported)
        except BaseException:
            thread.stop()
            raise

    def run(self, awaitable: Awaitable[T]) -> T:
        """Wait for a coroutine that uses this handle, from a plain test."""

        async def waiting() -> T:
            return await awaitable

        return asyncio.run(waiting())

    def close(self) -> None:
        """Shut the engine down and stop its loop; harmless when that is done."""

        async def shutdown() -> None:
            await self.target.shutdown()

        if self._closed:
            return
        self._closed = True
        try:
            with waiting("stopping engine"):
                self._thread.submit(shutdown()).result(timeout=60)
        finally:
            self._thread.stop()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.engine if hasattr(self.engine, name) else self.target, name)
        if inspect.iscoroutinefunction(attribute):
            return functools.partial(self._call, attribute)
        if inspect.isasyncgenfunction(inspect.unwrap(attribute)):
            return functools.partial(self._iterate, attribute)
        return attribute

    async def _call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any) -> T:
        return await asyncio.wrap_future(self._thread.submit(function(*args, **kwargs)))

    async def _iterate(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        iterator = function(*args, **kwargs)
        end = object()

        async def step() -> Any:
            return await anext(iterator, end)

        async def close() -> None:
            # A step that was cancelled here may still be unwinding there.
            while getattr(iterator, "ag_running", False):
                await asyncio.sleep(0)
            if hasattr(iterator, "aclose"):  # generators have it, other iterators need not
                await iterator.aclose()

        try:
            while (item := await self._call(step)) is not end:
                yield item
        finally:
            await self._call(close)

    @asynccontextmanager
    async def weight_update(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """As ``RolloutEngine.weight_update``."""
        context = self.engine.weight_update(*args, **kwargs)
        update = await self._call(context.__aenter__)
        try:
            yield _UpdateHandle(update, self)
        except BaseException as error:
            if not await self._call(context.__aexit__, type(error), error, error.__traceback__):
                raise
        else:
            await self._call(context.__aexit__, None, None, None)

    def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """As ``Target.generate``."""
        return self._iterate(self.engine.generate, *args, **kwargs)

    async def update(self, weights: Mapping[str, Any], **options: Any) -> None:
        """As ``Target.update``."""
        await self._call(self.target.update, weights, **options)

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests; as ``Target.abort``, or for one."""
        await self._call(self.target.abort, [request_ids] if isinstance(request_ids, str) else list(request_ids))

    async def abort_all(self) -> None:
        """End every request that was begun here."""
        if hasattr(self.engine, "abort_all"):
            await self._call(self.engine.abort_all)
        elif self._running:
            await self.abort(self._running)

    # -- what tests do all the time -------------------------------------------------------------------------

    async def complete(
        self, prompt: Any, *, request_id: str | None = None, lora_request: Any = None, **sampling: Any
    ) -> Any:
        """Generate to the end.

        Args:
            prompt: token ids, or whatever vLLM takes as a prompt.
            request_id: a new one by default.
            lora_request: vLLM's request for an adapter.
            sampling: fields of vLLM's ``SamplingParams``.

        Returns:
            The last ``RequestOutput``.
        """
        named = {"request_id": request_id, "lora_request": lora_request}
        outputs = [output async for output in self.stream(prompt, **named, **sampling)]
        return outputs[-1]

    async def stream(
        self, prompt: Any, *, request_id: str | None = None, lora_request: Any = None, **sampling: Any
    ) -> AsyncIterator[Any]:
        """Generate, yielding every ``RequestOutput``; arguments as for :meth:`complete`."""
        from vllm import SamplingParams

        if isinstance(prompt, list):
            prompt = {"prompt_token_ids": prompt}
        params = SamplingParams(**{"ignore_eos": True, **sampling})
        named = {"request_id": request_id or uuid.uuid4().hex}
        if lora_request is not None:
            named["lora_request"] = lora_request
        self._running.add(named["request_id"])
        try:
            # Closing this generator must reach the engine at once, not when the inner one is collected.
            async with aclosing(self.generate(prompt, params, **named)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._running.discard(named["request_id"])

    async def greedy(self, prompts: Iterable[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """The greedy continuations of several prompts, generated together."""
        outputs = await asyncio.gather(
            *(self.complete(list(prompt), temperature=0.0, max_tokens=max_tokens) for prompt in prompts)
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


class _UpdateHandle:
    """A ``WeightUpdate`` whose ``send`` runs on the engine's loop."""

    def __init__(self, update: Any, handle: EngineHandle) -> None:
        self._update = update
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._update, name)

    async def send(self, named_tensors: Any) -> None:
        await self._handle._call(self._update.send, named_tensors)


def _outlive_engines() -> None:
    """Let an engine that fails be an error of the test that started it.

    The engine core of 0.8.4 sends its parent SIGUSR1 when it fails, for a handler that vLLM can only install on the
    main thread; without one, the signal ends the whole run without a word.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if on_main and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, lambda number, frame: None)  # not SIG_IGN, which children would inherit


def eager_variables() -> dict[str, str]:
    """What keeps vLLM from compiling in an engine that need not: it compiles some helpers with ``enforce_eager``, too.

    On a CPU that takes every engine about ten seconds of a core.
    """
    return {"TORCHDYNAMO_DISABLE": os.environ.get("TORCHDYNAMO_DISABLE", "1")}


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments in JSON's types: what JSON does not know by its id if it has one, as Ray's groups do."""

    def name(value: Any) -> str:
        identity = getattr(getattr(value, "id", None), "hex", None)
        return f"{type(value).__name__} {identity()}" if callable(identity) else repr(value)

    converted: dict[str, Any] = json.loads(json.dumps(dict(arguments), default=name))
    return converted


def describe(arguments: Mapping[str, Any]) -> str:
    """Name an engine by the model's architecture, its ranks and their executor: ``Qwen2ForCausalLM tp=2 mp``."""
    model = Path(arguments["model"])
    try:
        name = json.loads((model / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError):
        name = model.name
    sizes = (("tp", "tensor_parallel_size"), ("pp", "pipeline_parallel_size"))
    ranks = [f"{short}={arguments[size]}" for short, size in sizes if arguments.get(size, 1) != 1]
    executor = arguments.get("distributed_executor_backend") or ""  # a name, or a class
    return " ".join(filter(None, [name, *ranks, getattr(executor, "__name__", executor)]))


@dataclass(frozen=True)
class EngineConfig:
    """What makes two engines the same: the model directory and the arguments."""

    model: str
    arguments: str

    @classmethod
    def of(cls, model: str, arguments: Mapping[str, Any]) -> EngineConfig:
        """The configuration of an engine on the model directory with these arguments."""
        return cls(model, json.dumps(plain(arguments), sort_keys=True))


@dataclass
class EnginePool:
    """Engines by configuration, started when first asked for, closed when there are too many.

    Attributes:
        limit: the most shared engines alive at once; with 0 none stays alive beside another engine.
        supported: the capabilities that the engines' target has here.
        starts: seconds that each start took, the pool's and those of :meth:`start`, in order.
        keep: what tests share for as long as the pool lives, under names of their own.
    """

    limit: int = 2
    supported: Iterable[str] = tuple(CAPABILITIES)
    starts: list[float] = field(default_factory=list)
    keep: dict[str, Any] = field(default_factory=dict)
    _shared: dict[EngineConfig, EngineHandle] = field(default_factory=dict)
    _owned: list[EngineHandle] = field(default_factory=list)

    def shared(self, config: EngineConfig, create: Callable[[], Coroutine[Any, Any, Any]]) -> EngineHandle:
        """The engine of that configuration; an engine that died is replaced."""
        handle = self._shared.pop(config, None)
        if handle is not None and handle.errored:
            handle.close()
            handle = None
        if handle is None:
            while self._shared and len(self._shared) >= self.limit:
                self._shared.pop(next(iter(self._shared))).close()
            handle = self.start(create)
            self._owned.remove(handle)
        self._shared[config] = handle
        return handle

    def drop(self, handle: EngineHandle) -> None:
        """Close an engine from :meth:`shared`; whoever asks for it next gets a new one."""
        for config in [config for config, shared in self._shared.items() if shared is handle]:
            del self._shared[config]
            handle.close()

    def start(self, create: Callable[[], Coroutine[Any, Any, Any]]) -> EngineHandle:
        """A new engine that belongs to the caller; the pool closes it at the latest in :meth:`close`."""
        while self._shared and not self.limit:
            self._shared.popitem()[1].close()
        begun = time.monotonic()
        handle = EngineHandle.start(create, self.supported)
        self.starts.append(round(time.monotonic() - begun, 2))
        self._owned.append(handle)
        return handle

    def end(self, handle: EngineHandle) -> None:
        """Close an engine from :meth:`start`."""
        if handle in self._owned:
            self._owned.remove(handle)
            handle.close()

    def close(self) -> None:
        """Close every engine."""
        handles, self._shared, self._owned = [*self._shared.values(), *self._owned], {}, []
        with ExitStack() as closing:  # all of them, even when one fails
            for handle in handles:
                closing.callback(handle.close)
