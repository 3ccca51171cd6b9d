"""What the rows of CUDA, ROCm and CPU say of vLLM is what its releases hold."""

from __future__ import annotations

import ast
import os
from types import SimpleNamespace
from typing import Any

import pytest
from source_reader import Source, call, constants, run

from roll_vllm import versions
from roll_vllm.backends import BACKENDS
from roll_vllm.environment import worker_environment

PLATFORMS = {
    "cuda": "vllm.platforms.cuda.CudaPlatformBase",
    "rocm": "vllm.platforms.rocm.RocmPlatform",
    "cpu": "vllm.platforms.cpu.CpuPlatform",
}
backend_names = pytest.mark.parametrize("name", PLATFORMS)


@backend_names
def test_ray_counts_by_the_same_resource(vllm: Source, name: str) -> None:
    key = vllm.attribute(PLATFORMS[name], "ray_device_key")
    if name == "cpu":
        assert not key  # vLLM's CPU platform has none, and Ray's own name is used
    else:
        assert key == BACKENDS[name].ray_resource


@backend_names
def test_groups_communicate_by_the_same_backend(vllm: Source, release: str, name: str) -> None:
    found = vllm.attribute(PLATFORMS[name], "dist_backend")
    if found is None:  # 0.8.4 asks no platform
        assert versions.same_release(release, "0.8.4")
        if name == "cpu":
            assert "gloo" in constants(vllm.tree("vllm.worker.cpu_worker"))
            return
        initialise = vllm.function("vllm.distributed.parallel_state", "init_distributed_environment")
        found = ast.literal_eval(initialise.args.defaults[-1])
    assert found == BACKENDS[name].communication


@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_vllm_hands_out_devices_by_a_variable_that_we_know(vllm: Source, name: str) -> None:
    assert vllm.attribute(PLATFORMS[name], "device_control_env_var") in BACKENDS[name].visibility[-1]


def test_the_engines_are_those_of_the_release(vllm: Source, release: str) -> None:
    v0 = vllm.has("vllm.worker.worker")
    assert vllm.has("vllm.v1.worker.gpu_worker")
    for name in ("cuda", "rocm"):
        assert BACKENDS[name].engines(release) == (("V0", "V1") if v0 else ("V1",))
    known = {name: vllm.has(name) for name in ("vllm.worker.cpu_worker", "vllm.v1.worker.cpu_worker")}
    assert BACKENDS["cpu"].engines(release) == (("V0",) if known["vllm.worker.cpu_worker"] else ("V1",))
    assert sum(known.values()) == 1


@backend_names
def test_worker_classes_are_those_that_the_platform_chooses(vllm: Source, release: str, name: str) -> None:
    chooses = constants(vllm.method(PLATFORMS[name], "check_and_update_config"))
    for engine in BACKENDS[name].engines(release):
        qualname = BACKENDS[name].worker_class(release, engine)
        assert qualname in chooses
        assert vllm.find_class(qualname)


def test_the_variable_for_the_engine_is_there_as_long_as_we_set_it(vllm: Source, release: str) -> None:
    changes = worker_environment(worker_name="w", device_kind="rocm", vllm_version=release, port=None, environ={})
    assert ("VLLM_USE_V1" in changes) == ("VLLM_USE_V1" in constants(vllm.tree("vllm.envs")))
    if "V0" in BACKENDS["rocm"].engines(release):
        assert changes["VLLM_USE_V1"] == "0"


def test_the_pool_is_used_where_the_release_lets_us(vllm: Source, release: str) -> None:
    platform = "vllm.platforms.interface.Platform"
    try:
        allowed = vllm.method(platform, "is_sleep_mode_available")
    except LookupError:  # 0.8.4 asks whether it is CUDA
        assert "Sleep mode is only supported on CUDA devices." in constants(vllm.tree("vllm.config"))
        allowed = vllm.method(platform, "is_cuda")
    enum = vllm.find_class("vllm.platforms.interface.PlatformEnum")
    kinds = run([ast.parse("import enum").body[0], enum])["PlatformEnum"]
    for name, kind in {"cuda": kinds.CUDA, "rocm": kinds.ROCM, "cpu": kinds.CPU}.items():
        answer = call(allowed, SimpleNamespace(_enum=kind), PlatformEnum=kinds)
        assert answer is BACKENDS[name].enable_sleep_mode(release), name


