"""The engine's state as data: which weights it holds, what sleeps, which version."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Tags in the order in which they must wake: buffers live with the weights.
TAGS = ("weights", "kv_cache")


class WeightsStatus(str, enum.Enum):
    """What the engine's parameters hold."""

    # From best to worst: an engine is in the worst state of its ranks.
    COMPLETE = "complete"
    UPDATING = "updating"
    DESTROYED = "destroyed"
    NEVER_LOADED = "never loaded"
    INCONSISTENT = "inconsistent"


@dataclass(frozen=True)
class WorkerState:
    """What one worker reports of itself.

    Attributes:
        rank: its rank in the engine.
        pid: its process.
        weights: what its parameters hold.
        sleeping: the tags whose memory is given back.
        resident_bytes: of the tags that are awake, by tag.
        missing: parameters that the running update has not reached yet (at most ten are named).
        passes: forward passes run since the worker started.
        refused_passes: forward passes that were tried on memory that is given back, and refused.
    """

    rank: int
    pid: int
    weights: WeightsStatus
    sleeping: frozenset[str]
    resident_bytes: dict[str, int]
    missing: tuple[str, ...] = ()
    passes: int = 0
    refused_passes: int = 0

    @classmethod
    def from_report(cls, report: Mapping[str, Any]) -> WorkerState:
        """Build it from the plain data that a worker sends; other keys are left aside."""
        return cls(
            rank=report["rank"],
            pid=report["pid"],
            weights=WeightsStatus(report["weights"]),
            sleeping=frozenset(report["sleeping"]),
            resident_bytes=dict(report["resident_bytes"]),
            missing=tuple(report["missing"]),
            passes=report["passes"],
            refused_passes=report["refused_passes"],
        )


@dataclass(frozen=True)
class EngineState:
    """What the engine as a whole can do now.

    Attributes:
        weights: what the parameters hold, the worst of all ranks.
        weight_version: number of complete updates since the engine started; 0 before the first.
        sleeping: tags asleep on at least one rank.
        reason: why the weights are not complete, where that is known.
        workers: one entry a rank, in rank order; empty in the frontend's own copy.
        paused: whether ``pause_generation()`` holds requests back.
    """

    weights: WeightsStatus
    weight_version: int = 0
    sleeping: frozenset[str] = frozenset()
    reason: str = ""
    workers: tuple[WorkerState, ...] = field(default=(), compare=False)
    paused: bool = False

    @property
    def is_sleeping(self) -> bool:
        """Whether any memory is given back."""
        return bool(self.sleeping)

    @property
    def consistent(self) -> bool:
        """Whether the parameters are one complete set of trainer weights."""
        return self.weights is WeightsStatus.COMPLETE

    @property
    def ready(self) -> bool:
        """Whether generation may run."""
        return self.consistent and not self.sleeping and not self.paused
