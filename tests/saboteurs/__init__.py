"""Engines and environments that are broken on purpose, one way each.

A saboteur names the contracts that must fail on it; ``tests/proof`` runs exactly those against it. What a
saboteur breaks is the real thing: the runtime's own functions, in this process or inside the worker.
"""

from tests.saboteurs import adapters, generation, lifecycle, sleep, weights
from tests.saboteurs.base import SABOTEURS, Saboteur

__all__ = ["SABOTEURS", "Saboteur", "adapters", "generation", "lifecycle", "sleep", "weights"]
