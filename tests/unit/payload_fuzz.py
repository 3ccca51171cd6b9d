"""Payloads that a trainer gone wrong, or somebody else, might send: case ``n`` is the same bytes every time."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from roll_vllm.transfer.manifest import ELEMENT_SIZE, FORMAT

DTYPES = tuple(ELEMENT_SIZE)
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 3, 63, 64, 65, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**19, 10**20, -(10**19), 10**60,
    10**4299, True, False, 0.0, 1.5, 1e300, float("inf"), float("nan"),
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", "a", "0", "\0", "\n", "größe", "\ud800", "\udfff\ud800", "x" * 1000, "x" * 1001, "x" * 5000, "__class__",
    "float32", "torch.int8", "object", "{0}", "%s%n", "../../etc/passwd", FORMAT, FORMAT.upper(),
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, [], {}, [[]], [None], {"a": 1}, [1] * 64, [1] * 65, [0] * 300, [1, 2**62, 4], [2**62, 0], [-1, 0], ["1"],
    [[1]], {"__reduce__": ["os.system", "true"]}, {"format": FORMAT},
)  # fmt: skip
NASTY = NUMBERS + TEXTS + OTHERS


def document(random: random.Random, segment: str, size: int) -> dict[str, Any]:
    """What a sender would write, most of the time such that it fits."""
    tensors = []
    for number in range(random.randrange(4)):
        shape = [random.randrange(5) for _ in range(random.randrange(4))]
        tensors.append([f"layers.{number}.weight", random.choice(DTYPES), shape, 64 * random.randrange(size // 64)])
    return {"format": FORMAT, "segment": segment, "size": size, "tensors": tensors}


def paths(segment: str) -> tuple[str, ...]:
    """Other names of the segment, and names of what is no segment."""
    directory, _, name = segment.rpartition("/")
    return (
        f"{directory}//{name}", f"{directory}/./{name}", f"{directory}/x/../{name}", f"{directory}/{name}/", name,
        f"{directory}/../{name}", f"{directory}/{name}\n", f"{directory}/{name}\0", f"{directory}/{name}.new",
        f"{directory}/roll_vllm-1-ff", f"{directory}/roll_vllm-1-aa", f"{directory}/roll_vllm-1-bb",
        f"{directory}/roll_vllm-1-{'a' * 300}", "/" * 5000 + segment, "/etc/passwd", "/dev/zero", "/proc/self/mem", "",
        f"{directory}/" + "a/" * 3000 + name, f"~/{name}", f"file://{segment}", f"{directory}/\u202e{name}",
    )  # fmt: skip


def _spot(random: random.Random, found: Any) -> tuple[Any, Any]:
    """A container inside of a document, and one of its keys."""
    while True:
        keys = list(found) if isinstance(found, dict) else range(len(found))
        key = random.choice(keys)
        inner = found[key]
        if not isinstance(inner, (dict, list)) or not inner or random.random() < 0.3:
            return found, key
        found = inner


def _replace(random: random.Random, whole: dict[str, Any], segment: str) -> None:
    container, key = _spot(random, whole)
    container[key] = deepcopy(random.choice(NASTY))


def _remove(random: random.Random, whole: dict[str, Any], segment: str) -> None:
    container, key = _spot(random, whole)
    del container[key]


def _repeat(random: random.Random, whole: dict[str, Any], segment: str) -> None:
    container, key = _spot(random, whole)
    if isinstance(container, list):
        container.insert(random.randrange(len(container) + 1), deepcopy(container[key]))
    else:
        container[str(random.choice(TEXTS))] = deepcopy(container[key])


def _reach(random: random.Random, whole: dict[str, Any], segment: str) -> None:
    """Another size or offset, around the edges of what is there."""
    if whole["tensors"] and random.random() < 0.7:
        random.choice(whole["tensors"])[3] = random.randrange(-8, int(whole["size"]) + 8)
    else:
        whole["size"] = random.randrange(-8, 2 * int(whole["size"]))


def _elsewhere(random: random.Random, whole: dict[str, Any], segment: str) -> None:
    whole["segment"] = random.choice(paths(segment))


STRUCTURE: tuple[Callable[[random.Random, dict[str, Any], str], None], ...] = (
    _replace, _replace, _replace, _remove, _repeat, _reach, _reach, _elsewhere,
)  # fmt: skip


def _bytes(random: random.Random, payload: bytes) -> bytes:
    """The payload, damaged on its way."""
    at, end = sorted(random.randrange(len(payload) + 1) for _ in range(2))
    kind = random.randrange(9)
    if kind == 0:
        return payload[:at]
    if kind == 1:
        return payload[at:]
    if kind == 2:
        return payload[:at] + payload[end:]
    if kind == 3:
        return payload[:end] + payload[at:]
    if kind == 4:
        return payload[:at] + random.randbytes(random.randrange(1, 9)) + payload[at:]
    if kind == 5:
        return (
            payload[:at]
            + random.choice([b"[", b"{", b'"', b"}", b"]", b"\\", b"\xff", b"\0", b"9" * 30])
            + payload[at:]
        )
    if kind == 6:
        return payload.decode(errors="replace").encode(random.choice(["utf-16", "utf-32", "utf-16-be", "utf-8-sig"]))
    damaged = bytearray(payload)
    for _ in range(random.choice([1, 1, 1, 2, 8])):
        damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    return bytes(damaged)


def _foreign(random: random.Random, whole: dict[str, Any]) -> bytes:
    """Something else altogether."""
    kind = random.randrange(8)
    if kind == 0:
        return random.randbytes(random.randrange(200))
    if kind == 1:
        return pickle.dumps(whole, random.randrange(pickle.HIGHEST_PROTOCOL + 1))
    if kind == 2:
        return b"cos\nsystem\n(S'exit 1'\ntR."
    if kind == 3:
        deep = random.choice([500, 2000, 20_000])
        opening, closing = random.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'{"format":[', b"]}")])
        return opening * deep + b"1" + closing * deep
    if kind == 4:
        return b'{"size": ' + b"9" * random.choice([18, 19, 20, 21, 4299, 4301, 50_000]) + b"}"
    if kind == 5:
        return json.dumps([whole] * random.randrange(4)).encode()
    if kind == 6:
        return json.dumps(random.choice(NASTY)).encode()
    return b"\x93NUMPY\x01\x00v\x00" + random.randbytes(64)


def case(number: int, segment: str, size: int = 256) -> bytes:
    """One payload.

    Args:
        number: which.
        segment: path of a segment that exists.
        size: its length in bytes, a multiple of 64.
    """
    source = random.Random(number)
    whole = document(source, segment, size)
    kind = source.random()
    if kind < 0.06:
        return _foreign(source, whole)
    if kind < 0.7:
        for _ in range(source.choice([1, 1, 1, 2, 3])):
            try:
                source.choice(STRUCTURE)(source, whole, segment)
            except (TypeError, KeyError, IndexError, ValueError, OverflowError):
                break  # an earlier change took away what this one would change
    payload = json.dumps(whole, ensure_ascii=source.random() < 0.9).encode(errors="surrogatepass")
    return _bytes(source, payload) if 0.6 < kind < 0.95 else payload
