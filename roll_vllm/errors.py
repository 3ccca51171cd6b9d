"""Every exception that the runtime raises on purpose.

Each message names the cause and the remedy. All derive from :class:`RollVllmError`, and from the builtin
that fits, so that callers who know only the builtin still catch them.
"""

from __future__ import annotations

#: What an out-of-memory error always says.
OUT_OF_MEMORY_REMEDY = "lower gpu_memory_utilization or use sleep level 2"


class RollVllmError(Exception):
    """Base class of all errors raised by ``roll_vllm``."""


class ConfigurationError(RollVllmError, ValueError):
    """An argument, option or environment variable has a value that cannot work."""


class UnsupportedFeatureError(RollVllmError, NotImplementedError):
    """The feature does not exist on this vLLM version, backend or release of ``roll_vllm``."""


class WeightUpdateError(RollVllmError, ValueError):
    """A weight update was refused or did not complete."""


class WeightsNotReadyError(RollVllmError, RuntimeError):
    """Generation was refused because the engine does not hold one complete set of trainer weights."""


class EngineAsleepError(RollVllmError, RuntimeError):
    """The call needs memory that a sleeping engine has given back."""


class EngineOutOfMemoryError(RollVllmError, MemoryError):
    """The device has too little memory; the message ends with :data:`OUT_OF_MEMORY_REMEDY`."""


class EngineDiedError(RollVllmError, RuntimeError):
    """A worker, its node or the engine core is gone; the engine answers nothing any more, and has to be made anew."""


class PlacementTimeoutError(RollVllmError, TimeoutError):
    """Ray could not give a placement group, a bundle or a worker in time."""
