"""What a saboteur is, and the list of them all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

#: A context in which the engine, given as its handle, is broken.
Breakage = Callable[[Any], AbstractContextManager[Any]]

SABOTEURS: dict[str, Saboteur] = {}


@dataclass(frozen=True)
class Saboteur:
    """A way to break an engine.

    Attributes:
        name: what it does, in words joined by hyphens.
        fails: the contracts that must fail on it.
        breakage: enters the broken state on the shared engine and leaves it.
        starts_engine: whether the broken part is starting one, so that the contract's own start must meet it.
    """

    name: str
    fails: tuple[str, ...]
    breakage: Breakage
    starts_engine: bool = False


def saboteur(*fails: str, starts_engine: bool = False) -> Callable[[Breakage], Breakage]:
    """Register a context manager function as a saboteur, under its own name."""

    def register(breakage: Breakage) -> Breakage:
        name = breakage.__name__.replace("_", "-")
        SABOTEURS[name] = Saboteur(name, fails, breakage, starts_engine)
        return breakage

    return register


def in_worker(name: str, *fails: str) -> None:
    """Register the breakage of that name in :mod:`tests.saboteurs.worker`, applied inside every worker."""
    from contextlib import contextmanager

    @contextmanager
    def breakage(engine: Any) -> Any:
        engine.run(engine.collective_rpc("roll_vllm_sabotage", args=(name,)))
        try:
            yield
        finally:
            engine.run(engine.collective_rpc("roll_vllm_heal"))

    SABOTEURS[name] = Saboteur(name, fails, breakage)
