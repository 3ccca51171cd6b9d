"""An engine from its first breath to its last: what holds before anything was sent to it, and after it ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from conformance.oracles import pids, processes_below, still_running, wait_until
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle, EnginePool
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.options import Settings
from pytest_roll_vllm.report import note
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender, WeightsNotReadyError, WeightsStatus, WeightUpdateError, environment, versions
from roll_vllm.patches.registry import PATCHES

#: What a user's shell may hold: expandable segments on, an option worth keeping, a trap for rank 1.
HOSTILE = {
    "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512, expandable_segments:True",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "1",
}


@dataclass
class FreshEngine:
    """An engine of two ranks that has received nothing yet; the processes are those it started."""

    handle: EngineHandle
    before: dict[str, str]
    after: dict[str, str]
    processes: list[psutil.Process]


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    """These contracts are about processes; any model will do that two ranks can share."""
    return vllm_model_factory("counting")


@pytest.fixture
def vllm_engine_args(vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
    return {**vllm_engine_args, "tensor_parallel_size": 2, "worker_name": "fresh"}


@pytest.fixture(scope="module")
def parent_scripts() -> Iterator[list[subprocess.Popen[str]]]:
    """The module's script with an engine of its own, once a test has started it."""
    scripts: list[subprocess.Popen[str]] = []
    yield scripts
    for script in scripts:
        script.kill()
        script.wait()


