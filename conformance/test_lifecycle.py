"""An engine from its first breath to its last: what holds before anything was sent to it, and after it ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from conformance.oracles import (
    NEEDS_TWO_DEVICES,
    TWO_DEVICES,
    assert_dead,
    assert_error_of_one_rank,
    assert_gone,
    assert_rank_order,
    assert_timeout_kept,
    pids,
    processes_below,
    processes_of,
    wait_until,
)
from conformance.test_generation import seeds
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle, EnginePool, eager_variables
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.options import Settings
from pytest_roll_vllm.outcomes import NOT_APPLICABLE
from pytest_roll_vllm.report import note
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import WeightsNotReadyError, WeightsStatus, environment, versions
from roll_vllm.devices import Device
from roll_vllm.patches.registry import PATCHES

#: What a user's shell may hold: expandable segments on, an option worth keeping, a trap for rank 1.
HOSTILE = {
    "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512, expandable_segments:True",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "1",
}


@dataclass
class FreshEngine:
    """An engine that has received nothing yet, of two ranks where there are two devices; its own processes."""

    handle: EngineHandle
    ranks: int
    before: dict[str, str]
    after: dict[str, str]
    processes: list[psutil.Process]
    caches: list[Path]
    ended: bool = False

    def end(self, pool: EnginePool) -> None:
        """Shut it down, after each of its caches has got one more artefact."""
        for cache in self.caches:
            (cache / "artefact").write_text("compiled")
        self.ended = True
        pool.end(self.handle)


@dataclass
class Script:
    """A user's script (``conformance.parent``) with an engine of its own, which may still be starting."""

    name: str
    process: subprocess.Popen[str]
    said: dict[str, Any] = field(default_factory=dict)

    def up(self) -> dict[str, Any]:
        """What it says when its engine is up."""
        assert self.process.stdout is not None
        if not self.said:
            line = next((line for line in self.process.stdout if line.startswith("{")), "")
            assert line, "the script ended before its engine was up; what it wrote to stderr is above"
            self.said = json.loads(line)
        return self.said

    def next(self) -> None:
        """Let it shut its engine down, or when it has, end."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """Let it shut its engine down and end."""
        self.next()
        self.next()
        self.process.wait(60)

    @property
    def family_below(self) -> list[psutil.Process]:
        """Its descendants, which is all there is while its engine starts."""
        return processes_below(self.process.pid)

    @property
    def family(self) -> list[psutil.Process]:
        """The processes of its engine."""
        own = self.family_below
        known = {self.process.pid, *(process.pid for process in own)}
        return [*own, *(psutil.Process(pid) for pid in self.up()["workers"] if pid not in known)]


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    """These contracts are about processes; any model will do that two ranks can share."""
    return vllm_model_factory("counting")


@pytest.fixture
def ranks(vllm_device: Device) -> int:
    """Two, which a CPU can hold, or as many as there are devices."""
    return 2 if vllm_device.kind == "cpu" else min(2, vllm_device.count)


@pytest.fixture
def vllm_engine_args(
    vllm_engine_args: dict[str, Any], vllm_executor_args: Callable[[int], dict[str, Any]], ranks: int
) -> dict[str, Any]:
    own = {"tensor_parallel_size": ranks, "worker_name": "fresh", "seed": None}
    return {**vllm_engine_args, **own, **vllm_executor_args(ranks)}


@pytest.fixture
def script_ranks(vllm_settings: Settings, ranks: int) -> int:
    """The ranks of a script's engine: one, where a process of its own runs it, unless more is asked for."""
    return ranks if vllm_settings.executors.given or vllm_settings.engine == "V0" else 1


@pytest.fixture(scope="module")
def started_scripts(vllm_executor: str) -> Iterator[list[Script]]:
    """The module's scripts on this executor, once a test has started them."""
    scripts: list[Script] = []
    yield scripts
    for script in scripts:
        script.process.kill()
        script.process.wait()


