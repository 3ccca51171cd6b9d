"""Engines and environments that are broken on purpose, one way each.

A saboteur names the contracts that must fail on it; ``pytest --vllm-prove`` runs exactly those against it. What a
saboteur breaks is the real thing: the runtime's own functions, in this process or inside the worker.
"""

from tests.saboteurs import (
    accelerators,
    adapters,
    faults,
    generation,
    lifecycle,
    moe,
    pause,
    placement,
    security,
    sleep,
    traffic,
    weights,
)
from tests.saboteurs.base import SABOTEURS, Saboteur
from tests.saboteurs.worker import QUALNAME

#: What the engines of the proof are started with.
ENGINE_ARGS = {"worker_extension_cls": QUALNAME}

__all__ = [
    "ENGINE_ARGS",
    "SABOTEURS",
    "Saboteur",
    "accelerators",
    "adapters",
    "faults",
    "generation",
    "lifecycle",
    "moe",
    "pause",
    "placement",
    "security",
    "sleep",
    "traffic",
    "weights",
]
