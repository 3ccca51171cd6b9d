"""Breakages of start, remote calls, shutdown, version dispatch and error messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from tests.saboteurs.base import saboteur
from tests.saboteurs.worker import LITTERING, ONE_SEED, SAME_PORT, UNPATCHED


@saboteur("env-expandable-segments", "env-isolated-and-restored", "cache-isolated-or-safe", starts_engine=True)
@contextmanager
def one_environment_for_all(engine: Any) -> Iterator[None]:
    """The user's allocator options reach the workers, all share one cache root, and nothing is put back."""
    from roll_vllm import environment

    honest = environment.worker_environment

    def shared(**given: Any) -> dict[str, str]:
        # Without these the engine would not even start.
        needed = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_USE_V1")
        kept = {name: value for name, value in honest(**given).items() if name in needed}
        return {
            **kept,
            "PYTORCH_CUDA_ALLOC_CONF": given["environ"].get("PYTORCH_CUDA_ALLOC_CONF", ""),
            "VLLM_CACHE_ROOT": given["environ"].get("VLLM_CACHE_ROOT", "/tmp"),
            "FLASHINFER_WORKSPACE_BASE": given["environ"].get("VLLM_CACHE_ROOT", "/tmp"),
        }

    before = dict(os.environ)
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.object(environment, "worker_environment", shared))
            stack.enter_context(patch.object(environment, "left_as_found", nullcontext))
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@saboteur("ex-rpc-results-ordered", ranks=2)
@contextmanager
def answers_in_order_of_arrival(engine: Any) -> Iterator[None]:
    """Results come as they arrive, errors of other ranks than the first are lost, and no timeout holds."""
    from roll_vllm.engine import RolloutEngine

    async def careless(self: Any, method: str, timeout: Any = None, args: Any = (), kwargs: Any = None) -> Any:
        results = await self._call_workers(method, args, kwargs)
        return [result for result in reversed(results) if "error" not in result]

    with patch.object(RolloutEngine, "collective_rpc", careless):
        yield


@saboteur("ex-shutdown-no-orphans", starts_engine=True)
@contextmanager
def leaves_children_behind(engine: Any) -> Iterator[None]:
    """Each worker leaves a process of its own behind."""
    with patch.dict(os.environ, {LITTERING: "1"}):
        yield


@saboteur("ex-ports-safe", starts_engine=True)
@contextmanager
def gives_everybody_one_port(engine: Any) -> Iterator[None]:
    """All engines of a host are told to take the same port."""
    with patch.dict(os.environ, {SAME_PORT: "29871"}):
        yield


@saboteur("gen-seed-policy", starts_engine=True)
@contextmanager
def gives_everybody_one_seed(engine: Any) -> Iterator[None]:
    """Every engine that is given no seed has the same one."""
    with patch.dict(os.environ, {ONE_SEED: "0"}), patch("roll_vllm.factory._own_seed", lambda: 0):
        yield


@saboteur("ex-worker-death-visible", ranks=2)
@contextmanager
def does_not_hear_of_deaths(engine: Any) -> Iterator[None]:
    """What the watch sees is told to nobody; callers get what vLLM says, or nothing."""

    async def deaf(error: BaseException) -> None:
        pass

    with patch.object(engine.engine, "_died", lambda error: None), patch.object(engine.engine, "_hear_of_death", deaf):
        yield


@saboteur("vd-signatures-probed", starts_engine=True)
@contextmanager
def loses_its_patches(engine: Any) -> Iterator[None]:
    """The workers run without the runtime's patches, and without a record of them."""
    with patch.dict(os.environ, {UNPATCHED: "1"}):
        yield


@saboteur("vd-range-resolved")
@contextmanager
def compares_versions_as_text(engine: Any) -> Iterator[None]:
    """The table is searched for the exact text, and ranges are compared as text."""
    from roll_vllm import versions

    def satisfies(text: str, specifier: str) -> bool:
        return text < specifier.lstrip("<")

    def resolve(text: str) -> Any:
        return next((row for row in versions.TESTED if row.release == text), None)

    with patch.object(versions, "satisfies", satisfies), patch.object(versions, "resolve", resolve):
        yield


@saboteur("err-actionable")
@contextmanager
def says_only_that_it_failed(engine: Any) -> Iterator[None]:
    """Every refusal of a worker is the same sentence."""
    from roll_vllm.errors import RollVllmError, WeightUpdateError

    workers = engine.engine._workers

    async def vague(method: str, *args: Any) -> Any:
        try:
            return await workers(method, *args)
        except RollVllmError:
            raise WeightUpdateError("the operation failed") from None

    with patch.object(engine.engine, "_workers", vague):
        yield


@saboteur("cache-warm-start-kept", starts_engine=True)
@contextmanager
def clears_every_cache(engine: Any) -> Iterator[None]:
    """Shutdown deletes the caches of workers with a name, too."""
    from roll_vllm import environment

    with patch.object(environment, "is_unnamed", lambda directory: True):
        yield


@saboteur("vd-capabilities-declared")
@contextmanager
def declares_too_little(engine: Any) -> Iterator[None]:
    """The target says that it cannot pause, and does when it is told to."""
    from pytest_roll_vllm.targets import Capability, Support
    from pytest_roll_vllm.targets.runtime import RollVllm

    with patch.dict(RollVllm.capabilities, {"pause": Capability(Support.UNSUPPORTED, "it is said to be impossible")}):
        yield
