"""What ``pytest --vllm-prove`` runs: the honest target, then each saboteur.

A contract counts as failed only when its own test failed while it ran; an error before that proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_roll_vllm.engines import EngineConfig, EngineHandle, EnginePool
from pytest_roll_vllm.models import Model, make
from pytest_roll_vllm.proof import Saboteur, Saboteurs, session
from pytest_roll_vllm.proof.table import PROOF

if TYPE_CHECKING:
    from pytest_roll_vllm.options import Settings
    from pytest_roll_vllm.trainer import Trainer


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> Saboteur | None:
    """The saboteur that the test is about."""
    saboteur: Saboteur | None = request.node.callspec.params.get("saboteur")
    return saboteur


@pytest.fixture
def vllm_model(
    chosen: Saboteur | None,
    vllm_settings: Settings,
    vllm_model_factory: Callable[[str], Model],
    vllm_cache_dir: Path,
) -> Model:
    kind = (chosen and chosen.model) or vllm_settings.model.value
    return make(kind, vllm_cache_dir / "models", chosen.dtype) if chosen and chosen.dtype else vllm_model_factory(kind)


@pytest.fixture
def vllm_engine_args(
    chosen: Saboteur | None, vllm_engine_args: dict[str, Any], vllm_saboteurs: Saboteurs
) -> dict[str, Any]:
    arguments = {**vllm_engine_args, **vllm_saboteurs.engine_args}
    if chosen:  # as the contract's module starts it
        arguments |= chosen.arguments
    if chosen and chosen.ranks > 1:  # as conformance.test_ranks starts it
        arguments |= {"tensor_parallel_size": chosen.ranks, "distributed_executor_backend": "mp"}
    return arguments


@pytest.fixture
def broken_engine(
    vllm_engine_pool: EnginePool, vllm_engine_args: dict[str, Any], vllm_trainer: Trainer, vllm_engine_creator: Any
) -> EngineHandle:
    """The shared engine, as ``vllm_engine``, for a test in which it may die."""
    config = EngineConfig.of(vllm_engine_args["model"], vllm_engine_args)
    engine = vllm_engine_pool.shared(config, vllm_engine_creator(vllm_engine_args))
    engine.run(vllm_trainer.reset(engine))
    return engine


@pytest.fixture
def run_contracts(
    request: pytest.FixtureRequest, vllm_engine_pool: EnginePool, vllm_settings: Settings, vllm_saboteurs: Saboteurs
) -> Any:
    """Runs contracts in a session of their own, on this session's engines."""

    def run(kind: str, contracts: Any, *, once: bool) -> session.InnerSession:
        cluster = request.getfixturevalue("ray_cluster") if kind == "ray" else None
        engine_args = vllm_saboteurs.engine_args
        return session.run(kind, contracts, engine_args, vllm_engine_pool, cluster, vllm_settings, once=once)

    return run


def end_fresh_engines(pool: EnginePool) -> None:
    """Close the engines that a breakage of the start is meant for, so that the next test starts its own."""
    for handle in [handle for config, handle in pool._shared.items() if '"ray"' in config.arguments]:
        pool.drop(handle)
    pool.keep.pop("fresh failures", None)
    for fresh in pool.keep.pop("fresh", {}).values():
        pool.end(fresh.handle)


def test_honest_target(request: pytest.FixtureRequest, kind: str, run_contracts: Any) -> None:
    """Every contract that a saboteur of this run must fail passes on the target as it is."""
    others = [getattr(item, "callspec", None) for item in request.session.items]
    saboteurs = [callspec.params["saboteur"] for callspec in others if callspec and "saboteur" in callspec.params]
    contracts = {contract for saboteur in saboteurs if saboteur.kind == kind for contract in saboteur.fails}
    if not contracts:
        pytest.skip(f"no saboteur of {kind} engines is selected")
    found = run_contracts(kind, contracts, once=False)
    verdicts = {contract: found.verdict(contract, "passed") for contract in sorted(contracts)}
    request.node.user_properties.append((PROOF, {"kind": kind, "saboteur": "", "verdicts": verdicts}))
    wrong = {one: verdict for one, verdict in verdicts.items() if verdict not in ("passed", "n/a")}
    assert not wrong, f"{wrong} on an honest target; failed: {dict(found.failed)}, did not run: {dict(found.other)}"


def test_saboteur_is_caught(
    request: pytest.FixtureRequest,
    saboteur: Saboteur,
    broken_engine: EngineHandle,
    vllm_engine_pool: EnginePool,
    run_contracts: Any,
) -> None:
    if saboteur.starts_engine:
        end_fresh_engines(vllm_engine_pool)
    try:
        with saboteur.breakage(broken_engine):
            found = run_contracts(saboteur.kind, saboteur.fails, once=True)
    finally:
        broken_engine.pushed = None  # whatever it holds now is not the reference
        if saboteur.starts_engine:
            end_fresh_engines(vllm_engine_pool)
    verdicts = {contract: found.verdict(contract, "failed") for contract in saboteur.fails}
    record = {"kind": saboteur.kind, "saboteur": saboteur.name, "verdicts": verdicts}
    request.node.user_properties.append((PROOF, record))
    survived = [contract for contract, verdict in verdicts.items() if verdict not in ("failed", "n/a")]
    assert not survived, f"{survived} did not notice; passed: {dict(found.passed)}, did not run: {dict(found.other)}"
