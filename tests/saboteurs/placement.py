"""Breakages of the Ray executor. It runs in the engine core, which has to be reached from here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.saboteurs.base import saboteur


@saboteur("ex-placement-exact", starts_engine=True, executor="ray")
@contextmanager
def sorts_the_bundles(engine: Any) -> Iterator[None]:
    """Ranks are put on the bundles in the order of their groups and indices."""
    from roll_vllm import factory

    def in_order(*args: Any) -> Any:
        ranks, address = honest(*args)
        return tuple(sorted(ranks, key=lambda placed: (placed.group, placed.bundle))), address

    honest = factory.parse
    with patch.object(factory, "parse", in_order):
        yield


@saboteur("cache-isolated-or-safe", starts_engine=True, executor="ray")
@contextmanager
def one_environment_for_all_ranks(engine: Any) -> Iterator[None]:
    """Every rank gets the variables that were made for the first one."""
    with _in_the_core(_share_one_environment):
        yield


@saboteur("ex-placement-fails-clearly", starts_engine=True, executor="ray")
@contextmanager
def does_not_read_what_was_left(engine: Any) -> Iterator[None]:
    """Why an executor could not start is told to nobody."""
    with patch("roll_vllm.failure.read", lambda directory: None):
        yield


def _share_one_environment() -> None:
    from roll_vllm.executor import ray_executor

    honest = ray_executor.rank_environment
    ray_executor.rank_environment = lambda rank, environ, placement: honest(0, environ, placement)


class _Stowaway(str):
    """Text that does something where it is unpickled."""

    breaks: Callable[[], None]

    def __reduce__(self) -> Any:
        return _arrive, (str(self), self.breaks)


def _arrive(text: str, breaks: Callable[[], None]) -> str:
    breaks()
    return text


@contextmanager
def _in_the_core(breaks: Callable[[], None]) -> Iterator[None]:
    """Break the engine cores that start meanwhile."""
    from roll_vllm import factory

    honest = factory._placement

    def loaded(*args: Any) -> Any:
        placement = honest(*args)
        resource = _Stowaway(placement.resource)
        resource.breaks = breaks
        return dataclasses.replace(placement, resource=resource)

    with patch.object(factory, "_placement", loaded):
        yield
