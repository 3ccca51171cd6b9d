"""The fixtures, in layers: override the smallest one that differs for you.

``vllm_model`` -> ``vllm_engine_args`` -> ``vllm_engine_factory`` / ``vllm_engine``, with ``vllm_trainer`` beside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_roll_vllm.options import EXECUTORS, SETTINGS, Settings
from pytest_roll_vllm.waiting import waiting
from roll_vllm import versions

if TYPE_CHECKING:
    from pytest_roll_vllm.engines import EngineHandle, EnginePool
    from pytest_roll_vllm.models import Model
    from pytest_roll_vllm.ray_cluster import RayCluster
    from pytest_roll_vllm.trainer import Trainer
    from roll_vllm.devices import Device

__all__ = [
    "ray_cluster",
    "vllm_cache_dir",
    "vllm_device",
    "vllm_engine",
    "vllm_engine_args",
    "vllm_engine_creator",
    "vllm_engine_factory",
    "vllm_engine_pool",
    "vllm_executor",
    "vllm_executor_args",
    "vllm_model",
    "vllm_model_factory",
    "vllm_placement_groups",
    "vllm_settings",
    "vllm_trainer",
    "vllm_trainer_factory",
    "vllm_version",
]

#: An ``EnginePool`` put here before the session starts is used instead of one of its own, and outlives it.
POOL: pytest.StashKey[EnginePool] = pytest.StashKey()

#: Likewise for the ``RayCluster`` that its engines run on.
RAY_CLUSTER: pytest.StashKey[RayCluster] = pytest.StashKey()


@pytest.fixture(scope="session")
def vllm_settings(pytestconfig: pytest.Config) -> Settings:
    """The settings of the run, each with its source."""
    return pytestconfig.stash[SETTINGS]


@pytest.fixture(scope="session")
def vllm_version(vllm_settings: Settings) -> str:
    """The installed vLLM version, with all suffixes."""
    found = vllm_settings.installed
    if found is None:
        pytest.fail(f"no vLLM is installed: `pip install vllm=={versions.TESTED[-1].release}`", pytrace=False)
    return found.version


@pytest.fixture(scope="session")
def vllm_device(vllm_settings: Settings) -> Device:
    """The devices to test on."""
    return vllm_settings.device


@pytest.fixture(scope="session")
def vllm_cache_dir(vllm_settings: Settings) -> Path:
    """A directory for caches; each xdist worker has its own, because compilers do not lock theirs."""
    return vllm_settings.make_cache_dir(vllm_settings.label or os.environ.get("PYTEST_XDIST_WORKER", "main"))


@pytest.fixture(scope="session")
def vllm_model_factory(vllm_cache_dir: Path, vllm_device: Device) -> Callable[[str], Model]:
    """Makes a model by name or directory; the same one when asked again."""
    from functools import cache

    from pytest_roll_vllm.models import make
    from roll_vllm.errors import ConfigurationError

    # The attention kernels of accelerators take no float32.
    dtype = "float32" if vllm_device.kind == "cpu" else "bfloat16"

    @cache
    def factory(name_or_path: str) -> Model:
        try:
            return make(name_or_path, vllm_cache_dir / "models", dtype)
        except ConfigurationError as error:
            raise pytest.UsageError(str(error)) from error

    return factory


@pytest.fixture(scope="session")
def vllm_model(vllm_settings: Settings, vllm_model_factory: Callable[[str], Model]) -> Model:
    """The model under test, from ``--vllm-model``. Override it to test with your own."""
    return vllm_model_factory(vllm_settings.model.value)


@pytest.fixture(scope="session")
def vllm_trainer_factory() -> Callable[[Model], Trainer]:
    """The trainer of a model; the same one when asked again."""
    from functools import cache

    from pytest_roll_vllm.trainer import Trainer

    return cache(Trainer)


@pytest.fixture
def vllm_trainer(vllm_trainer_factory: Callable[[Model], Trainer], vllm_model: Model) -> Trainer:
    """The trainer's side: reference weights, other versions, and pushing them through any transport."""
    return vllm_trainer_factory(vllm_model)


