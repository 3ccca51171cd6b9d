"""A checksum sees every bit of every tensor a model holds."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
import xxhash

from roll_vllm.transfer.manifest import ELEMENT_SIZE
from roll_vllm.worker import checksums
from roll_vllm.worker.checksums import checksum, model_checksums, named_tensors


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [name for name in ELEMENT_SIZE if name != "bool"])
def test_the_bytes_count(dtype: str) -> None:
    raw = random_bytes(96)
    expected = xxhash.xxh3_64_hexdigest(bytes(raw.tolist()))
    tensor = raw.view(getattr(torch, dtype))
    assert checksum(tensor) == checksum(tensor.view(3, -1)) == expected


def test_bool_scalar_and_nothing() -> None:
    assert checksum(torch.tensor([True, False])) == xxhash.xxh3_64_hexdigest(b"\1\0")
    assert checksum(torch.tensor(7, dtype=torch.int16)) == xxhash.xxh3_64_hexdigest(b"\7\0")
    assert checksum(torch.empty(0, 3)) == xxhash.xxh3_64_hexdigest(b"")


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.T.contiguous().T,
        lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
        lambda t: torch.cat([t, t])[: len(t)],
        lambda t: torch.cat([t, t])[len(t) :],
        lambda t: torch.nn.Parameter(t),
    ],
)
def test_the_layout_does_not_count(layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = torch.arange(12.0).view(3, 4)
    assert checksum(layout(tensor)) == checksum(tensor)
    assert checksum(tensor.T) != checksum(tensor)
    assert checksum(torch.ones(1).expand(5)) == checksum(torch.ones(5))


def test_every_bit_counts() -> None:
    tensor = random_bytes(8)
    sums = {checksum(tensor)}
    for byte in range(8):
        for bit in range(8):
            changed = tensor.clone()
            changed[byte] ^= 1 << bit
            sums.add(checksum(changed))
    assert len(sums) == 65
    assert checksum(torch.tensor(0.0)) != checksum(torch.tensor(-0.0))
    assert checksum(torch.tensor(torch.nan)) == checksum(torch.tensor(torch.nan))


def test_storages_stay_resizable() -> None:
    tensor = torch.ones(100)
    checksum(tensor)
    assert tensor.untyped_storage().resizable()


class Holder(torch.nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0))
        self.tied = self.weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.register_buffer("absent", None)
        self.plain = torch.full((2,), 7)
        self.kv_cache = torch.zeros(5)
        self.not_a_tensor = "text"


def test_everything_a_model_holds() -> None:
    model = torch.nn.Module()
    model.inner = Holder()
    model.scale = torch.tensor(0.5)
    names = [name for name, _ in named_tensors(model)]
    assert sorted(names) == ["inner.kept", "inner.passing", "inner.plain", "inner.tied", "inner.weight", "scale"]
    sums = model_checksums(model)
    assert sums == {name: checksum(tensor) for name, tensor in named_tensors(model)}
    assert sums["inner.tied"] == sums["inner.weight"]
    model.inner.passing[1] = 2
    changed = model_checksums(model)
    assert {name for name in sums if sums[name] != changed[name]} == {"inner.passing"}


def test_tied_tensors_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Mock(return_value="sum")
    monkeypatch.setattr(checksums, "checksum", counting)
    assert set(model_checksums(Holder()).values()) == {"sum"}
    assert counting.call_count == 4


def test_views_of_one_memory_are_told_apart() -> None:
    model = torch.nn.Module()
    memory = random_bytes(64)
    model.bytes, model.words = memory[:8], memory.view(torch.int64)
    model.first, model.last, model.column = memory[:16], memory[48:], memory[::4]
    assert model_checksums(model) == {name: checksum(tensor) for name, tensor in named_tensors(model)}
    assert len(set(model_checksums(model).values())) == 5