class TestAmdVisibility:
    """The code that ROCm's platform runs when it is imported, on simulated environments."""

    @staticmethod
    def imported(vllm: Source, environ: dict[str, str]) -> dict[str, str]:
        (block,) = (
            node
            for node in vllm.tree("vllm.platforms.rocm").body
            if isinstance(node, ast.If) and "HIP_VISIBLE_DEVICES" in constants(node.test)
        )
        environ = dict(environ)
        run([block], os=SimpleNamespace(environ=environ))
        return environ

    def test_the_two_names_must_agree(self, vllm: Source) -> None:
        with pytest.raises(AssertionError):
            self.imported(vllm, {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"})

    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"HIP_VISIBLE_DEVICES": "1"},
            {"CUDA_VISIBLE_DEVICES": "1"},
            {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"},
            {"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"},
        ],
    )
    def test_workers_get_an_environment_that_it_accepts(
        self, vllm: Source, release: str, given: dict[str, str]
    ) -> None:
        changes = worker_environment(
            worker_name="w", device_kind="rocm", vllm_version=release, port=None, environ=given
        )
        before = {**given, **changes}
        assert self.imported(vllm, before) == before
        visible = given.get("HIP_VISIBLE_DEVICES", given.get("CUDA_VISIBLE_DEVICES"))
        assert before.get("HIP_VISIBLE_DEVICES") == before.get("CUDA_VISIBLE_DEVICES") == visible

    def test_limiting_a_process_is_accepted(self, vllm: Source) -> None:
        limits = BACKENDS["rocm"].show_only(["3"])
        assert self.imported(vllm, limits) == limits == dict.fromkeys(limits, "3")


class TestThreads:
    """The code by which CPU workers read the variable that binds threads."""

    @pytest.fixture
    def worker(self, vllm: Source, release: str) -> ast.ClassDef:
        backend = BACKENDS["cpu"]
        return vllm.find_class(backend.worker_class(release, backend.engines(release)[0]))

    @staticmethod
    def bound(worker: ast.ClassDef, value: str, rank: int, world_size: int, replica: int | None) -> str:
        """What the worker of a rank binds to."""
        for function in ast.walk(worker):
            body: list[Any] = getattr(function, "body", []) if isinstance(function, ast.FunctionDef) else []
            for index, node in enumerate(body):
                if isinstance(node, ast.Assign) and "omp_cpuids" in ast.dump(node.targets[0]):
                    parallel = SimpleNamespace(data_parallel_rank_local=replica, world_size=world_size)
                    me = SimpleNamespace(rank=rank, parallel_config=parallel)
                    envs = SimpleNamespace(VLLM_CPU_OMP_THREADS_BIND=value)
                    run(body[index : index + 2], self=me, rank=rank, envs=envs, os=os)
                    return me.local_omp_cpuid
        raise LookupError(f"{worker.name} does not read the variable")

    @pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (2, 2)])
    @pytest.mark.parametrize("name", ["cpu", "cpu-reference"])
    def test_no_rank_binds(self, worker: ast.ClassDef, release: str, name: str, ranks: int, replicas: int) -> None:
        changes = BACKENDS[name].worker_environment(release, {}, ranks * replicas)
        value = changes.get("VLLM_CPU_OMP_THREADS_BIND")
        if value is None:  # one rank alone is left to vLLM
            assert (name, ranks * replicas) == ("cpu", 1)
            return
        without = {self.bound(worker, value, rank, ranks, None) for rank in range(ranks)} if replicas == 1 else set()
        if replicas > 1 and not versions.same_release(release, "0.8.4"):  # which does not split by replica
            without = {self.bound(worker, value, rank, ranks, r) for rank in range(ranks) for r in range(replicas)}
        for word in without:
            assert word in ("all", "nobind")
            # The native binding is skipped for exactly this word.
            assert f"self.local_omp_cpuid != {word!r}" in ast.unparse(worker)
