"""The engine's state as data."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from roll_vllm.state import TAGS, EngineState, WeightsStatus, WorkerState

WORKER = WorkerState(0, 42, WeightsStatus.COMPLETE, frozenset(), {"weights": 10})


def test_weights_wake_before_the_kv_cache() -> None:
    assert TAGS == ("weights", "kv_cache")


@pytest.mark.parametrize("weights", WeightsStatus, ids=lambda status: status.name)
@pytest.mark.parametrize("sleeping", [(), ("kv_cache",), TAGS])
def test_ready_means_consistent_and_awake(weights: WeightsStatus, sleeping: tuple[str, ...]) -> None:
    state = EngineState(weights, sleeping=frozenset(sleeping))
    assert state.is_sleeping is bool(sleeping)
    assert state.consistent is (weights is WeightsStatus.COMPLETE)
    assert state.ready is (state.consistent and not state.is_sleeping)
    assert not dataclasses.replace(state, paused=True).ready


@pytest.mark.parametrize("status", WeightsStatus, ids=lambda status: status.name)
def test_a_status_survives_as_plain_text(status: WeightsStatus) -> None:
    assert WeightsStatus(status.value) is status
    assert isinstance(status, str)


def test_statuses_differ() -> None:
    assert len({status.value for status in WeightsStatus}) == len(WeightsStatus) == 5


def test_a_new_engine() -> None:
    state = EngineState(WeightsStatus.NEVER_LOADED)
    assert (state.weight_version, state.sleeping, state.reason, state.workers) == (0, frozenset(), "", ())
    assert WORKER.missing == ()


def test_states_are_frozen() -> None:
    for state, name in ((EngineState(WeightsStatus.COMPLETE), "weight_version"), (WORKER, "pid")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(state, name, 1)


def test_states_travel() -> None:
    state = EngineState(WeightsStatus.COMPLETE, 3, frozenset({"kv_cache"}), "why", (WORKER,))
    again = pickle.loads(pickle.dumps(state))
    assert again == state
    assert again.workers == state.workers
    assert again.weights is WeightsStatus.COMPLETE


def test_the_frontend_s_copy_equals_the_workers() -> None:
    state = EngineState(WeightsStatus.COMPLETE, 3)
    assert dataclasses.replace(state, workers=(WORKER,)) == state
    assert dataclasses.replace(state, weight_version=4) != state
