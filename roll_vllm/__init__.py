"""The layer between a trainer and vLLM: rollout engines that can be fed, put to sleep and trusted.

Importing this package imports neither torch nor vLLM; the names below do when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from roll_vllm.errors import (
    ConfigurationError,
    EngineAsleepError,
    EngineDiedError,
    EngineOutOfMemoryError,
    PlacementTimeoutError,
    RollVllmError,
    UnsupportedFeatureError,
    WeightsNotReadyError,
    WeightUpdateError,
)

if TYPE_CHECKING:
    from roll_vllm.engine import RolloutEngine
    from roll_vllm.factory import create_async_llm
    from roll_vllm.state import EngineState, WeightsStatus, WorkerState
    from roll_vllm.transfer.bucket import BucketSender, serialize_named_weights
    from roll_vllm.transfer.collective import CollectiveSender

_LAZY = {
    "BucketSender": "roll_vllm.transfer.bucket",
    "CollectiveSender": "roll_vllm.transfer.collective",
    "EngineState": "roll_vllm.state",
    "RolloutEngine": "roll_vllm.engine",
    "WeightsStatus": "roll_vllm.state",
    "WorkerState": "roll_vllm.state",
    "create_async_llm": "roll_vllm.factory",
    "serialize_named_weights": "roll_vllm.transfer.bucket",
}

__all__ = [
    "BucketSender",
    "CollectiveSender",
    "ConfigurationError",
    "EngineAsleepError",
    "EngineDiedError",
    "EngineOutOfMemoryError",
    "EngineState",
    "PlacementTimeoutError",
    "RollVllmError",
    "RolloutEngine",
    "UnsupportedFeatureError",
    "WeightUpdateError",
    "WeightsNotReadyError",
    "WeightsStatus",
    "WorkerState",
    "create_async_llm",
    "serialize_named_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
