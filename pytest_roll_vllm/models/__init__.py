"""Models made on the spot: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pytest_roll_vllm.models.base import Model, Probe
from pytest_roll_vllm.models.counting import CountingModel
from pytest_roll_vllm.models.local import LocalModel
from pytest_roll_vllm.models.moe import CountingExperts, CountingMixtral, RandomExperts, RandomMixtral
from pytest_roll_vllm.models.random_weights import RandomModel
from pytest_roll_vllm.models.smollm2 import SmolLM2
from roll_vllm.errors import ConfigurationError

__all__ = ["Model", "Probe", "available", "make"]

_KINDS: dict[str, Callable[[Path, str], Model]] = {
    "counting": lambda cache_dir, dtype: CountingModel("counting", cache_dir, dtype),
    "counting-tied": lambda cache_dir, dtype: CountingModel("counting-tied", cache_dir, dtype),
    "random": lambda cache_dir, dtype: RandomModel("random", cache_dir, dtype),
    "random-tied": lambda cache_dir, dtype: RandomModel("random-tied", cache_dir, dtype),
    "counting-moe": lambda cache_dir, dtype: CountingExperts("counting-moe", cache_dir, dtype),
    "counting-moe-tied": lambda cache_dir, dtype: CountingExperts("counting-moe-tied", cache_dir, dtype),
    "counting-mixtral": lambda cache_dir, dtype: CountingMixtral("counting-mixtral", cache_dir, dtype),
    "random-moe": lambda cache_dir, dtype: RandomExperts("random-moe", cache_dir, dtype),
    "random-moe-tied": lambda cache_dir, dtype: RandomExperts("random-moe-tied", cache_dir, dtype),
    "random-mixtral": lambda cache_dir, dtype: RandomMixtral("random-mixtral", cache_dir, dtype),
    "smollm2": lambda cache_dir, _: SmolLM2(cache_dir),
}


def available() -> tuple[str, ...]:
    """Return the names of the kinds that need no directory."""
    return tuple(_KINDS)


def make(name_or_path: str, cache_dir: Path, dtype: str = "float32") -> Model:
    """Return the model of that kind, or the one in that directory; files are written below ``cache_dir``.

    Args:
        name_or_path: a kind, or a directory.
        cache_dir: where models that are made are kept.
        dtype: of models whose weights are computed; the others have one already.

    Raises:
        ConfigurationError: there is no such kind or directory, or the model in it cannot be used.
    """
    if name_or_path in _KINDS:
        return _KINDS[name_or_path](cache_dir, dtype)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return LocalModel(path)
    raise ConfigurationError(
        f"no model named {name_or_path!r}: choose one of {', '.join(_KINDS)}, "
        "or give the path of a local HF model directory"
    )
