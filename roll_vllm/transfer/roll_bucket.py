"""ROLL's own buckets, which are pickles: read without unpickling, and only if the engine's owner wants that.

What ROLL's trainer sends is a pickled dictionary: ``tensors_meta``, a list with name, shape, dtype and place of each
tensor, and ``bucket``, one int8 tensor that holds them all, as a handle of device memory; or, instead of it,
``bucket_bytes`` with the memory itself. Of the pickle language, :func:`load` knows what such a dictionary consists of.
It looks no name up and calls nothing: a name is compared with those that ROLL's pickles have, and the handle of the
bucket is opened by torch after each of its fields was checked.
"""

from __future__ import annotations

import os
import pickletools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from roll_vllm.errors import ConfigurationError, WeightUpdateError
from roll_vllm.transfer.manifest import ELEMENT_SIZE, BucketManifest, Placement, TensorSpec, shown

if TYPE_CHECKING:
    import torch

SWITCH = "ROLL_VLLM_ALLOW_ROLL_BUCKETS"
"""The variable that lets an engine's workers take such payloads: ``1``."""

_PUSHED = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BININT", "BININT1",
    "BININT2", "LONG1",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Mapping[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_HANDLES = {
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
    ("roll.utils.send_recv_utils", "_rebuild_cuda_tensor_modified"),
}
_ADMITTED = {
    *_HANDLES,
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch.storage", "TypedStorage"),
    ("torch.storage", "UntypedStorage"),
    *(("torch", dtype) for dtype in ELEMENT_SIZE),
}

_COUNTER_FILE = re.compile(rb"/torch_[0-9_]+")
_COUNTERS = 10_000  # of torch, in one such file


@dataclass(frozen=True)
class _Name:
    """What a pickle calls by its name; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False, repr=False)  # arguments may hold each other many times over
class _Call:
    function: _Name
    arguments: tuple[Any, ...]


def is_pickle(payload: bytes) -> bool:
    """Whether a payload is a pickle, and none of our own, which are JSON."""
    return payload[:1] == b"\x80"


def allowed() -> bool:
    """Whether this process may take ROLL's buckets.

    Raises:
        ConfigurationError: :data:`SWITCH` is neither ``1`` nor ``0``.
    """
    value = os.environ.get(SWITCH, "0")
    if value not in ("", "0", "1"):
        raise ConfigurationError(f"{SWITCH} must be 1 or 0, got {value!r}")
    return value == "1"


def load(payload: bytes) -> list[tuple[str, torch.Tensor]]:
    """The named tensors of one of ROLL's buckets.

    Args:
        payload: what ROLL's ``serialize_named_weights`` returns for vLLM.

    Returns:
        Checkpoint names with views of the bucket, on the device where it lies; of a copy, on the CPU, where the
        bucket itself was sent.

    Raises:
        ConfigurationError: :data:`SWITCH` has another value than ``1`` or ``0``.
        WeightUpdateError: such payloads are not allowed, or this is none.
    """
    if not allowed():
        raise WeightUpdateError(
            f"the payload is a pickle, and pickles are not taken; pack with roll_vllm.BucketSender or "
            f"roll_vllm.serialize_named_weights, or set {SWITCH}=1 where the engine starts, to take buckets of ROLL's "
            "own format from trainers that you trust"
        )
    import torch

    document = _parsed(payload)
    bucket = _bucket(document)
    placements = _placements(document["tensors_meta"])
    BucketManifest("", bucket.nbytes, placements).check()
    return [
        (p.spec.name, bucket[p.offset : p.end].view(getattr(torch, p.spec.dtype)).view(p.spec.shape))
        for p in placements
    ]


def _refused(why: str) -> WeightUpdateError:
    return WeightUpdateError(
        f"the payload is no bucket of ROLL's format: {why}. Send what its serialize_named_weights(..., 'vllm') "
        "returns, or pack with roll_vllm.BucketSender"
    )


def _parsed(payload: bytes) -> dict[str, Any]:
    try:
        document = _run(payload)
    except WeightUpdateError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise _refused(f"the pickle is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(document, dict):
        raise _refused(f"it has a {type(document).__name__}, and not a dict")
    if document.keys() not in ({"bucket", "tensors_meta"}, {"bucket_bytes", "tensors_meta"}):
        raise _refused(f"it has {shown(sorted(document))}, and not tensors_meta with bucket or bucket_bytes")
    return document


def _run(payload: bytes) -> Any:
    """What a pickle says, as plain data, names and calls that are not made."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def fill(values: list[Any]) -> None:
        target = stack[-1]
        if isinstance(target, dict):
            keys = values[::2]
            if not all(isinstance(key, str) for key in keys):
                raise _refused("a dict in it has a key that is not a string")
            target.update(zip(keys, values[1::2], strict=True))
        else:
            target.extend(values)

    for opcode, argument, _ in pickletools.genops(payload):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _SHORT_TUPLES:
            marks.append(len(stack) - _SHORT_TUPLES[name])
            stack.append(tuple(since_mark()))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("APPENDS", "SETITEMS"):
            fill(since_mark())
        elif name in ("APPEND", "SETITEM"):
            marks.append(len(stack) - (2 if name == "SETITEM" else 1))
            fill(since_mark())
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, _, called = argument.partition(" ") if argument else (stack.pop(-2), "", stack.pop())
            if not isinstance(module, str) or not isinstance(called, str) or (module, called) not in _ADMITTED:
                raise _refused(f"it names {shown(module)} {shown(called)}, which no such bucket has")
            stack.append(_Name(module, called))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if not isinstance(function, _Name) or not isinstance(arguments, tuple):
                raise _refused("it calls what has no name")
            stack.append(_Call(function, arguments))
        else:
            raise _refused(f"it has the instruction {name}, which no such bucket has")
    raise _refused("the pickle has no end")


def _placements(entries: Any) -> tuple[Placement, ...]:
    if not isinstance(entries, list):
        raise _refused(f"tensors_meta is a {type(entries).__name__}, and not a list")
    placements = []
    for entry in entries:
        wanted = {"name", "shape", "dtype", "start_idx", "end_idx"}
        if not isinstance(entry, dict) or not wanted <= entry.keys() <= {*wanted, "numel"}:
            raise _refused(f"{shown(entry)} in tensors_meta does not have {', '.join(sorted(wanted))}")
        dtype = entry["dtype"]
        if not isinstance(dtype, _Name):
            raise _refused(f"{shown(dtype)} in tensors_meta is not a dtype")
        spec = TensorSpec.checked(entry["name"], str(dtype), _sizes(entry["shape"]))
        start, end = entry["start_idx"], entry["end_idx"]
        if type(start) is not int or type(end) is not int or end - start != spec.nbytes:
            raise _refused(f"{spec} has {spec.nbytes} bytes, and not those from {shown(start)} to {shown(end)}")
        placements.append(Placement(spec, start))
    return tuple(placements)


def _sizes(shape: Any) -> Any:
    """The content of a ``torch.Size``; anything else as it is."""
    if isinstance(shape, _Call) and shape.function == _Name("torch", "Size") and len(shape.arguments) == 1:
        return shape.arguments[0]
    return shape


def _bucket(document: Mapping[str, Any]) -> torch.Tensor:
    """The int8 tensor of shape ``[bytes]`` that holds all others."""
    import torch

    content = document.get("bucket_bytes")
    if isinstance(content, bytes):
        return torch.frombuffer(bytearray(content), dtype=torch.int8) if content else torch.empty(0, dtype=torch.int8)
    handle = document.get("bucket")
    if not isinstance(handle, _Call) or (handle.function.module, handle.function.name) not in _HANDLES:
        raise _refused("its bucket is neither bytes nor the handle of memory of a CUDA or ROCm device")
    arguments = _checked(handle.arguments)
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    try:
        tensor: torch.Tensor = rebuild_cuda_tensor(*arguments)
    except Exception as error:  # of many kinds, from torch and the driver
        raise WeightUpdateError(
            f"the bucket's device memory cannot be opened ({type(error).__name__}: {error}): the trainer must run on "
            "this host, see the same device, keep the bucket until the engine has confirmed, and not use "
            "expandable_segments"
        ) from error
    return tensor


def _checked(arguments: Any) -> tuple[Any, ...]:
    """The arguments of torch's ``rebuild_cuda_tensor``, if they are those of one int8 tensor in one dimension."""
    import torch

    if not isinstance(arguments, tuple) or len(arguments) != 15:
        raise _refused("the handle of its bucket does not have 15 parts")
    kind, size, stride, offset, storage, dtype, device, handle, length, start, grad, counter, place, event, wait = (
        arguments
    )
    numbers = (offset, length, start, place)
    size, stride = _sizes(size), _sizes(stride)
    fits = (
        kind == _Name("torch", "Tensor")
        and storage in (_Name("torch.storage", "TypedStorage"), _Name("torch.storage", "UntypedStorage"))
        and dtype == _Name("torch", "int8")
        and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        and isinstance(size, tuple) and len(size) == 1 and type(size[0]) is int
        and stride == (1,)
        and 0 < size[0] <= length - offset
        and isinstance(handle, bytes) and 64 <= len(handle) <= 100
        and isinstance(counter, bytes) and _COUNTER_FILE.fullmatch(counter)
        and place < _COUNTERS
        and isinstance(event, bytes) and len(event) <= 100
        and isinstance(wait, bool)
        and grad is False
    )  # fmt: skip
    if not fits:
        raise _refused("the handle of its bucket is not that of one int8 tensor in one dimension")
    found = _device(device)
    return (torch.Tensor, torch.Size(size), (1,), offset, torch.UntypedStorage, torch.int8, found, *arguments[7:])


def _device(device: Any) -> int:
    """The index of a device, given as such or by its UUID."""
    import torch

    count = torch.cuda.device_count()
    if type(device) is int and 0 <= device < count:
        return device
    for index in range(count):
        if str(torch.cuda.get_device_properties(index).uuid) == device:
            return index
    raise WeightUpdateError(
        f"the bucket lies on device {shown(device)}, which this worker does not see; give trainer and engine the same "
        "devices"
    )
