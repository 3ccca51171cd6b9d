"""What the row of Ascend NPUs says is what the releases of vllm-ascend hold. Simulated: no such hardware."""

from __future__ import annotations

import ast
import re
from types import SimpleNamespace

import pytest
from source_reader import Source, call, constants, pip, run

from roll_vllm import versions
from roll_vllm.backends import BACKENDS
from roll_vllm.environment import worker_environment

NPU = BACKENDS["npu"]
PLATFORM = "vllm_ascend.platform.NPUPlatform"
EXPANDABLE = "expandable_segments:True"


def test_there_is_a_release_for_each_row_that_says_so_and_for_no_other() -> None:
    line = next(line for line in pip("index", "versions", "vllm-ascend", "--pre").splitlines() if "Available" in line)
    published = line.partition(":")[2].replace(" ", "").split(",")
    assert len(published) > 10
    for row in versions.TESTED:
        belonging = [version for version in published if versions.same_release(version, row.release)]
        assert (row.ascend in belonging) if row.ascend else belonging == []


def test_vllm_finds_it_as_a_platform_plugin(ascend: Source) -> None:
    files = [*ascend.root.glob("*.dist-info/entry_points.txt"), *ascend.root.glob("setup.py")]
    assert len(files) == 1
    assert re.search(r"vllm\.platform_plugins.*ascend = vllm_ascend:register\b", files[0].read_text(), re.DOTALL)
    assert PLATFORM in constants(ascend.tree("vllm_ascend"))


def test_names(ascend: Source) -> None:
    assert ascend.attribute(PLATFORM, "device_type") == NPU.torch_device
    assert ascend.attribute(PLATFORM, "ray_device_key") == NPU.ray_resource
    assert ((ascend.attribute(PLATFORM, "device_control_env_var"),),) == NPU.visibility


def test_groups_communicate_by_hccl(ascend: Source, row: versions.VersionRow) -> None:
    for engine in NPU.engines(row.release):
        worker = ascend.find_class(NPU.worker_class(row.release, engine))
        assert NPU.communication in constants(worker)
    communicator = call(ascend.method(PLATFORM, "get_device_communicator_cls"), None)
    assert ascend.find_class(communicator).name == "NPUCommunicator"


def test_the_engines_are_those_of_the_release(ascend: Source, row: versions.VersionRow) -> None:
    assert ascend.has("vllm_ascend.worker.worker_v1")
    assert NPU.engines(row.release) == (("V0", "V1") if ascend.has("vllm_ascend.worker.worker") else ("V1",))


def test_worker_classes_are_those_that_the_platform_chooses(ascend: Source, row: versions.VersionRow) -> None:
    chooses = constants(ascend.method(PLATFORM, "check_and_update_config"))
    for engine in NPU.engines(row.release):
        qualname = NPU.worker_class(row.release, engine)
        assert qualname in chooses
        assert ascend.find_class(qualname).name == "NPUWorker"


def test_workers_sleep_by_the_pool_where_we_say_so(ascend: Source, row: versions.VersionRow) -> None:
    assert call(ascend.method(PLATFORM, "is_sleep_mode_available"), None) is True
    for engine in NPU.engines(row.release):
        worker = NPU.worker_class(row.release, engine)
        bodies = {name: ast.unparse(ascend.method(worker, name)) for name in ("sleep", "wake_up")}
        for name, body in bodies.items():
            assert ("CaMemAllocator.get_instance()" in body) is NPU.enable_sleep_mode(row.release, engine), name
        arguments = {name: ascend.method(worker, name).args for name in bodies}
        assert [argument.arg for argument in arguments["sleep"].args] == ["self", "level"]
        assert [argument.arg for argument in arguments["wake_up"].args] == ["self", "tags"]


def test_the_pool_accepts_the_environment_of_a_worker(ascend: Source, row: versions.VersionRow) -> None:
    body = ascend.method("vllm_ascend.device_allocator.camem.CaMemAllocator", "__init__").body
    check = [node for node in body if "conf" in ast.dump(node) and isinstance(node, (ast.Assign, ast.Assert))]
    assert [type(node) for node in check] == [ast.Assign, ast.Assert]
    hostile = dict.fromkeys(
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"),
        EXPANDABLE,
    )
    with pytest.raises(AssertionError, match="Expandable segments"):
        run(check, os=SimpleNamespace(environ=hostile))
    for given in ({}, hostile, {"PYTORCH_NPU_ALLOC_CONF": EXPANDABLE}):
        changes = worker_environment(
            worker_name="w", device_kind="npu", vllm_version=row.release, port=None, environ=given
        )
        run(check, os=SimpleNamespace(environ={**given, **changes}))
        # Set in any case: a Ray worker inherits the node's.
        assert changes["PYTORCH_NPU_ALLOC_CONF"] == ""
