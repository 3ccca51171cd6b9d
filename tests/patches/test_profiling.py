"""Memory profiling beside others. The figures need CUDA: a stand-in asserts what vLLM's worker does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from roll_vllm.patches import profiling


@pytest.mark.parametrize("free", [60, 80, 99])
def test_a_neighbour_may_give_memory_back(free: int) -> None:
    def by_snapshot(worker: SimpleNamespace) -> int:
        assert worker.init_snapshot.free_memory > free, "Error in memory profiling"
        return 7

    def by_number(worker: SimpleNamespace) -> int:
        assert worker.init_gpu_memory > free, "Error in memory profiling"
        return 7

    worker = SimpleNamespace(init_snapshot=SimpleNamespace(free_memory=70, total_memory=100), init_gpu_memory=70)
    assert profiling.unshaken(by_snapshot)(worker) == 7
    assert profiling.unshaken_084(by_number)(worker) == 7
    assert worker.init_snapshot.free_memory == worker.init_gpu_memory == 70


def test_v0_does_not_ask() -> None:
    def check(worker: object) -> None:
        raise AssertionError("Error in memory profiling")

    profiling.unasked(check)(object())