@pytest.fixture
def parent_script(
    parent_scripts: list[subprocess.Popen[str]],
    vllm_engine_args: dict[str, Any],
    vllm_cache_dir: Path,
    vllm_settings: Settings,
    pytestconfig: pytest.Config,
) -> subprocess.Popen[str]:
    """A user's script (``conformance.parent``) that starts an engine the way users do; it may still be starting."""
    if not parent_scripts:
        # The only rank of a V0 engine is the script itself, which would leave nobody behind.
        ranks = 2 if vllm_settings.engine == "V0" else 1
        arguments = {**vllm_engine_args, "tensor_parallel_size": ranks, "worker_name": "main"}
        environ = {
            **os.environ,
            "VLLM_CACHE_ROOT": str(vllm_cache_dir),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        note(pytestconfig, "engine starts", {"script": "conformance.parent", **arguments})
        command = [sys.executable, "-m", "conformance.parent", json.dumps(arguments)]
        parent_scripts.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
    return parent_scripts[0]


@pytest.fixture
def fresh_engine(
    request: pytest.FixtureRequest,
    vllm_engine_pool: EnginePool,
    vllm_engine_args: dict[str, Any],
    vllm_engine_creator: Callable[[dict[str, Any]], Callable[[], Any]],
) -> FreshEngine:
    """One engine for the whole module, started in a hostile environment."""
    kept: list[FreshEngine] = vllm_engine_pool.keep.setdefault("fresh", [])
    failures: list[Exception] = vllm_engine_pool.keep.setdefault("fresh failures", [])
    if failures:  # another try would take minutes and end in the same way
        raise failures[0]
    if not kept:
        script = request.getfixturevalue("parent_script")  # first, so that both start side by side
        running = {process.pid for process in processes_below(os.getpid())}
        with environment.AppliedEnvironment(dict(HOSTILE)):
            before = dict(os.environ)
            try:
                handle = vllm_engine_pool.start(vllm_engine_creator(vllm_engine_args))
            except Exception as error:
                failures.append(error)
                raise
            after = dict(os.environ)
        of_script = {process.pid for process in processes_below(script.pid)}
        started = [p for p in processes_below(os.getpid()) if p.pid not in running | of_script]
        kept.append(FreshEngine(handle, before, after, started))
    return kept[0]


@contract(
    "gen-no-serving-before-first-sync",
    "An engine with dummy weights refuses to generate until a complete update, and says so in its state.",
    references=("verl-project/verl#4248", "vllm-project/vllm#54235"),
)
async def test_dummy_weights_do_not_answer(fresh_engine: FreshEngine) -> None:
    engine = fresh_engine.handle
    state = await engine.state()
    assert state.weights is WeightsStatus.NEVER_LOADED
    assert state.weight_version == 0
    with pytest.raises(WeightsNotReadyError, match="dummy"):
        await asyncio.wait_for(engine.complete([1, 2, 3], max_tokens=2), 10)


@contract(
    "env-expandable-segments",
    "However the user enabled expandable segments, the workers start without them and keep the other options.",
    references=("vllm-project/vllm#14189", "vllm-project/vllm#54351", "pytorch/pytorch#147851"),
)
async def test_expandable_segments_are_off(fresh_engine: FreshEngine, vllm_version: str) -> None:
    for values in await fresh_engine.handle.worker_environment(["PYTORCH_CUDA_ALLOC_CONF"]):
        assert values["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:512"
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        for spelling in ("expandable_segments:True", "garbage_collection_threshold:0.8,Expandable_Segments : true"):
            changes = environment.worker_environment(
                worker_name="w", device_kind="cuda", vllm_version=vllm_version, port=None, environ={variable: spelling}
            )
            assert "expandable" not in changes[variable].lower()
            assert ("garbage_collection_threshold:0.8" in changes[variable]) == ("garbage" in spelling)


@contract(
    "env-isolated-and-restored",
    "Starting an engine leaves the caller's environment as it was; workers get the runtime's settings.",
    references=("alibaba/ROLL#455",),
)
async def test_environment_is_isolated(fresh_engine: FreshEngine) -> None:
    changed = {
        name for name in fresh_engine.before.keys() | fresh_engine.after.keys()
        if fresh_engine.before.get(name) != fresh_engine.after.get(name)
    }  # fmt: skip
    assert not changed, f"starting the engine changed the caller's {sorted(changed)}"
    names = ["VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ALLREDUCE_USE_SYMM_MEM", "VLLM_PORT", "VLLM_CACHE_ROOT"]
    for values in await fresh_engine.handle.worker_environment(names):
        assert values["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        assert values["VLLM_ALLREDUCE_USE_SYMM_MEM"] == "0"
        assert 0 < int(values["VLLM_PORT"] or 0) < 65536
        assert values["VLLM_CACHE_ROOT"]


@contract(
    "cache-isolated-or-safe",
    "Workers of different names have different cache roots, and an empty name never makes two workers share one.",
    references=("vllm-project/vllm#24601", "vllm-project/vllm#31199", "flashinfer-ai/flashinfer#4062"),
)
async def test_caches_are_isolated(fresh_engine: FreshEngine, vllm_cache_dir: Path, vllm_version: str) -> None:
    def roots(name: str | None) -> tuple[str, str]:
        changes = environment.worker_environment(
            worker_name=name, device_kind="cpu", vllm_version=vllm_version, port=None, environ=dict(os.environ)
        )
        return changes["VLLM_CACHE_ROOT"], changes["FLASHINFER_WORKSPACE_BASE"]

    for values in await fresh_engine.handle.worker_environment(["VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE"]):
        assert values["VLLM_CACHE_ROOT"] == str(vllm_cache_dir / "fresh")
        assert values["FLASHINFER_WORKSPACE_BASE"] == str(vllm_cache_dir / "flashinfer" / "fresh")
    names = ["a", "b", "a/b", "a_b", "../a", "A", "", "", None, " "]
    assert len({roots(name) for name in names}) == len(names)
    assert roots("a") == roots("a"), "a worker must find its own cache again"


ordered = contract(
    "ex-rpc-results-ordered",
    "A call to all workers returns one result a rank in rank order, raises any rank's error, and keeps its timeout.",
    references=("vllm-project/vllm#45565",),
)


@ordered
async def test_results_come_in_rank_order(fresh_engine: FreshEngine) -> None:
    engine = fresh_engine.handle
    # Rank 0 answers last, so that order of arrival and order of rank differ.
    assert await engine.ping([0.5, 0.0]) == [0, 1]
    state = await engine.state()
    assert [worker.rank for worker in state.workers] == [0, 1]
    assert len({worker.pid for worker in state.workers}) == 2


@ordered
async def test_one_ranks_error_is_raised(fresh_engine: FreshEngine, vllm_trainer: Trainer) -> None:
    with BucketSender() as sender:
        good = next(sender.payloads(vllm_trainer.weights(1)))
        with pytest.raises(WeightUpdateError, match=r"rank 1"):
            await fresh_engine.handle.update_parameter_in_bucket([good, b"nonsense"])


@ordered
async def test_timeout_is_kept(fresh_engine: FreshEngine) -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="within 1 s"):
        await fresh_engine.handle.ping([0.0, 2.5], timeout=1)
    assert time.monotonic() - begun < 2
    # An answer that comes too late must not be taken for the answer to the next call.
    workers = (await asyncio.wait_for(fresh_engine.handle.state(), 10)).workers
    assert [worker.rank for worker in workers] == [0, 1]


@contract(
    "vd-signatures-probed",
    "In every process of the engine, what the runtime changes in vLLM is what it was written for, and is on record.",
    references=("DataDog/dd-trace-py#18393", "PrimeIntellect-ai/prime-rl#1810"),
)
async def test_patches_are_in_every_process(fresh_engine: FreshEngine, vllm_version: str) -> None:
    records = {record.pid: record for record in fresh_engine.handle.patch_records()}
    # Whoever runs vLLM: this process, the engine core and the workers. Resource trackers run nothing of ours.
    wanted = {os.getpid(), *(process.pid for process in fresh_engine.processes), *await pids(fresh_engine.handle)}
    assert wanted <= set(records), f"processes {sorted(wanted - set(records))} left no record"
    meant = {patch.name for patch in PATCHES if versions.satisfies(vllm_version, patch.versions)}
    for record in records.values():
        outcomes = {name: outcome.outcome for name, outcome in record.patches.items()}
        assert not record.error, f"process {record.pid} ({record.role}): {record.error}"
        assert set(outcomes) == {patch.name for patch in PATCHES}
        # "deferred" is a patch of a module that this process has not imported.
        applied = {name for name, outcome in outcomes.items() if outcome in ("applied", "deferred")}
        assert applied == meant, f"process {record.pid} ({record.role}): {outcomes}"


no_orphans = contract(
    "ex-shutdown-no-orphans",
    "Ten seconds after shutdown, or after the parent was killed, no process of the engine lives, generated or not.",
    references=("vllm-project/vllm#55846", "ray-project/ray#60088"),
)


@no_orphans
def test_killed_parent_leaves_nothing(parent_script: subprocess.Popen[str]) -> None:
    assert parent_script.stdout is not None
    line = next((line for line in parent_script.stdout if line.startswith("{")), "")
    assert line, "the script ended before its engine was up; what it wrote to stderr is above"
    family = processes_below(parent_script.pid)
    assert family, "the engine has no process that could be left behind"
    assert set(json.loads(line)["workers"]) <= {parent_script.pid, *(process.pid for process in family)}
    os.kill(parent_script.pid, signal.SIGKILL)
    parent_script.wait()
    wait_until(lambda: not still_running(family), 10)
    orphans = still_running(family)
    for process in family:
        if process.is_running():
            process.kill()
    assert not orphans, f"ten seconds after their parent these still live: {orphans}"


@no_orphans
def test_shutdown_leaves_nothing(fresh_engine: FreshEngine, vllm_engine_pool: EnginePool) -> None:
    engine = fresh_engine.handle
    workers = engine.run(pids(engine))
    assert set(workers) <= {os.getpid(), *(process.pid for process in fresh_engine.processes)}
    vllm_engine_pool.keep["fresh"].clear()
    vllm_engine_pool.end(engine)
    wait_until(lambda: not still_running(fresh_engine.processes), 10)
    orphans = still_running(fresh_engine.processes)
    assert not orphans, f"ten seconds after shutdown these still live: {orphans}"
