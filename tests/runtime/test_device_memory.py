"""Buckets on a device: what a worker takes for one, and how long it holds on to it. The device is made up here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from roll_vllm import BucketSender
from roll_vllm.errors import ConfigurationError, WeightUpdateError
from roll_vllm.transfer import device_memory
from roll_vllm.transfer.manifest import BucketManifest, Placement, TensorSpec
from roll_vllm.transfer.shared_memory import Segment
from roll_vllm.worker.mapped import MappedBuckets

CPU = torch.device("cpu")
SPEC = TensorSpec("w", "float32", (4,))


def note(text: bytes) -> Segment:
    """A file as a sender writes it for memory of its device."""
    segment = Segment(device_memory._NOTE_BYTES)
    segment.memory.copy_(torch.frombuffer(bytearray(text.ljust(device_memory._NOTE_BYTES)), dtype=torch.uint8))
    return segment


def payload(segment: Segment, *, kept: bool) -> bytes:
    return BucketManifest(str(segment.path), 16, (Placement(SPEC, 0),), "device", kept).encode()


@pytest.mark.parametrize("kept", [False, True])
def test_payloads_say_where_they_lie(kept: bool) -> None:
    manifest = BucketManifest.decode(BucketManifest("x", 16, (Placement(SPEC, 0),), "device", kept).encode())
    assert (manifest.memory, manifest.kept) == ("device", kept)
    assert BucketManifest.decode(BucketManifest("x", 16, ()).encode()).memory == "host"


@pytest.mark.parametrize("change", [{"memory": "disk"}, {"memory": ["device"]}, {"memory": None}, {"kept": "yes"}])
def test_other_places_are_refused(change: dict[str, Any]) -> None:
    document = {**json.loads(BucketManifest("x", 16, (Placement(SPEC, 0),), "device").encode()), **change}
    with pytest.raises(WeightUpdateError, match=r"not a roll_vllm\.bucket/1 bucket"):
        BucketManifest.decode(json.dumps(document))


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\xff\xfe", b"[]", b"7", b"{}", b'{"device": "GPU"}', b'{"device": "GPU", "handle": "xyz"}',
        b'{"device": "GPU", "handle": "00"}', b'{"device": 7, "handle": "' + 64 * b"00" + b'"}', 500 * b"[",
    ],
)  # fmt: skip
def test_malformed_names(text: bytes) -> None:
    segment = note(text)
    with pytest.raises(WeightUpdateError, match="names no device memory"):
        device_memory.attach(str(segment.path), 16, CPU)


def test_a_worker_elsewhere_refuses() -> None:
    segment = note(json.dumps({"device": "1f0a", "handle": "00" * 64}).encode())
    with pytest.raises(WeightUpdateError, match=r"on the device '1f0a', and this worker has a cpu: .*via_host=True"):
        MappedBuckets(CPU, lambda: None).pairs(payload(segment, kept=False))


def test_cpus_share_no_device_memory() -> None:
    assert not device_memory.shareable(CPU)
    assert device_memory.identity(CPU) == ""
    with pytest.raises(ConfigurationError, match="only CPU tensors can be shared"):
        BucketSender(via_host=True).share({"w": torch.ones(4, device="meta")})


@pytest.mark.parametrize(("failing", "text"), [("open", "cannot map the sender's"), ("size", "cannot tell how long")])
def test_what_the_runtime_refuses_is_explained(monkeypatch: pytest.MonkeyPatch, failing: str, text: str) -> None:
    def refuse(*arguments: Any) -> int:
        raise device_memory.DeviceMemoryError("cudaCall", 1, "invalid argument")

    closed: list[int] = []
    calls = {"open": lambda handle: 7, "size": refuse, "close": closed.append, failing: refuse}
    monkeypatch.setattr(device_memory, "_runtime", lambda: SimpleNamespace(**calls))
    monkeypatch.setattr(device_memory, "_on", nullcontext)
    monkeypatch.setattr(device_memory, "identity", lambda device: "1f0a")
    segment = note(json.dumps({"device": "1f0a", "handle": "00" * 64}).encode())
    with pytest.raises(WeightUpdateError, match=rf"{text} .*invalid argument \(1\).*via_host=True"):
        device_memory.attach(str(segment.path), 16, torch.device("cuda", 0))
    assert closed == ([7] if failing == "size" else [])


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[MappedBuckets, list[str]]]:
    """Buckets whose device memory is a stand-in, and what was forgotten."""

    def make() -> tuple[MappedBuckets, list[str]]:
        forgotten: list[str] = []
        monkeypatch.setattr(
            device_memory, "attach", lambda path, size, device: torch.empty(size, dtype=torch.uint8, device="meta")
        )
        return MappedBuckets(CPU, lambda: forgotten.append("")), forgotten

    return make


def test_a_bucket_goes_after_the_update(mapped: Callable[..., tuple[MappedBuckets, list[str]]]) -> None:
    buckets, forgotten = mapped()
    pairs = buckets.pairs(payload(note(b"{}"), kept=False))
    assert [(name, tensor.shape) for name, tensor in pairs] == [("w", (4,))]
    assert buckets.holds(pairs)
    buckets.end_of_update()
    assert not buckets.holds(pairs)
    assert forgotten


def test_a_kept_bucket_stays_until_its_sender_closes(mapped: Callable[..., tuple[MappedBuckets, list[str]]]) -> None:
    buckets, _ = mapped()
    segment = note(b"{}")
    sent = payload(segment, kept=True)
    pairs = buckets.pairs(sent)
    buckets.end_of_update()
    time.sleep(0.6)
    assert buckets.pairs(sent) is pairs
    segment.close()
    assert not Path(segment.path).exists()
    end = time.monotonic() + 10
    while buckets.holds(pairs) and time.monotonic() < end:
        time.sleep(0.05)
    assert not buckets.holds(pairs), "the sender is gone, and its memory is still mapped"


def test_nothing_goes_while_it_is_used(mapped: Callable[..., tuple[MappedBuckets, list[str]]]) -> None:
    buckets, _ = mapped()
    segment = note(b"{}")
    with buckets.lock:
        pairs = buckets.pairs(payload(segment, kept=True))
        segment.close()
        time.sleep(0.6)
        assert buckets.holds(pairs)
