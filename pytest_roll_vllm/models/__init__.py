"""Models made on the spot: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pytest_roll_vllm.models.base import Model, Probe
from pytest_roll_vllm.models.counting import CountingModel
from pytest_roll_vllm.models.local import LocalModel
from pytest_roll_vllm.models.random_weights import RandomModel
from pytest_roll_vllm.models.smollm2 import SmolLM2
from roll_vllm.errors import ConfigurationError

__all__ = ["Model", "Probe", "available", "make"]

_KINDS: dict[str, Callable[[Path], Model]] = {
    "counting": lambda cache_dir: CountingModel("counting", cache_dir),
    "counting-tied": lambda cache_dir: CountingModel("counting-tied", cache_dir),
    "random": lambda cache_dir: RandomModel("random", cache_dir),
    "random-tied": lambda cache_dir: RandomModel("random-tied", cache_dir),
    "smollm2": SmolLM2,
}


def available() -> tuple[str, ...]:
    """Return the names of the kinds that need no directory."""
    return tuple(_KINDS)


def make(name_or_path: str, cache_dir: Path) -> Model:
    """Return the model of that kind, or the one in that directory; files are written below ``cache_dir``.

    Raises:
        ConfigurationError: there is no such kind or directory, or the model in it cannot be used.
    """
    if name_or_path in _KINDS:
        return _KINDS[name_or_path](cache_dir)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return LocalModel(path)
    raise ConfigurationError(
        f"no model named {name_or_path!r}: choose one of {', '.join(_KINDS)}, "
        "or give the path of a local HF model directory"
    )
