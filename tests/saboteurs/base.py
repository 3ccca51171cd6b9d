"""How saboteurs are registered."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from pytest_roll_vllm.proof import Breakage, Saboteur

SABOTEURS: dict[str, Saboteur] = {}


def saboteur(*fails: str, **engine: Any) -> Callable[[Breakage], Breakage]:
    """Register a context manager function as a saboteur, under its own name.

    ``engine`` are the fields of :class:`Saboteur` that say which engine is meant.
    """

    def register(breakage: Breakage) -> Breakage:
        name = breakage.__name__.replace("_", "-")
        SABOTEURS[name] = Saboteur(name, fails, breakage, **engine)
        return breakage

    return register


def in_worker(name: str, *fails: str, **engine: Any) -> None:
    """Register the breakage of that name in :mod:`tests.saboteurs.worker`, applied inside every worker.

    ``engine`` is as for :func:`saboteur`.
    """

    @contextmanager
    def breakage(engine: Any) -> Any:
        engine.run(engine.collective_rpc("roll_vllm_sabotage", args=(name,)))
        try:
            yield
        finally:
            engine.run(engine.collective_rpc("roll_vllm_heal"))

    SABOTEURS[name] = Saboteur(name, fails, breakage, **engine)
