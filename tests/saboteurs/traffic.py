"""Breakages that show only when several things happen at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from tests.saboteurs.base import in_worker, saboteur

in_worker("try-a-forward-pass-while-asleep", "sl-no-forward-when-not-resident")


@saboteur("sl-no-forward-when-not-resident")
@contextmanager
def runs_after_a_partial_wake(engine: Any) -> Iterator[None]:
    """The gate opens as soon as one of two tags wakes."""
    gate = engine.engine._gate
    closed = type(gate)._open

    def half_open(self: Any, waited: bool) -> bool:
        return len(self._state.sleeping) == 1 or bool(closed(self, waited))

    with patch("roll_vllm.admission.AdmissionGate._open", half_open):
        yield


@saboteur("sl-requests-around-sleep")
@contextmanager
def forgets_who_waits(engine: Any) -> Iterator[None]:
    """Requests that wait at the gate do not hear that it has opened."""
    with patch("roll_vllm.admission.AdmissionGate._notify", lambda gate: None):
        yield


@saboteur("sl-requests-around-sleep")
@contextmanager
def sleeps_on_running_requests(engine: Any) -> Iterator[None]:
    """Sleep does not end what runs."""

    async def nothing(*_: Any) -> None:
        pass

    with patch.object(engine.engine, "_quiesce", nothing), patch.object(engine.engine, "_drop_prefix_cache", nothing):
        yield


@saboteur("cf-update-during-traffic")
@contextmanager
def updates_while_it_generates(engine: Any) -> Iterator[None]:
    """An update neither ends the requests that run nor holds back those that come."""

    async def nothing(*_: Any) -> None:
        pass

    with (
        patch.object(engine.engine, "_quiesce", nothing),
        patch.object(engine.engine, "_drop_prefix_cache", nothing),
        patch.object(engine.engine._gate, "closed", nullcontext),
    ):
        yield


@saboteur("cf-update-during-traffic")
@contextmanager
def aborts_by_every_policy(engine: Any) -> Iterator[None]:
    """An update that was to wait for running requests aborts them."""
    quiesce = engine.engine._quiesce

    async def abort(running: str) -> None:
        await quiesce("abort")

    with patch.object(engine.engine, "_quiesce", abort):
        yield


# The walk's engine is another than the one that a saboteur is given: what breaks is the class.


@saboteur("cf-serialised-control")
@contextmanager
def skips_calls_when_busy(engine: Any) -> Iterator[None]:
    """A sleep or a wake that comes while another call is at work is called done."""
    from roll_vllm.engine import RolloutEngine

    offload, load = RolloutEngine.offload_states, RolloutEngine.load_states

    async def offload_states(self: Any, level: int = 1) -> None:
        if not self._control.locked():
            await offload(self, level)

    async def load_states(self: Any, tags: Any = None) -> None:
        if not self._control.locked():
            await load(self, tags)

    with (
        patch.object(RolloutEngine, "offload_states", offload_states),
        patch.object(RolloutEngine, "load_states", load_states),
    ):
        yield


@saboteur("cf-serialised-control")
@contextmanager
def forgets_the_adapter_in_an_update(engine: Any) -> Iterator[None]:
    """After an update, requests for the adapter are answered without it, until there is another one."""
    from roll_vllm.engine import RolloutEngine

    add_lora, commit, generate = RolloutEngine.add_lora, RolloutEngine._commit_update, RolloutEngine.generate
    forgetful: set[Any] = set()

    async def added(self: Any, *args: Any, **kwargs: Any) -> bool:
        forgetful.discard(self)
        return await add_lora(self, *args, **kwargs)

    def committed(self: Any, *args: Any) -> None:
        forgetful.add(self)
        commit(self, *args)

    async def without(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self in forgetful:
            kwargs.pop("lora_request", None)
        async for output in generate(self, *args, **kwargs):
            yield output

    with (
        patch.object(RolloutEngine, "add_lora", added),
        patch.object(RolloutEngine, "_commit_update", committed),
        patch.object(RolloutEngine, "generate", without),
    ):
        yield
