"""The suite put to the test (``pytest --vllm-prove``): every contract must fail on targets broken on purpose.

A *saboteur* breaks the target in one way and names the contracts that must notice. They live in a module of their own
(``--vllm-saboteurs``), with what engines need to be broken in its ``ENGINE_ARGS``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from roll_vllm.errors import ConfigurationError

#: A context in which the engine, given as its handle, is broken.
Breakage = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Saboteur:
    """A way to break an engine.

    Attributes:
        name: what it does, in words joined by hyphens.
        fails: the contracts that must fail on it.
        breakage: enters the broken state on the shared engine and leaves it.
        starts_engine: whether the broken part is starting one, so that the contract's own start must meet it.
        ranks: of the engine that is broken; those of several are what ``conformance.test_ranks`` shares.
        executor: that runs them.
        model: kind of model of the engine that is broken; the run's if empty.
        dtype: of its weights; the run's if empty.
        arguments: that this engine was started with, besides.
        backends: kinds of device that it can be broken on; empty for all.
    """

    name: str
    fails: tuple[str, ...]
    breakage: Breakage
    starts_engine: bool = False
    ranks: int = 1
    executor: str = "mp"
    model: str = ""
    dtype: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    backends: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The engines that it breaks: ``shared`` ones of one rank, the two ``ranks``, or those under ``ray``."""
        return "ray" if self.executor == "ray" else "ranks" if self.ranks > 1 else "shared"


#: In the order in which they are best run: each kind has engines of its own. For each, where its contracts are.
KINDS: Mapping[str, str] = {"shared": "not test_ranks", "ranks": "test_ranks", "ray": "test_placement"}


@dataclass(frozen=True)
class Saboteurs:
    """All saboteurs of a module, by name, and the engine arguments that they need."""

    by_name: Mapping[str, Saboteur]
    engine_args: Mapping[str, Any]


def load(module: str) -> Saboteurs:
    """Import the saboteurs of a module.

    Raises:
        ConfigurationError: it cannot be imported, or holds none.
    """
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"the saboteurs {module} cannot be imported: {error}. Run from the checkout that holds them, or name "
            "another module with --vllm-saboteurs"
        ) from error
    saboteurs = getattr(imported, "SABOTEURS", None)
    if not saboteurs:
        raise ConfigurationError(f"the module {module} has no SABOTEURS, a mapping of names to Saboteur")
    return Saboteurs(saboteurs, getattr(imported, "ENGINE_ARGS", {}))
