"""Payloads: what goes in comes out, and everything else is one kind of error."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roll_vllm.errors import RollVllmError, WeightUpdateError
from roll_vllm.transfer.manifest import (
    ALIGNMENT,
    ELEMENT_SIZE,
    FORMAT,
    BucketManifest,
    Placement,
    TensorSpec,
    align,
    dtype_name,
    specs_from,
)

GOOD: dict[str, Any] = {
    "format": FORMAT,
    "segment": "/dev/shm/roll_vllm-1-ab",
    "size": 256,
    "tensors": [["a", "float32", [2, 3], 0], ["b", "bfloat16", [], 64], ["c", "int8", [0, 7], 128]],
}


def payload(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


def tensors(*entries: Any) -> bytes:
    return payload(tensors=list(entries))


# --- round trip ------------------------------------------------------------------------------------------


def test_round_trip() -> None:
    placements = []
    offset = 0
    for number, (dtype, size) in enumerate(ELEMENT_SIZE.items()):
        spec = TensorSpec(f"layers.{number}.größe", dtype, (number, 3))
        assert spec.nbytes == number * 3 * size
        placements.append(Placement(spec, offset))
        offset = align(placements[-1].end)
    manifest = BucketManifest("/dev/shm/roll_vllm-1-ab", offset, tuple(placements))
    encoded = manifest.encode()
    assert isinstance(encoded, bytes)
    assert BucketManifest.decode(encoded) == manifest
    assert BucketManifest.decode(encoded.decode()) == manifest


def test_empty_bucket() -> None:
    manifest = BucketManifest("/dev/shm/roll_vllm-1-ab", 0, ())
    assert BucketManifest.decode(manifest.encode()) == manifest


def test_a_payload_is_plain_json() -> None:
    manifest = BucketManifest.decode(payload())
    assert json.loads(manifest.encode()) == GOOD
    assert [str(placement.spec) for placement in manifest.placements] == [
        "a (float32, shape [2, 3])",
        "b (bfloat16, shape [])",
        "c (int8, shape [0, 7])",
    ]
    assert [placement.end for placement in manifest.placements] == [24, 66, 128]


def test_tensors_may_lie_anywhere() -> None:
    entries = [["late", "int16", [3], 250], ["same", "int16", [3], 250], ["early", "float64", [1], 8]]
    assert [p.offset for p in BucketManifest.decode(tensors(*entries)).placements] == [250, 250, 8]


# --- alignment -------------------------------------------------------------------------------------------


def test_align() -> None:
    for offset in range(3 * ALIGNMENT):
        aligned = align(offset)
        assert aligned % ALIGNMENT == 0
        assert 0 <= aligned - offset < ALIGNMENT
    assert all(ALIGNMENT % size == 0 for size in ELEMENT_SIZE.values())


@pytest.mark.parametrize("dtype", ELEMENT_SIZE)
def test_offsets_are_aligned_to_the_element(dtype: str) -> None:
    for offset in range(17):
        if offset % ELEMENT_SIZE[dtype]:
            with pytest.raises(WeightUpdateError, match=f"unaligned offset {offset}"):
                BucketManifest.decode(tensors(["a", dtype, [2], offset]))
        else:
            assert BucketManifest.decode(tensors(["a", dtype, [2], offset])).placements[0].offset == offset


# --- what is refused -------------------------------------------------------------------------------------

MALFORMED: dict[str, Any] = {
    "nothing": None,
    "a number": 7,
    "a list": ["a"],
    "an object": object(),
    "a dict": GOOD,
    "no bytes": b"",
    "zeros": bytes(100),
    "not JSON": b"hello",
    "half": payload()[:-9],
    "twice": payload() * 2,
    "not UTF-8": b'{"format": "\xff"}',
    "lone surrogate": payload().replace(b"roll_vllm.bucket/1", b"\\ud800"),
    "too deep": b"[" * 100_000,
    "too long a number": b'{"size": ' + b"9" * 100_000 + b"}",
    "JSON null": b"null",
    "JSON list": b"[]",
    "JSON text": b'"format"',
    "JSON number": b"1e999",
    "no format": json.dumps({k: v for k, v in GOOD.items() if k != "format"}).encode(),
    "no segment": json.dumps({k: v for k, v in GOOD.items() if k != "segment"}).encode(),
    "no size": json.dumps({k: v for k, v in GOOD.items() if k != "size"}).encode(),
    "no tensors": json.dumps({k: v for k, v in GOOD.items() if k != "tensors"}).encode(),
    "other format": payload(format="roll_vllm.bucket/2"),
    "format null": payload(format=None),
    "segment null": payload(segment=None),
    "segment list": payload(segment=["/dev/shm/roll_vllm-1-ab"]),
    "size text": payload(size="256"),
    "size fraction": payload(size=256.0),
    "size infinite": payload(size=float("inf")),
    "size NaN": payload(size=float("nan")),
    "size null": payload(size=None),
    "size negative": payload(size=-1, tensors=[]),
    "tensors null": payload(tensors=None),
    "tensors a number": payload(tensors=3),
    "tensors a dict": payload(tensors={"a": ["float32", [1], 0]}),
    "tensor null": tensors(None),
    "tensor text": tensors("abcd"),
    "tensor too short": tensors(["a", "float32", [1]]),
    "tensor too long": tensors(["a", "float32", [1], 0, 0]),
    "name null": tensors([None, "float32", [1], 0]),
    "name a number": tensors([3, "float32", [1], 0]),
    "name a list": tensors([["a"], "float32", [1], 0]),
    "dtype null": tensors(["a", None, [1], 0]),
    "dtype a list": tensors(["a", ["float32"], [1], 0]),
    "dtype unknown": tensors(["a", "complex64", [1], 0]),
    "dtype of another case": tensors(["a", "Float32", [1], 0]),
    "dtype an attribute": tensors(["a", "__class__", [1], 0]),
    "shape null": tensors(["a", "float32", None, 0]),
    "shape a number": tensors(["a", "float32", 1, 0]),
    "shape text": tensors(["a", "float32", "11", 0]),
    "shape a dict": tensors(["a", "float32", {"1": 1}, 0]),
    "shape of fractions": tensors(["a", "float32", [1.0], 0]),
    "shape of text": tensors(["a", "float32", ["1"], 0]),
    "shape infinite": tensors(["a", "float32", [float("inf")], 0]),
    "shape nested": tensors(["a", "float32", [[1]], 0]),
    "shape negative": tensors(["a", "float32", [-1], 0]),
    "shape negative twice": tensors(["a", "float32", [-2, -2], 0]),
    "shape empty and negative": tensors(["a", "float32", [0, -1], 0]),
    "shape too large": tensors(["a", "float32", [65], 0]),
    "shape huge": tensors(["a", "float32", [2**63, 2**63], 0]),
    "shape that wraps around": tensors(["a", "float32", [2**32, 2**32], 0]),
    "shape huge and empty": tensors(["a", "float32", [0, 2**63], 0]),
    "shape huge twice and empty": tensors(["a", "float32", [0, 2**40, 2**40], 0]),
    "offset text": tensors(["a", "float32", [1], "0"]),
    "offset fraction": tensors(["a", "float32", [1], 0.0]),
    "offset null": tensors(["a", "float32", [1], None]),
    "offset negative": tensors(["a", "float32", [1], -4]),
    "offset far negative": tensors(["a", "float32", [1], -(2**70)]),
    "offset at the end": tensors(["a", "float32", [1], 256]),
    "offset huge": tensors(["a", "float32", [1], 2**70]),
    "offset of nothing past the end": tensors(["a", "float32", [0], 260]),
    "one byte too many": tensors(["a", "int8", [9], 248]),
    "name with half a character": tensors(["\ud800", "float32", [1], 0]),
    "name too long": tensors(["a" * 1001, "float32", [1], 0]),
    "name huge": tensors(["a" * 1_000_000, "float32", [1], 0]),
    "dtype huge": tensors(["a", "a" * 1_000_000, [1], 0]),
    "shape of truths": tensors(["a", "float32", [True], 0]),
    "shape of too many": tensors(["a", "float32", [1] * 65, 0]),
    "shape of a million": tensors(["a", "float32", [1] * 1_000_000, 0]),
    "shape of long numbers": tensors(["a", "float32", [10**4000] * 1000, 0]),
    "offset false": tensors(["a", "float32", [1], False]),
    "offset that cannot be printed": tensors(["a", "float32", [1], 10**4300 - 4]),
    "size true": payload(size=True, tensors=[]),
    "segment huge": payload(segment=["a" * 1_000_000]),
    "format huge": payload(format="a" * 1_000_000),
    "name twice": tensors(["a", "float32", [1], 0], ["a", "float32", [1], 64]),
    "name twice, same place": tensors(["a", "float32", [1], 0], ["a", "float32", [1], 0]),
}


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED)
def test_malformed_payloads_are_one_kind_of_error(malformed: Any) -> None:
    with pytest.raises(WeightUpdateError) as info:
        BucketManifest.decode(malformed)
    assert isinstance(info.value, RollVllmError)
    assert isinstance(info.value, ValueError)
    assert len(str(info.value)) < 5000


@pytest.mark.parametrize(
    ("malformed", "message"),
    [
        ("not JSON", r"not a roll_vllm\.bucket/1 bucket .*pack it with roll_vllm\.BucketSender"),
        ("other format", r"format 'roll_vllm\.bucket/2'"),
        ("dtype unknown", r"'complex64' cannot be sent; send one of float64, float32"),
        ("shape too large", r"a \(float32, shape \[65\]\) should lie in bytes 0\.\.260 of its bucket, .* only 256"),
        ("shape negative", r"a \(float32, shape \[-1\]\): no tensor has this shape"),
        ("shape text", r"a: '11' is not a shape"),
        ("name a number", r"3 is not a tensor's name"),
        ("name twice", "a is listed twice in one bucket"),
    ],
)
def test_the_message_says_what_is_wrong(malformed: str, message: str) -> None:
    with pytest.raises(WeightUpdateError, match=message):
        BucketManifest.decode(MALFORMED[malformed])


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_never_loaded(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace), protocol)
    for received in (bomb, bytearray(bomb), bomb.decode("latin-1"), pickle.dumps(GOOD, protocol)):
        with pytest.raises(WeightUpdateError, match="Pickled payloads are never loaded"):
            BucketManifest.decode(received)
    assert not trace.exists()
    pickle.loads(bomb)
    assert trace.exists(), "the bomb does not work"


# --- dtypes ----------------------------------------------------------------------------------------------


class FakeDtype:
    """Prints like a torch dtype."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"torch.{self.name}"


