"""Payloads that are damaged, at the end of their way: a worker takes tensors inside of the segment, or one error."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from roll_vllm.errors import WeightUpdateError
from roll_vllm.transfer.shared_memory import Segment
from roll_vllm.worker.mapped import MappedBuckets
from roll_vllm.worker.runtime import WorkerRuntime

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from payload_fuzz import case

CASES = 10_000


def test_a_worker_receives() -> None:
    segment = Segment(256)
    segment.memory.copy_(torch.arange(256, dtype=torch.uint8))
    taken: list[list[tuple[str, torch.Tensor]]] = []
    mapped = MappedBuckets(torch.device("cpu"), lambda: None)
    worker: Any = SimpleNamespace(_worker=SimpleNamespace(rank=0), _mapped=mapped, _finish_copies=lambda: None)
    worker._take = lambda pairs, is_lora: taken.append(pairs)
    refused = 0
    for number in range(CASES):
        payload = case(number, str(segment.path))
        try:
            WorkerRuntime.receive_bucket(worker, [payload])
        except WeightUpdateError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}: {payload[:2000]!r}") from error
    assert refused > CASES // 2
    assert len(taken) == CASES - refused > CASES // 50
    for name, tensor in (pair for pairs in taken for pair in pairs):
        content = tensor.contiguous().flatten().view(torch.uint8)
        start = int(content[0]) if content.numel() else 0
        expected = torch.arange(start, start + content.numel(), dtype=torch.uint8)
        assert torch.equal(content, expected), f"{name} is not what lies in the segment"
