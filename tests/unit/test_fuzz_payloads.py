"""A hundred thousand payloads: each is decoded to what it says, or is one kind of error, at a cost like its length."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from payload_fuzz import case

from roll_vllm.errors import WeightUpdateError
from roll_vllm.transfer import shared_memory
from roll_vllm.transfer.manifest import ELEMENT_SIZE, FORMAT, BucketManifest

CASES = 120_000
SHARES = 5
SIZE = 256
TRACED = 8
"""Of so many cases one is decoded with its memory traced, which takes five times as long."""
SECONDS = 5.0
"""Far more than a case takes on the slowest machine, and less than any that grows faster than its payload."""


def bytes_allowed(payload: bytes) -> int:
    """The most memory that decoding may take: what Python needs for the smallest pieces of JSON, and for an error."""
    return 200_000 + 150 * len(payload)


def whole_number(value: Any) -> bool:
    return type(value) is int


def numbers_of(found: Any) -> list[int]:
    """Every whole number anywhere in a document."""
    numbers, rest = [], [found]
    while rest:
        one = rest.pop()
        if whole_number(one):
            numbers.append(one)
        elif isinstance(one, list):
            rest += one
        elif isinstance(one, dict):
            rest += one.values()
    return numbers


def reference(payload: bytes) -> tuple[str, int, list[tuple[Any, ...]]] | None:
    """What a payload says, decoded in another way; None if it says nothing that could be loaded."""
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or any(abs(number) >= 10**20 for number in numbers_of(found)):
        return None
    if any(number <= -(10**19) for number in numbers_of(found)):  # with its sign, as long as a larger positive one
        return None
    if not {"format", "segment", "size", "tensors"} <= found.keys() or found["format"] != FORMAT:
        return None
    segment, size, tensors = found["segment"], found["size"], found["tensors"]
    if not isinstance(segment, str) or not whole_number(size) or size < 0:
        return None
    if isinstance(tensors, (str, dict)) and not tensors:
        tensors = []  # nothing, however it is written
    if not isinstance(tensors, list):
        return None
    result: list[tuple[Any, ...]] = []
    for tensor in tensors:
        if not isinstance(tensor, list) or len(tensor) != 4:
            return None
        name, dtype, shape, offset = tensor
        if not isinstance(name, str) or len(name) > 1000 or name in {one[0] for one in result}:
            return None
        try:
            name.encode()
        except UnicodeEncodeError:
            return None
        if isinstance(shape, (str, dict)) and not shape:
            shape = []
        if not isinstance(dtype, str) or not isinstance(shape, list) or not all(map(whole_number, shape)):
            return None
        dtype = dtype[6:] if dtype.startswith("torch.") else dtype
        if dtype not in ELEMENT_SIZE or len(shape) > 64 or not whole_number(offset):
            return None
        count = extent = ELEMENT_SIZE[dtype]
        for length in shape:
            if length < 0:
                return None
            count, extent = count * length, extent * (length or 1)
        if extent >= 2**63 or offset < 0 or offset % ELEMENT_SIZE[dtype] or offset + count > size:
            return None
        result.append((name, dtype, tuple(shape), offset))
    return segment, size, result


@pytest.fixture
def segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A segment, beside what is none although it is named like one."""
    monkeypatch.setenv("ROLL_VLLM_SHM_DIR", str(tmp_path / "shm"))
    monkeypatch.setattr(shared_memory, "_map", lambda path, size: (path, size))  # torch, which is not here
    (tmp_path / "shm" / "x").mkdir(parents=True)
    (tmp_path / "shm" / "roll_vllm-1-aa").mkdir()
    (tmp_path / "shm" / "roll_vllm-1-bb").symlink_to("/etc/passwd")
    path = tmp_path / "shm" / "roll_vllm-1-ab"
    path.write_bytes(bytes(SIZE))
    return str(path)


def check(payload: bytes, segment: str, traced: bool = True) -> bool:
    """Decode a payload in all ways, and return whether it is good."""
    wanted = reference(payload)
    if traced:
        tracemalloc.start()
    begun = time.thread_time()
    manifest, message = None, ""
    try:
        manifest = BucketManifest.decode(payload)
    except WeightUpdateError as error:
        message = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()  # 0 if it is not traced
        tracemalloc.stop()
    assert time.thread_time() - begun < SECONDS
    message.encode()  # as it must be to travel to the caller
    assert len(message) < 5000, f"a message of {len(message)} characters"
    assert peak <= bytes_allowed(payload), f"{peak} bytes taken"
    if manifest is None:
        assert wanted is None, "a good payload is refused"
        return False
    found = [(p.spec.name, p.spec.dtype, p.spec.shape, p.offset) for p in manifest.placements]
    assert (manifest.segment, manifest.size, found) == wanted
    mapped: Any = None
    try:
        mapped = shared_memory.attach(manifest.segment, manifest.size)
    except WeightUpdateError as error:
        str(error).encode()
    if mapped is None:
        assert manifest.segment != segment or manifest.size > SIZE, "the segment is refused"
    else:
        path, size = mapped
        assert os.path.realpath(path) == os.path.realpath(segment), f"{path} is mapped"
        assert size == manifest.size <= SIZE
    return True


@pytest.mark.parametrize("share", range(SHARES))
def test_payloads(segment: str, share: int) -> None:
    good = 0
    for number in range(share, CASES, SHARES):
        payload = case(number, segment, SIZE)
        try:
            good += check(payload, segment, traced=number % TRACED == 0)
        except Exception as error:
            shown = payload if len(payload) < 2000 else payload[:500] + b"..."
            raise AssertionError(
                f"case {number}: {type(error).__name__}: {error}\n"
                f"replay: check(case({number}, segment, {SIZE}), segment); {len(payload)} bytes: {shown!r}"
            ) from error
    # Both kinds, or the cases would prove little.
    assert CASES // SHARES // 20 < good < CASES // SHARES // 2


def test_cases_are_the_same_every_time() -> None:
    first = [case(number, "/dev/shm/roll_vllm-1-ab") for number in range(500)]
    assert first == [case(number, "/dev/shm/roll_vllm-1-ab") for number in range(500)]
    assert len(set(first)) > 450


@pytest.mark.parametrize("defect", ["another error", "memory", "another value", "a message of any length"])
def test_a_decoder_with_a_defect_is_found(segment: str, monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    decode = BucketManifest.decode

    def broken(payload: bytes) -> BucketManifest:
        if defect == "memory":
            bytearray(10_000_000)
        try:
            manifest = decode(payload)
        except WeightUpdateError as error:
            if defect == "another error":
                raise ValueError(str(error)) from None
            raise WeightUpdateError(str(error) * 1000) if defect == "a message of any length" else error from None
        if defect == "another value":
            return BucketManifest(manifest.segment, manifest.size + 1, manifest.placements)
        return manifest

    monkeypatch.setattr(BucketManifest, "decode", broken)
    with pytest.raises(AssertionError, match=r"(?s)case \d+: .*\nreplay: "):
        test_payloads(segment, 0)