@pytest.fixture
def vllm_engine_args(vllm_model: Model, vllm_device: Device) -> dict[str, Any]:
    """Arguments of ``create_async_llm``. Override it to add your own; engines with equal arguments are shared."""
    arguments: dict[str, Any] = {
        "model": str(vllm_model.path),
        "dtype": vllm_model.dtype,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "seed": 0,
    }
    if vllm_device.kind == "cpu":
        # vLLM would take 4 GiB for the KV cache; these models need little: 16384 tokens, in blocks of 128 by CPU
        # builds and of 16 by the official wheels.
        arguments["num_gpu_blocks_override"] = 1024 if vllm_device.backend == "cpu-reference" else 128
    else:
        # Several engines live on one device, and 0.8.4 counts what the others hold as its own: let each plan with
        # half of the device, and take 131072 tokens.
        arguments |= {"gpu_memory_utilization": 0.5, "num_gpu_blocks_override": 8192}
    return arguments


@pytest.fixture(scope="session")
def vllm_engine_pool(pytestconfig: pytest.Config, vllm_settings: Settings, vllm_device: Device) -> Iterator[EnginePool]:
    """The engines of the session."""
    from pytest_roll_vllm.engines import EnginePool

    given = pytestconfig.stash.get(POOL, None)
    if given is not None:
        yield given
        return
    # Two engines fit beside each other in host memory; a device is taken whole. V0 engines live in this process,
    # where all must have the same number of ranks.
    in_process = vllm_settings.engine == "V0"
    from pytest_roll_vllm.targets import CAPABILITIES

    supported = [name for name in CAPABILITIES if not vllm_settings.missing(name)]
    pool = EnginePool(0 if in_process else 2 if vllm_device.kind == "cpu" else 1, supported)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(scope="session")
def vllm_engine_creator(
    pytestconfig: pytest.Config, vllm_settings: Settings, vllm_cache_dir: Path, vllm_device: Device
) -> Callable[[dict[str, Any]], Callable[[], Any]]:
    """Turns engine arguments into a coroutine function that starts the target, with this worker's caches."""
    from roll_vllm.environment import AppliedEnvironment

    worker = os.environ.get("PYTEST_XDIST_WORKER")

    def creator(arguments: dict[str, Any]) -> Callable[[], Any]:
        async def create() -> Any:
            from pytest_roll_vllm.engines import describe, eager_variables, plain
            from pytest_roll_vllm.report import note, note_patches
            from pytest_roll_vllm.visibility import share_of

            changes = share_of(worker, vllm_device.kind, vllm_device.count, os.environ)
            changes["VLLM_CACHE_ROOT"] = str(vllm_cache_dir)
            changes["FLASHINFER_WORKSPACE_BASE"] = str(vllm_cache_dir / "flashinfer")
            if vllm_device.kind == "cpu" and arguments.get("enforce_eager"):
                changes.update(eager_variables())
            note(pytestconfig, "engine starts", plain({key: arguments[key] for key in sorted(arguments)}))
            target = vllm_settings.target_class()
            try:
                with AppliedEnvironment(changes), waiting(f"starting engine {describe(arguments)}"):
                    # One name for all engines of a worker, which start one after the other, keeps their caches warm.
                    await target.start({"worker_name": worker or "main", **arguments})
            except BaseException:
                await target.shutdown()
                raise
            engine = getattr(target, "rollout_engine", None)
            if engine is not None:
                note_patches(pytestconfig, engine.patch_records())
            return target

        return create

    return creator


@pytest.fixture
def vllm_engine(
    vllm_engine_pool: EnginePool,
    vllm_engine_args: dict[str, Any],
    vllm_trainer: Trainer,
    vllm_engine_creator: Callable[[dict[str, Any]], Callable[[], Any]],
) -> Iterator[EngineHandle]:
    """The patched engine, shared by all tests with equal arguments, and reset before each of them.

    It is awake and idle, holds the reference weights, and its caches are empty. Plain tests call
    ``vllm_engine.run(...)``; ``async`` tests await.
    """
    from pytest_roll_vllm.engines import EngineConfig

    config = EngineConfig.of(vllm_engine_args["model"], vllm_engine_args)
    engine = vllm_engine_pool.shared(config, vllm_engine_creator(vllm_engine_args))
    engine.run(vllm_trainer.reset(engine))
    yield engine
    if engine.errored:
        pytest.fail("the engine died during the test; the next test gets a new one", pytrace=False)


