"""Breakages of what must not hang, and of what must be put back after a lack of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from tests.saboteurs.base import in_worker, saboteur

in_worker("keep-half-of-a-failed-wake", "sl-wake-oom-recovers")
in_worker("leak-a-little-at-every-sleep", "mem-cycles-flat")
in_worker("leave-a-descriptor-open-at-every-wake", "mem-cycles-flat")
in_worker("stay-in-lost-groups", "mem-cycles-flat")


@saboteur("cf-hang-becomes-error")
@contextmanager
def waits_without_a_limit(engine: Any) -> Iterator[None]:
    """The configured timeout is forgotten: ranks wait for each other for a minute."""
    from datetime import timedelta

    with patch("roll_vllm.transfer.collective.timeout", lambda: timedelta(seconds=60)):
        yield


@saboteur("env-collective-settings")
@contextmanager
def compares_no_settings(engine: Any) -> Iterator[None]:
    """Groups are made without a look at the other ranks."""
    engine.run(engine.collective_rpc("roll_vllm_sabotage", args=("compare-nothing",)))
    try:
        with ExitStack() as stack:
            stack.enter_context(patch("roll_vllm.transfer.collective.CollectiveGroup._compare", lambda *_: False))
            yield
    finally:
        engine.run(engine.collective_rpc("roll_vllm_heal"))


@saboteur("vd-platform-refusals")
@contextmanager
def configures_anything(engine: Any) -> Iterator[None]:
    """Arguments and variables that a platform cannot follow are dropped without a word."""
    from roll_vllm import backends, environment, factory

    arguments = factory._engine_arguments

    def lenient(given: Any, *how: Any) -> Any:
        return arguments({name: value for name, value in given.items() if name != "enable_sleep_mode"}, *how)

    def usual(vllm_version: str, device_kind: str, environ: Any) -> str:
        return backends.get(device_kind).default_engine(vllm_version)

    with patch.object(factory, "_engine_arguments", lenient), patch.object(environment, "engine_generation", usual):
        yield
