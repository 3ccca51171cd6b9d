"""Engines on their own loops, with a fake engine in the place of vLLM's."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from types import ModuleType
from typing import Any

import pytest

from pytest_roll_vllm.engines import EngineConfig, EngineHandle, EnginePool, LoopThread

THREAD = "vllm-engine"


class FakeOutput:
    """Stands for a ``RequestOutput``."""

    def __init__(self, request_id: str, token_ids: list[int], prompt: Any, params: Any) -> None:
        self.request_id, self.prompt, self.params = request_id, prompt, params
        self.outputs = [self]
        self.token_ids = token_ids


class FakeUpdate:
    """Stands for a ``WeightUpdate``."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.counts: dict[str, int] = {}

    async def send(self, named_tensors: dict[str, int]) -> None:
        self.engine.note("send")
        if "bad" in named_tensors:
            raise LookupError("bad name")
        self.counts = {"loaded": len(named_tensors)}


class FakeEngine:
    """No vLLM, no model: counts upwards, and notes where each call ran."""

    is_fake = True

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.log: list[str] = []
        self.errored = False
        self.shut_down = 0
        self.never = asyncio.Event()
        self.commit_error: Exception | None = None
        self.weight_version = 3

    def note(self, event: str) -> None:
        assert threading.current_thread() is self.thread, f"{event} on {threading.current_thread()}"
        self.log.append(event)

    async def add(self, first: int, *, second: int = 0) -> int:
        self.note("add")
        await asyncio.sleep(0)
        return first + second

    async def fail(self) -> None:
        raise LookupError("on purpose")

    async def hang(self) -> None:
        try:
            await self.never.wait()
        finally:
            self.note("unwound")

    def plain(self) -> str:
        return "plain"

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[FakeOutput]:
        self.note("open")
        try:
            for count in range(1, params.max_tokens + 1):
                if count == params.fail_at:
                    raise LookupError("on purpose")
                if count == params.hang_at:
                    await self.never.wait()
                await asyncio.sleep(0)
                yield FakeOutput(request_id, list(range(count)), prompt, params)
        finally:
            await asyncio.sleep(0.01)  # as vLLM's, which awaits the abort
            self.note("closed")

    @asynccontextmanager
    async def weight_update(self, transport: str = "bucket") -> AsyncIterator[FakeUpdate]:
        self.note(f"begin {transport}")
        if transport == "pigeon":
            raise LookupError("no pigeons")
        try:
            yield FakeUpdate(self)
        except BaseException as error:
            self.note(f"abandon {type(error).__name__}")
            raise
        if self.commit_error:
            raise self.commit_error
        self.note("commit")

    async def shutdown(self) -> None:
        self.note("shutdown")
        self.shut_down += 1


class FakeSamplingParams:
    """Stands for vLLM's ``SamplingParams``."""

    def __init__(self, max_tokens: int = 3, fail_at: int = 0, hang_at: int = 0, **others: Any) -> None:
        self.max_tokens, self.fail_at, self.hang_at, self.others = max_tokens, fail_at, hang_at, others


async def create() -> FakeEngine:
    return FakeEngine()


async def fail_to_start() -> FakeEngine:
    await asyncio.sleep(0)
    raise LookupError("no room")


def engine_threads() -> int:
    return sum(thread.name == THREAD for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = engine_threads()
    yield
    assert engine_threads() == before


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineHandle]:
    vllm = ModuleType("vllm")
    vllm.SamplingParams = FakeSamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    handle = EngineHandle.start(create)
    yield handle
    handle.close()


def log(handle: EngineHandle) -> list[str]:
    entries: list[str] = handle.log
    return entries


async def waits_for(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), 10)


# --- calls -----------------------------------------------------------------------------------------------