@pytest.fixture
def start_script(
    request: pytest.FixtureRequest,
    started_scripts: list[Script],
    vllm_engine_args: dict[str, Any],
    vllm_executor: str,
    vllm_cache_dir: Path,
    vllm_device: Device,
    vllm_settings: Settings,
    pytestconfig: pytest.Config,
    script_ranks: int,
) -> Callable[..., Script]:
    """Starts a script: ``start_script(worker_name, generate, **variables)``."""
    if vllm_settings.engine == "V0" and script_ranks == 1:
        # The only rank of a V0 engine is the script itself, which would leave nobody behind.
        reason = "a V0 engine of one rank has no process beside its parent, and there is one device only"
        request.node.user_properties.append((NOT_APPLICABLE, reason))
        pytest.skip(reason)
    engine = {name: value for name, value in vllm_engine_args.items() if name != "resource_placement_groups"}
    ray = None
    if vllm_executor == "ray":
        cluster = request.getfixturevalue("ray_cluster")
        ray = {"address": cluster.address, "bundles": [cluster.bundle] * script_ranks}

    def start(worker_name: str, generate: bool, **variables: str) -> Script:
        environ = {
            **os.environ,
            "VLLM_CACHE_ROOT": str(vllm_cache_dir),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **(eager_variables() if vllm_device.kind == "cpu" else {}),
            **variables,
        }
        order: dict[str, Any] = {
            "engine": {**engine, "tensor_parallel_size": script_ranks, "worker_name": worker_name},
            "generate": generate,
            "ray": ray,
        }
        note(pytestconfig, "engine starts", {"script": "conformance.parent", **order["engine"]})
        command = [sys.executable, "-m", "conformance.parent", json.dumps(order)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started_scripts.append(Script(worker_name, subprocess.Popen(command, env=environ, text=True, **pipes)))
        return started_scripts[-1]

    return start


@pytest.fixture
def scripts(
    started_scripts: list[Script],
    start_script: Callable[..., Script],
    vllm_settings: Settings,
    vllm_device: Device,
) -> list[Script]:
    """Scripts that start engines at the same time, the way users do; every second one generates, the first does.

    One, unless more is asked for.
    """
    together = [script for script in started_scripts if script.name.startswith("together")]
    if not together:
        several = vllm_device.kind == "cpu" and vllm_settings.executors.given
        count = vllm_settings.engines_together if several else 1
        together = [start_script(f"together-{number}", number % 2 == 0) for number in range(count)]
    return together


@pytest.fixture
def fresh_engine(
    request: pytest.FixtureRequest,
    vllm_engine_pool: EnginePool,
    vllm_engine_args: dict[str, Any],
    vllm_engine_creator: Callable[[dict[str, Any]], Callable[[], Any]],
    vllm_device: Device,
    vllm_executor: str,
    started_scripts: list[Script],
    ranks: int,
) -> FreshEngine:
    """One engine for the whole module and executor, started in a hostile environment."""
    kept: dict[str, FreshEngine] = vllm_engine_pool.keep.setdefault("fresh", {})
    failures: dict[str, Exception] = vllm_engine_pool.keep.setdefault("fresh failures", {})
    if vllm_executor in failures:  # another try would take minutes and end in the same way
        raise failures[vllm_executor]
    if vllm_executor not in kept or kept[vllm_executor].ended:
        if vllm_device.kind == "cpu":
            request.getfixturevalue("scripts")  # first, so that all start side by side
        running = {process.pid for process in processes_below(os.getpid())}
        with environment.AppliedEnvironment(dict(HOSTILE)):
            before = dict(os.environ)
            try:
                handle = vllm_engine_pool.start(vllm_engine_creator(vllm_engine_args))
            except Exception as error:
                failures[vllm_executor] = error
                raise
            after = dict(os.environ)
        workers = {pid for pid in handle.run(pids(handle)) if pid != os.getpid()}
        others = running | workers
        for script in started_scripts:
            others |= {process.pid for process in processes_below(script.process.pid)}
        started = [process for process in processes_below(os.getpid()) if process.pid not in others]
        processes = [*started, *map(psutil.Process, workers)]
        found = handle.run(handle.worker_environment(["VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE"]))
        caches = sorted({Path(str(root)) for values in found for root in values.values()})
        kept[vllm_executor] = FreshEngine(handle, ranks, before, after, processes, caches)
    return kept[vllm_executor]


@contract(
    "gen-no-serving-before-first-sync",
    "An engine with dummy weights refuses to generate until a complete update, and says so in its state.",
    references=("verl-project/verl#4248", "vllm-project/vllm#54235"),
    needs=("runtime",),
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
    needs=("runtime",),
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
    needs=("runtime",),
)
async def test_environment_is_isolated(fresh_engine: FreshEngine) -> None:
    changed = {
        name for name in fresh_engine.before.keys() | fresh_engine.after.keys()
        if fresh_engine.before.get(name) != fresh_engine.after.get(name)
    }  # fmt: skip
    assert not changed, f"starting the engine changed the caller's {sorted(changed)}"
    names = ["VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ALLREDUCE_USE_SYMM_MEM", "VLLM_PORT", "VLLM_CACHE_ROOT"]
    found = await fresh_engine.handle.worker_environment(names)
    assert len(found) == fresh_engine.ranks
    for values in found:
        assert values["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        assert values["VLLM_ALLREDUCE_USE_SYMM_MEM"] == "0"
        assert 0 < int(values["VLLM_PORT"] or 0) < 65536
        assert values["VLLM_CACHE_ROOT"]


isolated_caches = contract(
    "cache-isolated-or-safe",
    "Workers of different names have different cache roots, and an empty name never makes two workers share one.",
    references=("vllm-project/vllm#24601", "vllm-project/vllm#31199", "flashinfer-ai/flashinfer#4062"),
    needs=("runtime",),
)


@seeds
@pytest.mark.vllm_needs("runtime")
def test_engines_have_seeds_of_their_own(fresh_engine: FreshEngine, scripts: list[Script]) -> None:
    """From which they draw whatever has no seed of a request's own."""
    found = [fresh_engine.handle.vllm_config.model_config.seed, *(script.up()["seed"] for script in scripts)]
    assert None not in found
    assert len(set(found)) == len(found), f"engines that were started without a seed have {found}"


@isolated_caches
async def test_caches_are_isolated(
    fresh_engine: FreshEngine,
    vllm_cache_dir: Path,
    vllm_device: Device,
    vllm_version: str,
    vllm_executor: str,
) -> None:
    def roots(name: str | None) -> tuple[str, str]:
        changes = environment.worker_environment(
            worker_name=name,
            device_kind=vllm_device.backend,
            vllm_version=vllm_version,
            port=None,
            environ=dict(os.environ),
        )
        return changes["VLLM_CACHE_ROOT"], changes["FLASHINFER_WORKSPACE_BASE"]

    found = await fresh_engine.handle.worker_environment(["VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE"])
    assert len(found) == fresh_engine.ranks
    for rank, values in enumerate(found):
        # The ranks of one host have a file lock between them; those of Ray may be on several.
        own = f"rank{rank}" if vllm_executor == "ray" else ""
        assert values["VLLM_CACHE_ROOT"] == str(vllm_cache_dir / "fresh" / own)
        assert values["FLASHINFER_WORKSPACE_BASE"] == str(vllm_cache_dir / "flashinfer" / "fresh" / own)
    names = ["a", "b", "a/b", "a_b", "../a", "A", "", "", None, " "]
    assert len({roots(name) for name in names}) == len(names)
    assert roots("a") == roots("a"), "a worker must find its own cache again"


ordered = contract(
    "ex-rpc-results-ordered",
    "A call to all workers returns one result a rank in rank order, raises any rank's error, and keeps its timeout.",
    references=("vllm-project/vllm#45565",),
    needs=("runtime",),
)


class TestCalls:
    """To both workers of an engine that has received nothing yet."""

    pytestmark = NEEDS_TWO_DEVICES

    @ordered
    async def test_results_come_in_rank_order(self, fresh_engine: FreshEngine) -> None:
        await assert_rank_order(fresh_engine.handle)

    @ordered
    async def test_one_ranks_error_is_raised(self, fresh_engine: FreshEngine, vllm_trainer: Trainer) -> None:
        await assert_error_of_one_rank(fresh_engine.handle, vllm_trainer)

    @ordered
    async def test_timeout_is_kept(self, fresh_engine: FreshEngine) -> None:
        await assert_timeout_kept(fresh_engine.handle)


@contract(
    "vd-signatures-probed",
    "In every process of the engine, what the runtime changes in vLLM is what it was written for, and is on record.",
    references=("DataDog/dd-trace-py#18393", "PrimeIntellect-ai/prime-rl#1810"),
    needs=("runtime",),
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
    needs=("runtime",),
)


ports_safe = contract(
    "ex-ports-safe",
    "Engines that start together on one host all start, and no two of them have a port in common.",
    references=("vllm-project/vllm#43206", "vllm-project/vllm#39015", "verl-project/verl#6677"),
    backends=("cpu",),
    needs=("runtime",),
)


@ports_safe
@pytest.mark.vllm_on_request("executors")
def test_engines_start_together(scripts: list[Script]) -> None:
    assert_all_start(scripts)


@ports_safe
@pytest.mark.vllm_on_request("rounds")
def test_engines_start_together_often(start_script: Callable[..., Script], vllm_settings: Settings) -> None:
    for _ in range(vllm_settings.rounds_of_starts):
        scripts = [start_script(f"often-{n}", generate=n % 2 == 0) for n in range(vllm_settings.engines_together)]
        assert_all_start(scripts)
        for script in scripts:
            script.end()


def assert_all_start(scripts: list[Script]) -> None:
    """Each engine has started, every second one has generated, and no two have a port in common."""
    ports: dict[str, int] = {}
    for number, script in enumerate(scripts):
        said = script.up()
        assert len(said["tokens"]) == (0 if number % 2 else 2)
        for port in said["ports"]:
            assert ports.setdefault(port, number) == number, f"port {port} is that of two engines"


@no_orphans
def test_killed_parent_leaves_nothing(scripts: list[Script], vllm_executor: str) -> None:
    script = scripts[0]
    assert script.up()["tokens"], "this one is to have generated"
    family = script.family
    assert family, "the engine has no process that could be left behind"
    os.kill(script.process.pid, signal.SIGKILL)
    script.process.wait()
    assert_gone(family, "their parent was killed")


@no_orphans
@pytest.mark.vllm_on_request("executors")
def test_shutdown_at_once_leaves_nothing(scripts: list[Script]) -> None:
    """The parent lives on, and the engine has never generated."""
    if len(scripts) < 2:
        pytest.skip("the devices are too few for a second engine")
    script = scripts[1]
    assert not script.up()["tokens"], "this one is to have generated nothing"
    family = script.family
    script.next()
    assert_gone(family, "shutdown")
    assert script.process.poll() is None, "the script itself was to live on"


@no_orphans
@pytest.mark.vllm_on_request("executors")
@pytest.mark.vllm_generation("V1")
def test_parent_killed_while_it_starts(start_script: Callable[..., Script], ranks: int) -> None:
    """As the launcher of a trainer does that has waited for too long."""
    with tempfile.TemporaryDirectory(prefix="roll-", dir="/tmp") as directory:  # short, for the sockets in it
        script = start_script("killed", generate=False, TMPDIR=directory)

        def under_way() -> list[psutil.Process]:
            # Every process that runs vLLM leaves a record, long before it has loaded anything.
            found = {int(path.stem) for path in Path(directory).glob("roll_vllm-records-*/*.json")}
            return [psutil.Process(pid) for pid in found - {script.process.pid} if psutil.pid_exists(pid)]

        started = wait_until(lambda: len(under_way()) > ranks or script.process.poll() is not None, 300)
        assert started, "the engine has not even begun to start"
        family = list({process.pid: process for process in [*under_way(), *script.family_below]}.values())
        assert len(family) > ranks, "the script ended before its engine was up; what it wrote to stderr is above"
        script.process.kill()
        script.process.wait()
        assert_gone(family, "their parent was killed")


died = contract(
    "ex-worker-death-visible",
    "When a worker dies, every pending and later call fails within 30 s with one error that names the rank.",
    references=("vllm-project/vllm#16259", "vllm-project/vllm#45565", "ray-project/ray#60088"),
    needs=("runtime",),
)


class TestDeath:
    pytestmark = TWO_DEVICES

    @died
    async def test_in_a_call(
        self, vllm_engine_factory: Callable[..., EngineHandle], vllm_engine_pool: EnginePool, ranks: int
    ) -> None:
        engine = vllm_engine_factory(worker_name="called")
        family = processes_of(engine)
        last = (await pids(engine))[-1]
        call = asyncio.ensure_future(engine.ping([0.0] * (ranks - 1) + [60.0]))
        await asyncio.sleep(1)
        os.kill(last, signal.SIGKILL)
        await assert_dead(engine, ranks - 1, last, [call])
        vllm_engine_pool.end(engine)
        assert_gone(family, "shutdown")

    @died
    async def test_idle(self, fresh_engine: FreshEngine) -> None:
        last = (await pids(fresh_engine.handle))[-1]
        os.kill(last, signal.SIGKILL)
        await assert_dead(fresh_engine.handle, fresh_engine.ranks - 1, last)


@no_orphans
def test_shutdown_leaves_nothing(fresh_engine: FreshEngine, vllm_engine_pool: EnginePool, vllm_executor: str) -> None:
    """Also of an engine that has died, as the one here has where there are two devices."""
    fresh_engine.end(vllm_engine_pool)
    assert_gone(fresh_engine.processes, "shutdown")


warm = contract(
    "cache-warm-start-kept",
    "The caches of a worker with a name outlive its engine, and a second start under that name adds nothing to them.",
    references=("NVIDIA/TensorRT-LLM#17233", "NVIDIA-NeMo/Curator#1514"),
    needs=("runtime",),
)


@warm
def test_caches_outlive_the_engine(
    request: pytest.FixtureRequest, vllm_engine_pool: EnginePool, vllm_executor: str
) -> None:
    """Of the fresh engine, which has ended by now if all tests run."""
    fresh: FreshEngine | None = vllm_engine_pool.keep.get("fresh", {}).get(vllm_executor)
    if fresh is None or not fresh.ended:
        fresh = request.getfixturevalue("fresh_engine")
        fresh.end(vllm_engine_pool)
    assert fresh.caches
    gone = [cache for cache in fresh.caches if not (cache / "artefact").is_file()]
    assert not gone, f"shutdown took away what others will have to compile again: {gone}"


def artefacts(cache_dir: Path, worker_name: str) -> dict[Path, int]:
    """What lies in the caches of a worker, with the sizes."""
    roots = [cache_dir / worker_name, cache_dir / "flashinfer" / worker_name]
    return {path: path.stat().st_size for root in roots for path in root.rglob("*") if path.is_file()}


def compiled(test: Any) -> Any:
    """Mark a test of what engines compile: on a CPU, only a build of vLLM for it does."""
    for kind in ("cpu", "cuda", "rocm", "npu"):
        test = pytest.mark.vllm_backend(kind, reference=False)(test)
    return test


@warm
@compiled
@pytest.mark.vllm_on_request("executors")
def test_second_start_finds_its_caches(start_script: Callable[..., Script], vllm_cache_dir: Path) -> None:
    listed = []
    for _ in range(2):
        script = start_script("warm", generate=True, TORCHDYNAMO_DISABLE="0")
        assert script.up()["tokens"]
        listed.append(artefacts(vllm_cache_dir, "warm").keys())
        script.end()
    assert listed[0], "the first start compiled nothing, so this test would prove nothing"
    assert listed[1] == listed[0], f"the second start added {sorted(listed[1] - listed[0])[:5]}"


#: Workers that start at once on one cache.
WORKERS = 4


@warm
@compiled
@pytest.mark.vllm_on_request("rounds")
def test_workers_share_an_empty_cache(
    start_script: Callable[..., Script], vllm_cache_dir: Path, vllm_settings: Settings
) -> None:
    """Workers of one name, which find it empty at the same time; then one that finds what is in it cut short."""

    def start(name: str, count: int) -> dict[Path, int]:
        scripts = [start_script(name, generate=True, TORCHDYNAMO_DISABLE="0") for _ in range(count)]
        for script in scripts:
            assert script.up()["tokens"]
        for script in scripts:
            script.end()
        return artefacts(vllm_cache_dir, name)

    for _ in range(vllm_settings.rounds_of_starts):
        name = f"shared-{uuid.uuid4().hex[:8]}"
        made = start(name, WORKERS)
        assert made, "the first start left nothing, so this test would prove nothing"
    for path, size in made.items():
        os.truncate(path, size // 2)
    assert start(name, 1) == made, "what was cut short was not made again"
    assert start(name, 1) == made, "a warm start changed what is in the cache"
