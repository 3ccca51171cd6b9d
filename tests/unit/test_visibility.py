"""The share of an xdist worker: one device, and only one that the caller may see."""

from __future__ import annotations

import pytest

from pytest_roll_vllm.visibility import VARIABLES, share_of

KINDS = sorted(VARIABLES)


@pytest.mark.parametrize("kind", KINDS)
def test_each_worker_gets_one_device_in_turn(kind: str) -> None:
    shares = [share_of(f"gw{index}", kind, 3, {}) for index in range(7)]
    assert shares == [{VARIABLES[kind][0]: str(index % 3)} for index in range(7)]


@pytest.mark.parametrize("worker", [None, "", "main", "master", "gw", "gwx", "gw1x", "xgw1"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_share_without_xdist(worker: str | None, kind: str) -> None:
    assert share_of(worker, kind, 4, {VARIABLES[kind][0]: "2,3"}) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_share_without_devices(kind: str) -> None:
    assert share_of("gw0", kind, 0, {}) == {}
    assert share_of("gw0", kind, 0, {VARIABLES[kind][0]: ""}) == {}


@pytest.mark.parametrize("kind", ["cpu", "tpu", ""])
def test_nothing_to_share_of_other_kinds(kind: str) -> None:
    assert share_of("gw0", kind, 1, {"CUDA_VISIBLE_DEVICES": "0"}) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("visible", "count", "entries"),
    [
        ("2,3", 2, ["2", "3"]),
        (" 5 , 1 ,", 2, ["5", "1"]),
        ("GPU-6f3a,GPU-19bb", 2, ["GPU-6f3a", "GPU-19bb"]),
        ("MIG-GPU-6f3a/1/0", 1, ["MIG-GPU-6f3a/1/0"]),
        ("1,-1,2", 1, ["1"]),  # the drivers stop at the first entry that names nothing
        ("0,9", 1, ["0"]),
    ],
)
def test_a_share_comes_from_what_the_caller_may_see(kind: str, visible: str, count: int, entries: list[str]) -> None:
    shares = [share_of(f"gw{index}", kind, count, {VARIABLES[kind][0]: visible}) for index in range(4)]
    assert [share[VARIABLES[kind][0]] for share in shares] == [entries[index % len(entries)] for index in range(4)]


def test_the_name_that_cuda_and_hip_share() -> None:
    """HIP honours CUDA_VISIBLE_DEVICES as well, and vLLM demands that the two agree."""
    assert share_of("gw1", "rocm", 2, {"CUDA_VISIBLE_DEVICES": "2,3"}) == {"CUDA_VISIBLE_DEVICES": "3"}
    both = {"CUDA_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "4,5"}
    assert share_of("gw1", "rocm", 2, both) == {"HIP_VISIBLE_DEVICES": "5", "CUDA_VISIBLE_DEVICES": "5"}


def test_devices_are_counted_within_what_rocr_shows() -> None:
    assert share_of("gw1", "rocm", 2, {"ROCR_VISIBLE_DEVICES": "6,7"}) == {"HIP_VISIBLE_DEVICES": "1"}


def test_the_environment_is_only_read() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "2,3"}
    share_of("gw0", "cuda", 2, environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": "2,3"}
