"""The gate: who enters, who waits, who is refused, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any

import pytest

from roll_vllm.admission import AbortedWhileWaiting, AdmissionGate
from roll_vllm.errors import RollVllmError, WeightsNotReadyError
from roll_vllm.state import EngineState, WeightsStatus

AWAKE: frozenset[str] = frozenset()
SLEEPS = [frozenset({"kv_cache"}), frozenset({"weights"}), frozenset({"weights", "kv_cache"})]
READY = EngineState(WeightsStatus.COMPLETE)
INCOMPLETE = [status for status in WeightsStatus if status is not WeightsStatus.COMPLETE]


async def settle() -> None:
    """Let every other task run until it waits for something."""
    for _ in range(10):
        await asyncio.sleep(0)


async def enter(gate: AdmissionGate, name: str) -> str:
    try:
        async with gate.admitted(name):
            return "entered"
    except WeightsNotReadyError:
        return "refused"
    except AbortedWhileWaiting:
        return "aborted"


async def arrive(gate: AdmissionGate, name: str = "") -> asyncio.Task[str]:
    task = asyncio.ensure_future(enter(gate, name))
    await settle()
    return task


def fate(task: asyncio.Task[str]) -> str:
    return task.result() if task.done() else "waits"


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test, 10)

    asyncio.run(limited())


async def ends(*tasks: asyncio.Task[str]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def outcome(state: EngineState, allow_dummy: bool, held: bool) -> str:
    """What the documentation promises a request that arrives now."""
    if held or state.sleeping:
        return "waits"
    dummy = allow_dummy and state.weights is WeightsStatus.NEVER_LOADED
    return "entered" if dummy or state.weights is WeightsStatus.COMPLETE else "refused"


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("allow_dummy", [False, True])
@pytest.mark.parametrize("sleeping", [AWAKE, *SLEEPS], ids=lambda tags: "+".join(sorted(tags)) or "awake")
@pytest.mark.parametrize("weights", WeightsStatus, ids=lambda status: status.name)
def test_arrival(weights: WeightsStatus, sleeping: frozenset[str], allow_dummy: bool, held: bool) -> None:
    state = EngineState(weights, sleeping=sleeping)

    async def test() -> None:
        gate = AdmissionGate(state, allow_dummy)
        if not held:
            task = await arrive(gate)
            assert fate(task) == outcome(state, allow_dummy, held)
        else:
            async with gate.closed():
                task = await arrive(gate)
                assert fate(task) == "waits"
        await ends(task)

    run(test())


@pytest.mark.parametrize("weights", INCOMPLETE, ids=lambda status: status.name)
def test_a_refusal_names_cause_reason_and_remedy(weights: WeightsStatus) -> None:
    async def test() -> None:
        async with AdmissionGate(EngineState(weights, reason="disk on fire")).admitted():
            pytest.fail("nobody may enter")

    with pytest.raises(WeightsNotReadyError, match=r"^generation refused: .*weight_update.*\(disk on fire\)$") as info:
        run(test())
    assert isinstance(info.value, RollVllmError)
    assert isinstance(info.value, RuntimeError)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (WeightsStatus.COMPLETE, "entered"),
        (WeightsStatus.DESTROYED, "waits"),  # who put the engine to sleep must send weights
        (WeightsStatus.UPDATING, "waits"),
        (WeightsStatus.INCONSISTENT, "refused"),
        (WeightsStatus.NEVER_LOADED, "refused"),
    ],
)
@pytest.mark.parametrize("sleeping", SLEEPS, ids=lambda tags: "+".join(sorted(tags)))
def test_after_waking(sleeping: frozenset[str], weights: WeightsStatus, expected: str) -> None:
    async def test() -> None:
        gate = AdmissionGate(EngineState(weights, sleeping=sleeping))
        task = await arrive(gate)
        assert fate(task) == "waits"
        gate.state = EngineState(weights)
        await settle()
        assert fate(task) == expected
        gate.state = READY
        await settle()
        assert fate(task) == ("refused" if expected == "refused" else "entered")

    run(test())


def test_sleep_update_wake() -> None:
    async def test() -> None:
        gate = AdmissionGate(READY)
        asleep = frozenset({"weights", "kv_cache"})
        gate.state = EngineState(WeightsStatus.DESTROYED, sleeping=asleep)
        waiting = [await arrive(gate) for _ in range(3)]
        async with gate.closed():
            gate.state = EngineState(WeightsStatus.UPDATING, sleeping=frozenset({"kv_cache"}))
            waiting.append(await arrive(gate))
            gate.state = EngineState(WeightsStatus.COMPLETE, 1, frozenset({"kv_cache"}))
        await settle()
        assert [fate(task) for task in waiting] == ["waits"] * 4
        gate.state = EngineState(WeightsStatus.COMPLETE, 1)
        await settle()
        assert [fate(task) for task in waiting] == ["entered"] * 4

    run(test())


def test_a_failed_update_refuses_those_who_waited_for_it() -> None:
    async def test() -> None:
        gate = AdmissionGate(READY)
        async with gate.closed():
            waiting = [await arrive(gate) for _ in range(5)]
            gate.state = EngineState(WeightsStatus.INCONSISTENT, reason="torn")
            await settle()
            assert {fate(task) for task in waiting} == {"waits"}
        await settle()
        assert [fate(task) for task in waiting] == ["refused"] * 5

    run(test())


def test_an_update_that_failed_before_it_wrote_lets_them_in() -> None:
    async def test() -> None:
        gate = AdmissionGate(READY)
        waiting = []

        async def update() -> None:
            async with gate.closed():
                waiting.append(await arrive(gate))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await update()
        await settle()
        assert fate(waiting[0]) == "entered"

    run(test())


def test_closed_waits_for_those_who_are_entering() -> None:
    async def test() -> None:
        gate = AdmissionGate(READY)
        doors = [asyncio.Event() for _ in range(3)]
        log: list[str] = []

        async def slowly(index: int) -> None:
            async with gate.admitted():
                await doors[index].wait()
                log.append(f"in {index}")

        async def close() -> None:
            async with gate.closed():
                log.append("closed")
                await settle()

        inside = [asyncio.ensure_future(slowly(index)) for index in range(3)]
        await settle()
        closing = asyncio.ensure_future(close())
        await settle()
        late = await arrive(gate)
        assert fate(late) == "waits"
        for index in (2, 0, 1):
            assert log == [f"in {i}" for i in (2, 0, 1)[: len(log)]]
            doors[index].set()
            await settle()
        await asyncio.gather(closing, *inside)
        assert log == ["in 2", "in 0", "in 1", "closed"]
        assert await late == "entered"

    run(test())


def test_one_who_fails_while_entering_does_not_block() -> None:
    async def test() -> None:
        gate = AdmissionGate(READY)
        with pytest.raises(ZeroDivisionError):
            async with gate.admitted():
                raise ZeroDivisionError
        async with gate.closed():
            pass

    run(test())


def test_giving_up_while_entering_waiting_or_closing_leaves_no_trace() -> None:
    async def test() -> None:
        gate = AdmissionGate(READY)

        async def entering() -> None:
            async with gate.admitted():
                await asyncio.Event().wait()

        async def closing() -> None:
            async with gate.closed():
                pytest.fail("somebody is entering")

        inside = asyncio.ensure_future(entering())
        await settle()
        closer = asyncio.ensure_future(closing())
        waiting = await arrive(gate)
        assert fate(waiting) == "waits"
        for task in (waiting, closer, inside):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert fate(await arrive(gate)) == "entered"
        async with gate.closed():
            pass

    run(test())


# --- aborted while waiting -------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True])
def test_who_waits_can_be_aborted(held: bool) -> None:
    async def test() -> None:
        gate = AdmissionGate(READY if held else EngineState(WeightsStatus.COMPLETE, sleeping=SLEEPS[0]))
        async with gate.closed() if held else nullcontext():
            first, second, unnamed = [await arrive(gate, name) for name in ("first", "second", "")]
            gate.abort(["second", "nobody"])
            await settle()
            assert [fate(task) for task in (first, second, unnamed)] == ["waits", "aborted", "waits"]
            again = await arrive(gate, "second")
            assert fate(again) == "waits"
        gate.state = READY
        await settle()
        assert [fate(task) for task in (first, unnamed, again)] == ["entered"] * 3

    run(test())


def test_an_abort_and_an_open_gate_at_the_same_moment() -> None:
    async def test() -> None:
        gate = AdmissionGate(EngineState(WeightsStatus.COMPLETE, sleeping=SLEEPS[0]))
        task = await arrive(gate, "one")
        gate.abort(["one"])
        gate.state = READY
        await settle()
        assert fate(task) == "aborted"

    run(test())


def test_an_abort_is_not_kept_for_later() -> None:
    async def test() -> None:
        gate = AdmissionGate(READY)
        gate.abort(["one"])
        assert fate(await arrive(gate, "one")) == "entered"
        gate.state = EngineState(WeightsStatus.COMPLETE, sleeping=SLEEPS[0])
        gives_up = await arrive(gate, "one")
        gate.abort(["one"])
        gives_up.cancel()
        await settle()
        assert gives_up.cancelled()
        task = await arrive(gate, "one")
        gate.state = READY
        await settle()
        assert fate(task) == "entered"

    run(test())


# --- many ------------------------------------------------------------------------------------------------


def test_the_gate_opens_with_the_last_who_closed_it() -> None:
    async def test() -> None:
        gate = AdmissionGate(READY)
        async with gate.closed():
            async with gate.closed():
                task = await arrive(gate)
            await settle()
            assert fate(task) == "waits"
        assert await task == "entered"

    run(test())


def test_no_wake_up_is_lost() -> None:
    """Many requests, random pauses, a gate that never rests: all enter, none while it is shut."""

    async def test() -> None:
        dice = random.Random(0)
        gate = AdmissionGate(READY)
        inside = entered = 0
        shut = False

        async def request() -> None:
            nonlocal inside, entered
            for _ in range(dice.randrange(20)):
                await asyncio.sleep(0)
            async with gate.admitted():
                inside += 1
                for _ in range(dice.randrange(4)):
                    assert not shut
                    assert gate.state.ready
                    await asyncio.sleep(0)
                inside -= 1
                entered += 1

        async def controller() -> None:
            nonlocal shut
            for version in range(30):
                async with gate.closed():
                    assert inside == 0
                    shut = True
                    gate.state = EngineState(WeightsStatus.UPDATING, version)
                    for _ in range(dice.randrange(4)):
                        await asyncio.sleep(0)
                    asleep = frozenset({"kv_cache"}) if dice.random() < 0.5 else AWAKE
                    gate.state = EngineState(WeightsStatus.COMPLETE, version + 1, asleep)
                    shut = False
                for _ in range(dice.randrange(3)):
                    await asyncio.sleep(0)
                async with gate.closed():
                    gate.state = EngineState(WeightsStatus.COMPLETE, version + 1)

        await asyncio.gather(controller(), *(request() for _ in range(500)))
        assert entered == 500

    run(test())


# --- a pause ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WeightsStatus, ids=lambda status: status.name)
def test_everybody_waits_while_paused(weights: WeightsStatus) -> None:
    state = EngineState(weights, paused=True)

    async def test() -> None:
        gate = AdmissionGate(state)
        early, aborted = await arrive(gate, "early"), await arrive(gate, "aborted")
        async with gate.closed():  # an update during the pause
            gate.state = dataclasses.replace(READY, paused=True)
        await settle()
        assert gate.abort(["aborted", "unknown"]) == {"aborted"}
        assert gate.abort(["aborted"]) == set()
        await settle()
        assert (fate(early), fate(aborted)) == ("waits", "aborted")
        gate.state = READY
        await settle()
        assert fate(early) == "entered"

    run(test())


def test_the_resume_refuses_where_there_are_no_weights() -> None:
    async def test() -> None:
        gate = AdmissionGate(EngineState(WeightsStatus.INCONSISTENT, paused=True))
        task = await arrive(gate)
        assert fate(task) == "waits"
        gate.state = dataclasses.replace(gate.state, paused=False)
        await settle()
        assert fate(task) == "refused"

    run(test())