@pytest.fixture
def vllm_engine_factory(
    vllm_engine_pool: EnginePool,
    vllm_engine_args: dict[str, Any],
    vllm_engine_creator: Callable[[dict[str, Any]], Callable[[], Any]],
) -> Iterator[Callable[..., EngineHandle]]:
    """Starts engines of the test's own: ``vllm_engine_factory(**changed_arguments)``; closed after the test."""
    started: list[EngineHandle] = []

    def factory(**changes: Any) -> EngineHandle:
        started.append(vllm_engine_pool.start(vllm_engine_creator({**vllm_engine_args, **changes})))
        return started[-1]

    yield factory
    for engine in started:
        vllm_engine_pool.end(engine)


@pytest.fixture(scope="session", params=EXECUTORS)
def vllm_executor(request: pytest.FixtureRequest) -> str:
    """The executor that runs the ranks, ``mp`` or ``ray``: a test that uses it runs on each.

    Off the executors of the run (``--vllm-executors``) it is not applicable.
    """
    return str(request.param)


@pytest.fixture
def vllm_executor_args(request: pytest.FixtureRequest, vllm_executor: str) -> Callable[[int], dict[str, Any]]:
    """Engine arguments for ``vllm_executor``: ``vllm_executor_args(ranks)``, the same whenever asked again."""

    def arguments(ranks: int) -> dict[str, Any]:
        if vllm_executor != "ray":
            return {"distributed_executor_backend": vllm_executor}
        cluster: RayCluster = request.getfixturevalue("ray_cluster")
        return {"distributed_executor_backend": "ray", "resource_placement_groups": cluster.shared(ranks)}

    return arguments


@pytest.fixture(scope="session")
def ray_cluster(
    pytestconfig: pytest.Config, vllm_settings: Settings, vllm_device: Device, vllm_engine_pool: EnginePool
) -> Iterator[RayCluster]:
    """A real Ray cluster that this process is connected to: the one at ``--ray-address``, or a small one here.

    A cluster of our own has one node, and as many more on this machine as are asked for. Each process of a run with
    several (pytest-xdist, several versions) has its own.
    """
    from pytest_roll_vllm.ray_cluster import RayCluster
    from roll_vllm import backends
    from roll_vllm.errors import ConfigurationError

    given = pytestconfig.stash.get(RAY_CLUSTER, None)
    if given is not None:
        yield given
        return
    resource = backends.of(vllm_device).ray_resource
    try:
        cluster = RayCluster(vllm_settings.ray_address.value, resource=resource, devices=vllm_device.count)
    except ConfigurationError as error:
        pytest.fail(str(error), pytrace=False)
    try:
        yield cluster
    finally:
        vllm_engine_pool.close()  # engines may run on it
        cluster.close()


@pytest.fixture
def vllm_placement_groups(ray_cluster: RayCluster) -> Iterator[Callable[..., list[tuple[Any, int]]]]:
    """Makes placement groups that are removed after the test: ``vllm_placement_groups(bundles, **how)``.

    ``bundles`` is the number of ranks, or a list of resources. ``how`` is that of ``RayCluster.group``. Returned is the
    place of each bundle, ``(placement_group, bundle_index)``, as ``resource_placement_groups`` takes them.
    """
    made: list[Any] = []

    def factory(bundles: int | Sequence[Mapping[str, float]], **how: Any) -> list[tuple[Any, int]]:
        wanted = [ray_cluster.bundle] * bundles if isinstance(bundles, int) else bundles
        made.append(ray_cluster.group(wanted, **how))
        return [(made[-1], index) for index in range(len(wanted))]

    yield factory
    for group in made:
        ray_cluster.remove(group)
