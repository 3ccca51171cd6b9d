"""Buffers across sleep level 2. The allocator needs CUDA: a stand-in poisons what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from on_vllm import SELECTED


class Allocator:
    """Stands in for CuMemAllocator: memory that is given back reads as NaN, and must not be written."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tensors = {"weights": [*model.parameters(), *model.buffers()], "kv_cache": [torch.zeros(2)]}
        self.asleep: dict[str, list[torch.Tensor] | None] = {}

    def sleep(self, offload_tags: Any) -> None:
        for tag, tensors in self.tensors.items():
            self.asleep[tag] = [t.clone() for t in tensors] if tag in offload_tags else None
            for tensor in tensors:
                tensor.data.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None = None) -> None:
        for tag in list(self.asleep) if tags is None else tags:
            for tensor, kept in zip(self.tensors[tag], self.asleep.pop(tag) or (), strict=False):
                tensor.data.copy_(kept)

    def check(self) -> None:
        if "weights" in self.asleep:
            assert all(tensor.isnan().all() for tensor in self.tensors["weights"]), "written while asleep"


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(3.0), requires_grad=False)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


@pytest.fixture(params=["v0", "v1"])
def worker(request: pytest.FixtureRequest, patched: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.device_allocator import cumem

    names = [f"{step}-buffers-{request.param}" for step in ("sleep-saves", "wake-restores", "wake-holds")]
    known = {patch.name for patch in SELECTED}
    names = [name for name in names if name in known]
    if not names:
        pytest.skip(f"this release has no {request.param} worker to patch")
    for name in names:
        owner = patched(name)
    model = Model()
    allocator = Allocator(model)
    monkeypatch.setattr(cumem.CuMemAllocator, "get_instance", staticmethod(lambda: allocator))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 30, 2 << 30))
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(model=model),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        _sleep_saved_buffers={},
        allocator=allocator,
    )
    worker.sleep = lambda level: owner.sleep(worker, level)
    worker.wake_up = lambda tags=None: owner.wake_up(worker, tags)
    return worker


def table(worker: Any) -> list[float]:
    return worker.model_runner.model.table.tolist()


@pytest.mark.parametrize("tags", [[None], [["weights"], ["kv_cache"]], [["kv_cache"], ["weights"]], [["weights"]]])
def test_level_two(worker: Any, tags: list[Any]) -> None:
    for _ in range(2):
        worker.sleep(2)
        for tag in tags:
            worker.wake_up(tag)
            worker.allocator.check()
        assert table(worker) == [0.0, 1.0, 2.0, 3.0]
        assert worker.model_runner.model.weight.isnan().all()
        worker.model_runner.model.weight.data.zero_()


def test_buffers_are_saved_anew(worker: Any) -> None:
    worker.sleep(2)
    worker.wake_up()
    worker.model_runner.model.table.fill_(7.0)
    worker.sleep(2)
    worker.wake_up()
    assert table(worker) == [7.0] * 4


def test_level_one(worker: Any) -> None:
    worker.sleep(1)
    worker.wake_up(["kv_cache"])
    worker.allocator.check()
    worker.wake_up(["weights"])
    assert table(worker) == [0.0, 1.0, 2.0, 3.0]
    assert worker.model_runner.model.weight.tolist() == [0.0, 1.0, 2.0]
