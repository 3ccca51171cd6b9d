"""What a transfer holds: names, dtypes, shapes and places, as plain JSON.

Payloads come from another process, so nothing here unpickles: a payload is parsed, checked field by field,
and refused with one error when it does not fit together.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from operator import index
from typing import Any

from roll_vllm.errors import WeightUpdateError

FORMAT = "roll_vllm.bucket/1"
ALIGNMENT = 64  # bytes; a cache line, and a multiple of every element size
_MOST_BYTES = 2**63 - 1  # torch counts with 64 bits, also past a size of 0
_MOST_DIMENSIONS = 64  # of torch's kernels
_LONGEST_NAME = 1000  # characters
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")
_MOST_DIGITS = 20  # of a number in a payload: more than 64 bits have, and few enough to be multiplied and printed

#: Where a segment may lie.
MEMORIES = ("host", "device")

#: Element size in bytes of every dtype that may travel, by its torch name.
ELEMENT_SIZE: Mapping[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


def dtype_name(dtype: Any) -> str:
    """The torch name of ``dtype`` (``torch.bfloat16``, ``"torch.bfloat16"`` or ``"bfloat16"``).

    Raises:
        WeightUpdateError: no tensor of that dtype may travel.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in ELEMENT_SIZE:
        raise WeightUpdateError(
            f"dtype {shown(dtype)} cannot be sent; send one of {', '.join(ELEMENT_SIZE)} "
            "(cast the tensor first, or give the dtype by its torch name)"
        )
    return name


def shown(value: Any) -> str:
    """What a message says of a value that may be anything, of any size."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = 8


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be sent: checkpoint name, torch dtype name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def checked(cls, name: Any, dtype: Any, shape: Any) -> TensorSpec:
        """A spec from values that may be anything.

        Raises:
            WeightUpdateError: they are not the name, dtype and shape of a tensor.
        """
        try:
            spec = cls(name, dtype_name(dtype), tuple(map(_whole, shape)))
        except TypeError as error:
            label = name if _is_text(name) else shown(name)
            raise WeightUpdateError(f"{label}: {shown(shape)} is not a shape; give a list of whole numbers") from error
        if not _is_text(name):
            raise WeightUpdateError(
                f"{shown(name)} is not a tensor's name; give a string of at most {_LONGEST_NAME} characters"
            )
        if len(spec.shape) > _MOST_DIMENSIONS:
            raise WeightUpdateError(
                f"{name}: a tensor has at most {_MOST_DIMENSIONS} dimensions, got {len(spec.shape)}"
            )
        sizes = (max(size, 1) for size in spec.shape)
        if min(spec.shape, default=0) < 0 or prod(sizes) * ELEMENT_SIZE[spec.dtype] > _MOST_BYTES:
            raise WeightUpdateError(f"{spec}: no tensor has this shape")
        return spec

    @property
    def nbytes(self) -> int:
        """Size in bytes of the contiguous tensor."""
        return prod(self.shape) * ELEMENT_SIZE[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype}, shape {list(self.shape)})"


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{value} is no number")
    return index(value)


def _is_text(name: Any) -> bool:
    """Whether it is a text that may be part of any message: not too long, and such that UTF-8 has it."""
    return isinstance(name, str) and len(name) <= _LONGEST_NAME and not _HALF_A_PAIR.search(name)


def specs_from(names: Iterable[str], dtypes: Iterable[Any], shapes: Iterable[Iterable[int]]) -> list[TensorSpec]:
    """Build specs from ROLL's three parallel lists.

    Raises:
        WeightUpdateError: the lists differ in length, or an entry is not a name, dtype or shape.
    """
    columns: tuple[list[Any], ...] = (list(names), list(dtypes), list(shapes))
    if len({len(column) for column in columns}) != 1:
        counts = ", ".join(f"{len(c)} {label}" for c, label in zip(columns, ("names", "dtypes", "shapes"), strict=True))
        raise WeightUpdateError(f"names, dtypes and shapes must have one entry per tensor, got {counts}")
    return [TensorSpec.checked(*column) for column in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Placement:
    """One tensor of a bucket and its first byte in the segment."""

    spec: TensorSpec
    offset: int

    @property
    def end(self) -> int:
        """The byte after the tensor's last one."""
        return self.offset + self.spec.nbytes


@dataclass(frozen=True)
class BucketManifest:
    """The content of one bucket: a segment of shared memory and the tensors laid out in it.

    Attributes:
        segment: path of the file behind the segment.
        size: length of the segment in bytes.
        placements: the tensors; they may lie anywhere inside the segment, aligned to their element size.
        memory: what the file is: the segment itself in the ``host``'s memory, or the name of one on a ``device``.
        kept: whether the sender uses the segment again for the next update.
    """

    segment: str
    size: int
    placements: tuple[Placement, ...]
    memory: str = "host"
    kept: bool = False

    def encode(self) -> bytes:
        """The manifest as UTF-8 JSON, to be passed to ``update_parameter_in_bucket``."""
        tensors = [[p.spec.name, p.spec.dtype, list(p.spec.shape), p.offset] for p in self.placements]
        document: dict[str, Any] = {"format": FORMAT, "segment": self.segment, "size": self.size, "tensors": tensors}
        if self.memory != "host":
            document |= {"memory": self.memory, "kept": self.kept}
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, payload: Any) -> BucketManifest:
        """Parse and check a payload.

        Raises:
            WeightUpdateError: the payload is not one of ours, or its parts do not fit together.
        """
        try:
            document = json.loads(payload, parse_int=_integer)
            if document["format"] != FORMAT:
                raise ValueError(f"format {shown(document['format'])}")
            placements = tuple(
                Placement(TensorSpec.checked(name, dtype, shape), _whole(offset))
                for name, dtype, shape, offset in document["tensors"]
            )
            memory, kept = document.get("memory", "host"), document.get("kept", False)
            manifest = cls(document["segment"], _whole(document["size"]), placements, memory, kept)
            if not isinstance(manifest.segment, str) or manifest.size < 0:
                raise ValueError(f"segment {shown(manifest.segment)} of {manifest.size} bytes")
            if memory not in MEMORIES or not isinstance(kept, bool):
                raise ValueError(f"memory {shown(memory)}, kept {shown(kept)}")
        except WeightUpdateError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise WeightUpdateError(
                f"the payload is not a {FORMAT} bucket ({type(error).__name__}: {error}); pack it with "
                "roll_vllm.BucketSender or roll_vllm.serialize_named_weights. Pickled payloads are never loaded"
            ) from error
        manifest.check()
        return manifest

    def check(self) -> None:
        """Look whether the tensors fit into the segment.

        Raises:
            WeightUpdateError: they do not, or one is there twice.
        """
        seen: set[str] = set()
        for placement in self.placements:
            spec = placement.spec
            if spec.name in seen:
                raise WeightUpdateError(f"{spec.name} is listed twice in one bucket; send each tensor once")
            seen.add(spec.name)
            if placement.offset % ELEMENT_SIZE[spec.dtype]:
                raise WeightUpdateError(f"{spec}: unaligned offset {placement.offset}")
            if not 0 <= placement.offset <= placement.end <= self.size:
                raise WeightUpdateError(
                    f"{spec} should lie in bytes {placement.offset}..{placement.end} of its bucket, which has only "
                    f"{self.size}: the bucket does not match its metadata; pack it again"
                )


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def align(offset: int) -> int:
    """The first aligned byte at or after ``offset``."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
