"""0.11.1: a worker that sees one device starts where 0.12.0's does. CUDA is a stand-in, which ends the start early."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class Started(Exception):
    """The device was chosen: init_device has passed its checks."""


@pytest.fixture
def init_device(monkeypatch: pytest.MonkeyPatch, patched: Callable[[str], Any]) -> Callable[..., Any]:
    from vllm.v1.worker import gpu_worker

    def chosen(device: Any) -> None:
        raise Started(str(device))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_worker, "current_platform", SimpleNamespace(set_device=chosen))

    def start(original: Any = None, **config: Any) -> Any:
        given = {
            "data_parallel_size": 1,
            "data_parallel_size_local": 1,
            "data_parallel_rank_local": 0,
            "data_parallel_backend": "mp",
            "distributed_executor_backend": "ray",
            "nnodes_within_dp": 1,
            "pipeline_parallel_size": 1,
            "tensor_parallel_size": 2,
            "local_world_size": 2,
            **config,
        }
        parallel = SimpleNamespace(**given)
        worker = SimpleNamespace(
            device_config=SimpleNamespace(device=torch.device("cuda")),
            parallel_config=parallel,
            vllm_config=SimpleNamespace(parallel_config=parallel),
            local_rank=0,
        )
        try:
            (original or gpu_worker.Worker.init_device)(worker)
        finally:
            assert worker.parallel_config is parallel

    start.original = vars(gpu_worker.Worker)["init_device"]  # type: ignore[attr-defined]
    patched("one-visible-device")
    return start


def test_upstream_refuses(init_device: Any) -> None:
    with pytest.raises(AssertionError, match="must be less than or equal to the number of visible devices"):
        init_device(init_device.original)


@pytest.mark.parametrize("backend", ["ray", "mp", "external_launcher"])
def test_one_visible_device(init_device: Any, backend: str) -> None:
    with pytest.raises(Started, match="cuda:0"):
        init_device(distributed_executor_backend=backend)


def test_under_data_parallelism_devices_are_counted(init_device: Any) -> None:
    with pytest.raises(AssertionError, match="must be less than or equal to the number of visible devices"):
        init_device(distributed_executor_backend="mp", data_parallel_size=2)


@pytest.mark.parametrize(
    "config",
    [
        {"distributed_executor_backend": "ray"},
        {"data_parallel_backend": "ray", "distributed_executor_backend": "mp"},
        {"nnodes_within_dp": 2, "distributed_executor_backend": "mp"},
        {"data_parallel_size_local": 0, "distributed_executor_backend": "mp"},
    ],
)
def test_but_not_where_each_rank_has_its_own(init_device: Any, config: dict[str, Any]) -> None:
    with pytest.raises(Started):
        init_device(data_parallel_size=2, **config)
