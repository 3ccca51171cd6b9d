"""Engines for tests: each on its own event-loop thread, shared by every test with the same configuration.

A test's event loop lives as long as the test, an engine much longer; so an engine gets a loop of its own,
and a handle carries calls there from whatever loop, or none, the test runs in.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
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
        """Stop the loop and wait for its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()


class EngineHandle:
    """A rollout engine that can be used from any event loop, and from plain tests through :meth:`run`.

    Every attribute of the engine is there: coroutine methods are awaited, ``generate`` is iterated and
    ``weight_update`` entered as on the engine itself.

    Attributes:
        engine: the engine itself; touch it only on its own loop.
        pushed: the (model name, version, weight version) that a trainer pushed last.
    """

    def __init__(self, engine: Any, thread: LoopThread) -> None:
        self.engine: RolloutEngine = engine
        self.pushed: tuple[str, int, int] | None = None
        self._thread = thread

    @classmethod
    def start(cls, create: Callable[[], Coroutine[Any, Any, Any]]) -> EngineHandle:
        """Start an engine on a new loop thread and wait until it is up."""
        _outlive_engines()
        thread = LoopThread("vllm-engine")
        try:
            return cls(thread.submit(create()).result(), thread)
        except BaseException:
            thread.stop()
            raise

    def run(self, awaitable: Awaitable[T]) -> T:
        """Wait for a coroutine that uses this handle, from a plain test."""

        async def waiting() -> T:
            return await awaitable

        return asyncio.run(waiting())

    def close(self) -> None:
        """Shut the engine down and stop its loop."""

        async def shutdown() -> None:
            self.engine.shutdown()

        try:
            self._thread.submit(shutdown()).result(timeout=60)
        finally:
            self._thread.stop()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.engine, name)
        if inspect.iscoroutinefunction(attribute):
            return functools.partial(self._call, attribute)
        if inspect.isasyncgenfunction(inspect.unwrap(attribute)):
            return functools.partial(self._iterate, attribute)
        return attribute

    async def _call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any) -> T:
        return await asyncio.wrap_future(self._thread.submit(function(*args, **kwargs)))

    async def _iterate(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        iterator = function(*args, **kwargs)
        end = object()

        async def step() -> Any:
            return await anext(iterator, end)

        async def close() -> None:
            # A step that was cancelled here may still be unwinding there.
            while iterator.ag_running:
                await asyncio.sleep(0)
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
        # Closing this generator must reach the engine at once, not when the inner one is collected.
        named = {"request_id": request_id or uuid.uuid4().hex}
        if lora_request is not None:
            named["lora_request"] = lora_request
        async with aclosing(self.generate(prompt, params, **named)) as outputs:
            async for output in outputs:
                yield output

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


@dataclass(frozen=True)
class EngineConfig:
    """What makes two engines the same: the model directory and the arguments."""

    model: str
    arguments: str

    @classmethod
    def of(cls, model: str, arguments: Mapping[str, Any]) -> EngineConfig:
        """The configuration of an engine on the model directory with these arguments."""
        return cls(model, json.dumps(dict(arguments), sort_keys=True, default=repr))


@dataclass
class EnginePool:
    """Engines by configuration, started when first asked for, closed when there are too many.

    Attributes:
        limit: the most shared engines alive at once; with 0 none stays alive beside another engine.
        starts: seconds that each start took, the pool's and those of :meth:`start`, in order.
        keep: what tests share for as long as the pool lives, under names of their own.
    """

    limit: int = 2
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

    def start(self, create: Callable[[], Coroutine[Any, Any, Any]]) -> EngineHandle:
        """A new engine that belongs to the caller; the pool closes it at the latest in :meth:`close`."""
        while self._shared and not self.limit:
            self._shared.popitem()[1].close()
        begun = time.monotonic()
        handle = EngineHandle.start(create)
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