def test_from_a_plain_test(handle: EngineHandle) -> None:
    assert handle.is_fake
    assert handle.run(handle.add(2, second=3)) == 5
    assert handle.run(handle.add(4)) == 4
    assert (handle.plain(), handle.weight_version, handle.pushed) == ("plain", 3, None)


def test_from_a_coroutine_of_the_test(handle: EngineHandle) -> None:
    async def test() -> int:
        return sum(await asyncio.gather(*(handle.add(number) for number in range(10))))

    assert asyncio.run(test()) == handle.run(test()) == 45


def test_from_many_loops_at_once(handle: EngineHandle) -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(handle.run(handle.add(1, second=1)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == [2] * 8


def test_errors_come_back(handle: EngineHandle) -> None:
    with pytest.raises(LookupError, match="on purpose"):
        handle.run(handle.fail())
    with pytest.raises(TypeError, match="missing 1 required"):
        handle.run(handle.add())
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = handle.missing
    assert handle.run(handle.add(1)) == 1


def test_a_call_that_is_given_up_is_cancelled_there(handle: EngineHandle) -> None:
    async def test() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle.hang(), 0.01)
        await waits_for(lambda: log(handle) == ["unwound"])

    handle.run(test())


# --- generators ------------------------------------------------------------------------------------------


def test_iterating_to_the_end(handle: EngineHandle) -> None:
    async def test() -> list[int]:
        return [len(output.token_ids) async for output in handle.generate("p", FakeSamplingParams(), "r")]

    assert asyncio.run(test()) == [1, 2, 3]
    assert log(handle) == ["open", "closed"]


@pytest.mark.parametrize("name", ["generate", "stream"])
def test_closing_early_reaches_the_engine(handle: EngineHandle, name: str) -> None:
    async def test() -> None:
        stream = handle.stream([1], max_tokens=99)
        if name == "generate":
            stream = handle.generate([1], FakeSamplingParams(99), "r")
        async with aclosing(stream) as outputs:  # type: ignore[type-var]
            async for _ in outputs:
                break
        assert log(handle) == ["open", "closed"]

    asyncio.run(test())


@pytest.mark.parametrize("name", ["generate", "stream"])
def test_giving_up_reaches_the_engine(handle: EngineHandle, name: str) -> None:
    async def consume() -> None:
        stream = handle.stream([1], hang_at=2)
        if name == "generate":
            stream = handle.generate([1], FakeSamplingParams(hang_at=2), "r")
        async for _ in stream:
            pass

    async def test() -> None:
        task = asyncio.ensure_future(consume())
        await waits_for(lambda: log(handle) == ["open"])
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log(handle) == ["open", "closed"]

    asyncio.run(test())


def test_errors_of_generators_come_back(handle: EngineHandle) -> None:
    lengths = []

    async def test() -> None:
        async for output in handle.stream([1], fail_at=3):
            lengths.append(len(output.token_ids))

    with pytest.raises(LookupError, match="on purpose"):
        asyncio.run(test())
    assert lengths == [1, 2]
    assert log(handle) == ["open", "closed"]


def test_a_generator_that_is_never_started(handle: EngineHandle) -> None:
    async def test() -> None:
        await handle.generate("p", FakeSamplingParams(), "r").aclose()

    asyncio.run(test())
    assert log(handle) == []


def test_complete_and_stream(handle: EngineHandle) -> None:
    output = handle.run(handle.complete([5, 6], max_tokens=4, temperature=0.5))
    assert output.token_ids == [0, 1, 2, 3]
    assert output.prompt == {"prompt_token_ids": [5, 6]}
    assert output.params.others == {"temperature": 0.5, "ignore_eos": True}
    text = handle.run(handle.complete("text", request_id="mine", ignore_eos=False))
    assert (text.prompt, text.request_id, text.params.others) == ("text", "mine", {"ignore_eos": False})
    assert text.request_id != output.request_id != handle.run(handle.complete("text")).request_id


def test_greedy(handle: EngineHandle) -> None:
    assert handle.run(handle.greedy([[1], (2, 3)], 2)) == [[0, 1], [0, 1]]


# --- weight updates --------------------------------------------------------------------------------------


def test_an_update(handle: EngineHandle) -> None:
    async def test() -> None:
        async with handle.weight_update("bucket") as update:
            await update.send({"a": 1, "b": 2})
            assert "commit" not in log(handle)
        assert update.counts == {"loaded": 2}

    asyncio.run(test())
    assert log(handle) == ["begin bucket", "send", "commit"]


def test_a_block_that_fails(handle: EngineHandle) -> None:
    error = ZeroDivisionError("mine")

    async def test() -> None:
        async with handle.weight_update():
            raise error

    with pytest.raises(ZeroDivisionError) as info:
        asyncio.run(test())
    assert info.value is error
    assert log(handle) == ["begin bucket", "abandon ZeroDivisionError"]


def test_a_send_that_fails(handle: EngineHandle) -> None:
    async def test() -> None:
        async with handle.weight_update() as update:
            await update.send({"bad": 1})

    with pytest.raises(LookupError, match="bad name"):
        asyncio.run(test())
    assert log(handle) == ["begin bucket", "send", "abandon LookupError"]


def test_an_update_that_cannot_begin(handle: EngineHandle) -> None:
    async def test() -> None:
        async with handle.weight_update("pigeon"):
            pytest.fail("entered")

    with pytest.raises(LookupError, match="no pigeons"):
        asyncio.run(test())


def test_an_update_that_cannot_end(handle: EngineHandle) -> None:
    fake: Any = handle.engine
    fake.commit_error = LookupError("incomplete")

    async def test() -> None:
        async with handle.weight_update():
            pass

    with pytest.raises(LookupError, match="incomplete"):
        asyncio.run(test())


def test_an_update_that_is_given_up(handle: EngineHandle) -> None:
    async def update() -> None:
        async with handle.weight_update():
            await asyncio.Event().wait()

    async def test() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(update(), 0.05)
        assert log(handle) == ["begin bucket", "abandon CancelledError"]

    asyncio.run(test())


# --- start and end ---------------------------------------------------------------------------------------


def test_closing_again(handle: EngineHandle) -> None:
    """A test may close the engine that its fixture closes, too."""
    for _ in range(2):
        handle.close()
    assert log(handle).count("shutdown") == 1


def test_start_and_close() -> None:
    handle = EngineHandle.start(create)
    engine: Any = handle.engine
    assert engine.thread.name == THREAD
    assert engine.thread is not threading.current_thread()
    assert engine_threads() == 1
    handle.close()
    assert engine.shut_down == 1
    assert not engine.thread.is_alive()


def test_a_start_that_fails_leaves_no_thread() -> None:
    with pytest.raises(LookupError, match="no room"):
        EngineHandle.start(fail_to_start)
    assert engine_threads() == 0


def test_a_shutdown_that_fails_leaves_no_thread() -> None:
    handle = EngineHandle.start(Brittle.create)
    with pytest.raises(LookupError, match="stuck"):
        handle.close()
    assert engine_threads() == 0


def test_loop_threads_are_told_apart() -> None:
    async def where() -> threading.Thread:
        return threading.current_thread()

    first, second = LoopThread("first"), LoopThread("second")
    try:
        assert [thread.submit(where()).result(5).name for thread in (first, second)] == ["first", "second"]
    finally:
        first.stop()
        second.stop()
    assert not {"first", "second"} & {thread.name for thread in threading.enumerate()}


# --- the pool --------------------------------------------------------------------------------------------


class Brittle(FakeEngine):
    """Cannot be shut down."""

    async def shutdown(self) -> None:
        raise LookupError("stuck")

    @classmethod
    async def create(cls) -> FakeEngine:
        return cls()


@pytest.fixture
def pool() -> Iterator[EnginePool]:
    pool = EnginePool(limit=2)
    yield pool
    pool.close()


def config(name: str) -> EngineConfig:
    return EngineConfig.of("model", {"name": name})


def shut_down(handle: EngineHandle) -> int:
    count: int = handle.engine.shut_down
    return count


def test_equal_configurations_share_an_engine(pool: EnginePool) -> None:
    first = pool.shared(config("a"), create)
    assert pool.shared(config("a"), fail_to_start) is first
    assert pool.shared(config("b"), create) is not first
    assert (len(pool.starts), engine_threads()) == (2, 2)


def test_the_engine_used_longest_ago_makes_room(pool: EnginePool) -> None:
    a, b = pool.shared(config("a"), create), pool.shared(config("b"), create)
    pool.shared(config("a"), create)
    c = pool.shared(config("c"), create)
    assert [shut_down(handle) for handle in (a, b, c)] == [0, 1, 0]
    assert pool.shared(config("a"), fail_to_start) is a
    assert pool.shared(config("b"), create) is not b
    assert [shut_down(handle) for handle in (a, c)] == [0, 1]
    assert engine_threads() == 2


def test_room_is_made_before_the_new_engine_starts(pool: EnginePool) -> None:
    pool.limit = 1
    old = pool.shared(config("a"), create)

    async def in_time() -> FakeEngine:
        assert shut_down(old) == 1
        return FakeEngine()

    pool.shared(config("b"), in_time)


def test_a_dead_engine_is_replaced(pool: EnginePool) -> None:
    dead = pool.shared(config("a"), create)
    fake: Any = dead.engine
    fake.errored = True
    new = pool.shared(config("a"), create)
    assert new is not dead
    assert (shut_down(dead), engine_threads()) == (1, 1)


def test_a_failed_start_is_forgotten(pool: EnginePool) -> None:
    for _ in range(2):
        with pytest.raises(LookupError, match="no room"):
            pool.shared(config("a"), fail_to_start)
    assert (pool.starts, engine_threads()) == ([], 0)
    assert pool.shared(config("a"), create).is_fake


def test_engines_of_a_test_s_own(pool: EnginePool) -> None:
    shared = pool.shared(config("a"), create)
    own, other = pool.start(create), pool.start(create)
    assert len({id(handle.engine) for handle in (shared, own, other)}) == 3
    pool.end(own)
    pool.end(own)
    pool.end(shared)
    assert [shut_down(handle) for handle in (shared, own, other)] == [0, 1, 0]
    pool.close()
    pool.close()
    assert [shut_down(handle) for handle in (shared, own, other)] == [1, 1, 1]
    assert len(pool.starts) == 3


def test_closing_closes_all_even_if_some_fail(pool: EnginePool) -> None:
    sound = [pool.shared(config("a"), create), pool.start(create)]
    pool.shared(config("b"), Brittle.create)
    pool.start(Brittle.create)
    with pytest.raises(LookupError, match="stuck"):
        pool.close()
    assert [shut_down(handle) for handle in sound] == [1, 1]
    assert engine_threads() == 0


def test_what_makes_two_engines_the_same() -> None:
    same = [EngineConfig.of("m", {"a": 1, "b": [2]}), EngineConfig.of("m", {"b": [2], "a": 1})]
    different = [EngineConfig.of("n", {"a": 1, "b": [2]}), EngineConfig.of("m", {"a": 1, "b": [3]})]
    assert len({*same}) == 1
    assert len({*same, *different}) == 3
    assert EngineConfig.of("m", {"a": object}) == EngineConfig.of("m", {"a": object})


def test_nothing_is_left_running_on_a_loop_that_stops() -> None:
    thread = LoopThread(THREAD)
    ends: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ends.append("tidied up")

    call = thread.submit(forever())
    thread.submit(asyncio.sleep(0)).result()
    thread.stop()
    assert ends == ["tidied up"]
    assert call.cancelled()
