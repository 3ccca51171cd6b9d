"""Sleep by storage: memory goes, and everything that pointed at it stays valid."""

from __future__ import annotations

import contextlib
import gc
import os
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import psutil
import pytest
import torch

from roll_vllm.errors import EngineOutOfMemoryError, UnsupportedFeatureError
from roll_vllm.state import TAGS
from roll_vllm.worker import memory
from roll_vllm.worker.memory import PoolMemory, StorageMemory, out_of_memory_explained

KV, BOTH = frozenset({"kv_cache"}), frozenset(TAGS)
KIB, MIB = 2**10, 2**20


class Model(torch.nn.Module):
    """Parameters of several dtypes, a tied one, a view, buffers, and a parameter inside a buffer's storage."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.randn(8, 4))
        self.head = self.embed
        self.brief = torch.nn.Parameter(torch.randn(6).bfloat16())
        self.codes = torch.nn.Parameter(torch.arange(10, dtype=torch.int8), requires_grad=False)
        self.register_buffer("table", torch.randn(5))
        self.in_table = torch.nn.Parameter(self.table[:2], requires_grad=False)
        self.empty = torch.nn.Parameter(torch.empty(0))


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def caches() -> list[torch.Tensor]:
    whole = torch.randn(2, 16)
    return [whole[0], whole[1], torch.randn(3)]


@pytest.fixture
def sleeper(model: Model, caches: list[torch.Tensor]) -> StorageMemory:
    return StorageMemory(model, caches)


FULL = {"weights": 8 * 4 * 4 + 6 * 2 + 10, "kv_cache": 32 * 4 + 3 * 4}


def test_awake(sleeper: StorageMemory) -> None:
    assert sleeper.sleeping == frozenset()
    assert sleeper.resident_bytes() == FULL


@pytest.mark.parametrize(("level", "sleeping"), [(1, KV), (2, BOTH)])
def test_levels(sleeper: StorageMemory, model: Model, level: int, sleeping: frozenset[str]) -> None:
    before = model.embed.detach().clone()
    sleeper.sleep(level)
    assert sleeper.sleeping == sleeping
    assert sleeper.resident_bytes() == {tag: 0 if tag in sleeping else size for tag, size in FULL.items()}
    assert sleeper.wake(TAGS) == sleeping
    assert sleeper.sleeping == frozenset()
    assert sleeper.resident_bytes() == FULL
    assert torch.equal(model.embed, before) is (level == 1)


def test_sleeping_again_and_deeper(sleeper: StorageMemory) -> None:
    for level, sleeping in [(1, KV), (1, KV), (2, BOTH), (2, BOTH), (1, BOTH)]:
        sleeper.sleep(level)
        assert sleeper.sleeping == sleeping
    assert sleeper.wake(TAGS) == BOTH
    assert sleeper.resident_bytes() == FULL


@pytest.mark.parametrize("order", [TAGS, TAGS[::-1]])
def test_waking_by_tag(sleeper: StorageMemory, order: tuple[str, str]) -> None:
    sleeper.sleep(2)
    first, second = order
    assert sleeper.wake([first]) == {first}
    assert sleeper.sleeping == {second}
    assert sleeper.wake([first, first, second]) == {second}
    assert sleeper.wake(TAGS) == sleeper.wake([]) == frozenset()


def test_a_woken_kv_cache_is_zero(sleeper: StorageMemory, caches: list[torch.Tensor]) -> None:
    sleeper.sleep(1)
    sleeper.wake(["kv_cache"])
    assert all(int(cache.count_nonzero()) == 0 for cache in caches)


def test_woken_weights_are_poison(sleeper: StorageMemory, model: Model) -> None:
    sleeper.sleep(2)
    sleeper.wake(["weights"])
    assert model.embed.isnan().all()
    assert model.brief.isnan().all()
    assert (model.codes == -1).all()


def test_buffers_are_kept(sleeper: StorageMemory, model: Model) -> None:
    table = model.table.clone()
    sleeper.sleep(2)
    assert torch.equal(model.table, table)
    assert torch.equal(model.in_table, table[:2])
    sleeper.wake(TAGS)
    assert torch.equal(model.table, table)


def test_objects_ties_and_views_survive(sleeper: StorageMemory, model: Model, caches: list[torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    row, transposed = model.embed.detach()[3], model.embed.detach().T
    for _ in range(3):
        sleeper.sleep(2)
        sleeper.wake(TAGS)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert model.head is model.embed
    with torch.no_grad():
        model.embed.copy_(torch.arange(32.0).view(8, 4))
    assert row.tolist() == transposed[:, 3].tolist() == [12, 13, 14, 15]
    caches[1].fill_(5)
    assert caches[0].count_nonzero() == 0
    assert caches[0].untyped_storage()._cdata == caches[1].untyped_storage()._cdata


@pytest.mark.parametrize("pinned", ["weights", "kv_cache"])
def test_what_cannot_be_resized_is_refused_whole(
    sleeper: StorageMemory, model: Model, caches: list[torch.Tensor], pinned: str
) -> None:
    held = (model.embed.detach() if pinned == "weights" else caches[2]).numpy()
    with pytest.raises(UnsupportedFeatureError, match=rf"sleep level 2 cannot give {pinned} back.*Tensor\.numpy\(\)"):
        sleeper.sleep(2)
    assert sleeper.sleeping == frozenset()
    assert sleeper.resident_bytes() == FULL
    if pinned == "weights":
        sleeper.sleep(1)
        assert sleeper.sleeping == KV
    assert held.size


def test_no_kv_cache() -> None:
    sleeper = StorageMemory(torch.nn.Linear(2, 2), [])
    sleeper.sleep(1)
    assert sleeper.sleeping == KV
    assert sleeper.wake(TAGS) == KV


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_waking_without_memory_takes_nothing(
    sleeper: StorageMemory, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    fill = memory._fill

    def full(storage: torch.UntypedStorage, value: int) -> None:
        if storage.nbytes() == 3 * 4:  # the last of the KV cache
            raise failure
        fill(storage, value)

    sleeper.sleep(2)
    for tags in (TAGS, TAGS[::-1], ("kv_cache",)):
        with monkeypatch.context() as patch:
            patch.setattr(memory, "_fill", full)
            with pytest.raises(EngineOutOfMemoryError, match="gpu_memory_utilization or use sleep level 2") as info:
                sleeper.wake(tags)
        assert isinstance(info.value, MemoryError)
        assert sleeper.sleeping == BOTH
        assert sum(sleeper.resident_bytes().values()) == 0
    assert sleeper.wake(TAGS) == BOTH
    assert sleeper.resident_bytes() == FULL


def resident() -> int:
    return int(psutil.Process(os.getpid()).memory_info().rss)


def test_memory_of_a_threads_own_heap_goes(model: Model) -> None:
    """Where rank 0 lives in the caller's process, its calls run on threads, whose heaps glibc does not always trim."""

    def cycles() -> list[int]:
        torch.empty(30 * MIB, dtype=torch.uint8)  # from now on, blocks up to this size come from the heap
        sleeper = StorageMemory(model, [torch.zeros(16 * MIB, dtype=torch.uint8) for _ in range(2)])
        freed = []
        for _ in range(60):
            before = resident()
            sleeper.sleep(1)
            freed.append(before - resident())
            sleeper.wake(TAGS)
        return freed

    with ThreadPoolExecutor(1) as threads:
        freed = threads.submit(cycles).result()
    assert min(freed) > 28 * MIB, [size // MIB for size in freed]


@pytest.mark.parametrize("block", [64 * KIB, 8 * MIB], ids=["small blocks", "large blocks"])
def test_the_process_gets_smaller(block: int) -> None:
    count = 128 * MIB // block
    model = torch.nn.Module()
    # Else what ran before would leave pages to use again, or be freed meanwhile, and the process would not grow.
    gc.collect()
    memory._return_free_pages()
    before = resident()
    blocks = [torch.ones(block, dtype=torch.uint8) for _ in range(count)]
    for number, tensor in enumerate(blocks[::2]):
        model.register_parameter(f"p{number}", torch.nn.Parameter(tensor, requires_grad=False))
    sleeper = StorageMemory(model, blocks[1::2])
    held = resident() - before
    assert held > 100 * MIB
    for level, left in [(1, 0.5), (2, 0.0)]:
        sleeper.sleep(level)
        assert resident() - before < held * left + 0.1 * held
    sleeper.wake(TAGS)
    assert resident() - before > 0.9 * held
    sleeper.sleep(2)
    assert resident() - before < 0.1 * held


def test_out_of_memory_is_explained() -> None:
    ours = EngineOutOfMemoryError("ours")
    for error in (MemoryError("plain"), torch.OutOfMemoryError("device"), ours):
        with pytest.raises(EngineOutOfMemoryError) as info, out_of_memory_explained("loading weights"):
            raise error
        assert (info.value is ours) is (error is ours)
        assert error is ours or "out of memory while loading weights" in str(info.value)
    with pytest.raises(ZeroDivisionError), out_of_memory_explained("loading weights"):
        raise ZeroDivisionError


class FakePoolWorker:
    """Stands for a vLLM worker with a memory pool; notes what is asked of it, and loses what level 2 loses."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.model = torch.nn.Linear(2, 2, bias=False)
        self.model.register_buffer("table", torch.ones(3), persistent=False)
        self.model.scale = torch.tensor(2.0)
        self.model.alias = self.model.weight.data[0]
        self.kv_caches = [torch.ones(4), (torch.ones(2), torch.ones(2))]
        self.model_runner = self

    def get_model(self) -> torch.nn.Module:
        return self.model

    def sleep(self, level: int) -> None:
        self.calls.append(level)
        if level == 2:
            for tensor in (self.model.weight.data, self.model.table, self.model.scale):
                tensor.fill_(float("nan"))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(tags)


def test_the_pool_keeps_what_nobody_sends() -> None:
    worker = FakePoolWorker()
    pool = PoolMemory(worker)
    pool.sleep(2)
    assert worker.model.scale.isnan()
    pool.wake(["weights"])
    assert worker.model.table.tolist() == [1.0] * 3
    assert worker.model.scale.item() == 2.0
    assert worker.model.weight.isnan().all(), "the parameters and what shares their memory come with the update"
    assert worker.kv_caches[0].all()
    pool.wake(["kv_cache"])
    assert not any(tensor.any() for tensor in (worker.kv_caches[0], *worker.kv_caches[1]))


def test_the_pool_keeps_the_scales_of_the_kv_cache() -> None:
    """Which vLLM 0.12.0 sets to 1.0 when the cache wakes."""
    worker = FakePoolWorker()
    worker.model.attention = torch.nn.Module()
    worker.model.attention._k_scale = torch.tensor(0.25)
    wake_up = worker.wake_up

    def resetting(tags: list[str]) -> None:
        wake_up(tags)
        if "kv_cache" in tags:
            worker.model.attention._k_scale.fill_(1.0)

    worker.wake_up = resetting  # type: ignore[method-assign]
    pool = PoolMemory(worker)
    for level in (1, 2):
        pool.sleep(level)
        pool.wake(TAGS)
        assert worker.model.attention._k_scale.item() == 0.25


def test_the_pool_wakes_weights_first() -> None:
    worker = FakePoolWorker()
    pool = PoolMemory(worker)
    pool.sleep(2)
    pool.sleep(2)
    assert pool.sleeping == BOTH
    assert pool.wake(["kv_cache"]) == BOTH
    pool.sleep(1)
    assert pool.wake(["weights"]) == {"weights"}
    assert pool.wake(["weights"]) == frozenset()
    assert pool.wake(["kv_cache", "weights"]) == KV
    assert worker.calls == [2, ["weights"], ["kv_cache"], 1, ["weights"], ["kv_cache"]]


def test_a_neighbour_may_take_memory_meanwhile() -> None:
    worker = FakePoolWorker()
    pool = PoolMemory(worker)
    for message, known in (("Memory usage increased after sleeping.", True), ("something else", False)):
        worker.sleep = Mock(side_effect=AssertionError(message))  # type: ignore[method-assign]
        with contextlib.nullcontext() if known else pytest.raises(AssertionError):
            pool.sleep(2)
        assert pool.sleeping == (BOTH if known else frozenset())
        pool.wake(TAGS)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_the_pool_sleeps_again(first: int, second: int) -> None:
    worker = FakePoolWorker()
    pool = PoolMemory(worker)
    pool.sleep(first)
    pool.sleep(second)
    deeper = [["weights"], ["kv_cache"], second] if second > first else []
    assert worker.calls == [first, *deeper]
    pool.wake(["weights"])
    pool.sleep(second)
    assert pool.sleeping == BOTH
    assert worker.calls[-3:] == [["weights"], ["kv_cache"], second]