@pytest.mark.parametrize("name", ELEMENT_SIZE)
def test_a_dtype_by_any_of_its_names(name: str) -> None:
    assert dtype_name(name) == dtype_name(f"torch.{name}") == dtype_name(FakeDtype(name)) == name


@pytest.mark.parametrize("dtype", ["", "torch.", "half", "float", "F32", "complex64", "torch.torch.int8", None, 4, []])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(WeightUpdateError, match="cannot be sent; send one of"):
        dtype_name(dtype)


# --- three parallel lists --------------------------------------------------------------------------------


def test_specs_from_lists() -> None:
    specs = specs_from(["a", "b"], [FakeDtype("bfloat16"), "torch.int8"], [[2, 3], ()])
    assert specs == [TensorSpec("a", "bfloat16", (2, 3)), TensorSpec("b", "int8", ())]
    assert specs_from(iter("ab"), iter(["int8"] * 2), iter([(1,), (2,)]))[1] == TensorSpec("b", "int8", (2,))
    assert specs_from([], [], []) == []


@pytest.mark.parametrize("counts", [(1, 2, 2), (2, 1, 2), (2, 2, 1), (0, 1, 1)])
def test_specs_from_uneven_lists(counts: tuple[int, int, int]) -> None:
    names, dtypes, shapes = counts
    with pytest.raises(WeightUpdateError, match=f"{names} names, {dtypes} dtypes, {shapes} shapes"):
        specs_from(["a"] * names, ["int8"] * dtypes, [[1]] * shapes)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("a", "complex64", [1]),
        ("a", None, [1]),
        ("a", "int8", ["x"]),
        ("a", "int8", "12"),
        ("a", "int8", None),
        ("a", "int8", 3),
        ("a", "int8", [1.5]),
        ("a", "int8", [-1]),
        ("a", "int8", [2**63]),
        (None, "int8", [1]),
        (7, "int8", [1]),
    ],
)
def test_specs_from_nonsense(name: Any, dtype: Any, shape: Any) -> None:
    with pytest.raises(WeightUpdateError):
        specs_from([name], [dtype], [shape])
