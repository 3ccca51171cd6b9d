"""Who may generate now: the gate that every request passes on its way into the engine.

- Engine ready: the request enters at once.
- Asleep, paused, or an update in progress: it waits, and enters when the engine is ready again.
- Awake without one complete set of weights: it is refused, since nobody said that weights are on their way.
- An update failed: those who wait are refused too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from roll_vllm.errors import WeightsNotReadyError
from roll_vllm.state import EngineState, WeightsStatus

_REMEDY = "push a complete set of weights (async with engine.weight_update() as update: await update.send(...))"

_REFUSALS = {
    WeightsStatus.NEVER_LOADED: "the engine started with load_format='dummy' and holds no trainer weights yet; "
    + _REMEDY
    + ", or create the engine with allow_dummy_weights=True",
    WeightsStatus.DESTROYED: "sleep level 2 destroyed the weights; " + _REMEDY,
    WeightsStatus.INCONSISTENT: "the last weight update did not complete, so the parameters are a mixture; " + _REMEDY,
    WeightsStatus.UPDATING: "a weight update has begun and is not complete; " + _REMEDY,
}


class AbortedWhileWaiting(Exception):
    """The request was aborted before it was let in."""


class AdmissionGate:
    """Lets requests in according to the engine's state.

    Args:
        state: the state at the start.
        allow_dummy_weights: whether an engine that never received weights may generate.
    """

    def __init__(self, state: EngineState, allow_dummy_weights: bool = False) -> None:
        self._state = state
        self._allow_dummy = allow_dummy_weights
        self._changed = asyncio.Event()
        self._held = 0
        self._waiting: list[str] = []
        self._aborted: set[str] = set()
        self._entering = 0
        self._nobody_entering = asyncio.Event()
        self._nobody_entering.set()
        self._death: Exception | None = None

    @property
    def state(self) -> EngineState:
        """The state that requests are judged by."""
        return self._state

    @state.setter
    def state(self, state: EngineState) -> None:
        self._state = state
        self._notify()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Hold requests back. On entry no request is half-way into the engine."""
        self._held += 1
        try:
            await self._nobody_entering.wait()
            yield
        finally:
            self._held -= 1
            self._notify()

    @asynccontextmanager
    async def admitted(self, request_id: str = "") -> AsyncIterator[None]:
        """Wait for the engine, then hold the gate open while the caller enters.

        Raises:
            WeightsNotReadyError: the engine cannot generate, and waiting would not change that.
            AbortedWhileWaiting: :meth:`abort` was called for this request.
        """
        waited = False
        while not self._open(waited):
            waited = True
            await self._change(request_id)
        self._entering += 1
        self._nobody_entering.clear()
        try:
            yield
        finally:
            self._entering -= 1
            if not self._entering:
                self._nobody_entering.set()

    def abort(self, request_ids: Iterable[str]) -> set[str]:
        """Turn away those of the requests that wait, and return them."""
        waiting = {name for name in request_ids if name in self._waiting} - self._aborted
        self._aborted |= waiting
        self._notify()
        return waiting

    def fail(self, death: Exception) -> None:
        """Turn everybody away, now and later, with this error."""
        self._death = death
        self._notify()

    async def _change(self, request_id: str) -> None:
        self._waiting.append(request_id)
        try:
            await self._changed.wait()
        finally:
            self._waiting.remove(request_id)
            # Also when the caller gave up: its id may come again.
            aborted = request_id in self._aborted
            self._aborted.discard(request_id)
        if aborted:
            raise AbortedWhileWaiting(request_id)

    def _open(self, waited: bool) -> bool:
        if self._death is not None:
            raise self._death
        if self._held or self._state.is_sleeping or self._state.paused:
            return False
        weights = self._state.weights
        if weights is WeightsStatus.COMPLETE:
            return True
        if weights is WeightsStatus.NEVER_LOADED and self._allow_dummy:
            return True
        # Who came while the engine slept goes on waiting for the weights that the sleeper must send.
        if waited and weights in (WeightsStatus.DESTROYED, WeightsStatus.UPDATING):
            return False
        reason = f" ({self._state.reason})" if self._state.reason else ""
        raise WeightsNotReadyError(f"generation refused: {_REFUSALS[weights]}{reason}")

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
