"""What a process that ends a start leaves for the frontend."""

from __future__ import annotations

from pathlib import Path

import pytest

from roll_vllm import failure
from roll_vllm.errors import OUT_OF_MEMORY_REMEDY, EngineDiedError, EngineOutOfMemoryError, WeightUpdateError


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


LACKING = [
    OutOfMemoryError("Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA out of memory occurred when warming up sampler with 256 dummy requests."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("Worker failed with error 'MemoryError()', please check the stack trace above for the root cause"),
    MemoryError(),
    ValueError("Free memory on device (4.0/80.0 GiB) on startup is less than desired GPU memory utilization (0.8, 64)"),
    ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
    ValueError("(8.00 GiB KV cache is needed, which is larger than the available KV cache memory (4.00 GiB). "),
    ValueError("seq len (9) is larger than the maximum number of tokens that can be stored in KV cache (8). "),
]


@pytest.mark.parametrize("error", LACKING, ids=lambda error: str(error)[:20])
def test_too_little_memory_is_left_with_the_remedy(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, failure.out_of_memory_left(str(tmp_path)):
        raise error
    assert caught.value is error
    left = failure.read(tmp_path)
    assert type(left) is EngineOutOfMemoryError
    assert " ".join(str(error).split()).rstrip(". ") in str(left)
    assert str(left).endswith(f". {OUT_OF_MEMORY_REMEDY}")


def test_the_first_error_stays(tmp_path: Path) -> None:
    for text in ("first out of memory", "second out of memory"):
        with pytest.raises(RuntimeError), failure.out_of_memory_left(str(tmp_path)):
            raise RuntimeError(text)
    assert "first" in str(failure.read(tmp_path))


def test_another_error_is_not_left(tmp_path: Path) -> None:
    for error in (ValueError("max_model_len is larger than the model's"), EngineDiedError("gone"), KeyError("memory")):
        assert failure.out_of_memory(error) is None
        with pytest.raises(type(error)), failure.out_of_memory_left(str(tmp_path)):
            raise error
    assert list(tmp_path.iterdir()) == []


def test_our_own_error_is_kept() -> None:
    ours = EngineOutOfMemoryError("ours")
    assert failure.out_of_memory(ours) is ours


@pytest.mark.parametrize("directory", [None, "", "/nowhere/on/this/machine"])
def test_without_a_directory_the_error_goes_on(directory: str | None) -> None:
    with pytest.raises(MemoryError), failure.out_of_memory_left(directory):
        raise MemoryError


def test_every_rank_answers() -> None:
    assert failure.values([{"value": 3}, {"value": None}]) == [3, None]


def test_the_rank_that_lacks_memory_is_the_cause() -> None:
    """The others only see that a call came to nothing."""
    lost = {"error": "WeightUpdateError", "message": "rank 2 refused", "rank": 0}
    lacking = {"error": "EngineOutOfMemoryError", "message": "out of memory", "rank": 1}
    with pytest.raises(EngineOutOfMemoryError, match=r"out of memory \[rank 1\]"):
        failure.values([lost, lacking, {"value": 1}])
    with pytest.raises(WeightUpdateError, match=r"rank 2 refused \[rank 0\]"):
        failure.values([lost, {"value": 1}])


def test_what_a_library_makes_of_an_error_of_ours_is_ours_again(tmp_path: Path) -> None:
    """As Ray does, which raises what is both its own and that of the worker."""
    failure.leave(tmp_path, type("RayTaskError(EngineDiedError)", (EngineDiedError,), {})("rank 1 is gone"))
    left = failure.read(tmp_path)
    assert type(left) is EngineDiedError
    assert str(left) == "rank 1 is gone"
