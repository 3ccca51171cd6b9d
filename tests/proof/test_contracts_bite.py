"""A contract that cannot fail is worthless: each one must fail on an engine broken in the way it guards against.

Run with a real vLLM (``tox run -e proof0.12.0-cpu``). A contract counts as failed only when its own test
failed while it ran; an error before that proves nothing.
"""

from __future__ import annotations

from typing import Any

import pytest

from pytest_roll_vllm.engines import EngineHandle, EnginePool
from tests.saboteurs import SABOTEURS, Saboteur


def end_fresh_engines(pool: EnginePool) -> None:
    """Close the lifecycle engine, so that the next test starts its own."""
    pool.keep.pop("fresh failures", None)
    for fresh in pool.keep.pop("fresh", []):
        pool.end(fresh.handle)


@pytest.mark.parametrize("saboteur", sorted(SABOTEURS.values(), key=lambda s: s.starts_engine), ids=lambda s: s.name)
def test_saboteur_is_caught(
    saboteur: Saboteur, vllm_engine: EngineHandle, vllm_engine_pool: EnginePool, inner_session: Any
) -> None:
    if saboteur.starts_engine:
        end_fresh_engines(vllm_engine_pool)
    try:
        with saboteur.breakage(vllm_engine):
            session = inner_session(saboteur.fails)
    finally:
        vllm_engine.pushed = None  # whatever it holds now is not the reference
        if saboteur.starts_engine:
            end_fresh_engines(vllm_engine_pool)
    survivors = [contract for contract in saboteur.fails if not session.failed[contract]]
    assert not survivors, (
        f"{survivors} did not notice; passed: {dict(session.passed)}, did not run: {dict(session.other)}"
    )
