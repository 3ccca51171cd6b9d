"""Device memory that two processes of one host map at the same time, on NVIDIA and AMD GPUs.

A segment is an allocation of its own, exported by the runtime's inter-process handle. Memory of torch's allocator
would not do: the handle of one tensor opens everything that lies in the same block, memory in expandable segments has
none, and torch's own sharing counts on every handle being opened exactly once.

The handle lies in a small file of shared memory, whose path is the segment's name. So it is readable for the same
user only, is gone when its owner closes the segment or dies, and travels in no message.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roll_vllm.errors import OUT_OF_MEMORY_REMEDY, ConfigurationError, EngineOutOfMemoryError, WeightUpdateError
from roll_vllm.transfer import shared_memory
from roll_vllm.transfer.manifest import shown

if TYPE_CHECKING:
    import torch

_NOTE_BYTES = 512
_HANDLE_BYTES = 64
_GRANULE = 2 * 2**20  # bytes; smaller allocations share a block with others, and a handle opens all of it
_LAZY_PEER_ACCESS = 1
_OUT_OF_MEMORY = 2
_HOST = "send through the host's memory, with BucketSender(via_host=True)"


class DeviceMemoryError(RuntimeError):
    """What the device's runtime answered.

    Attributes:
        code: its number.
    """

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call}: {text} ({code})")
        self.code = code


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


class _Runtime:
    """The few calls of the CUDA or HIP runtime that torch does not hand out."""

    def __init__(self, path: str, prefix: str) -> None:
        self._library = ctypes.CDLL(path)
        self._prefix = prefix
        self._text = getattr(self._library, f"{prefix}GetErrorString")
        self._text.restype = ctypes.c_char_p
        if prefix == "hip":
            self._range = self._library.hipMemGetAddressRange
        else:  # the driver's; the runtime has no such call
            self._range = ctypes.CDLL("libcuda.so.1").cuMemGetAddressRange_v2

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, self._prefix + name)(*arguments)
        if code:
            getattr(self._library, f"{self._prefix}GetLastError")()  # or torch's next check would find it
            raise DeviceMemoryError(self._prefix + name, code, self._text(code).decode())

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        self._call("Malloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value or 0

    def free(self, pointer: int) -> None:
        self._call("Free", ctypes.c_void_p(pointer))

    def export(self, pointer: int) -> bytes:
        handle = _Handle()
        self._call("IpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(pointer))
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        pointer = ctypes.c_void_p()
        wanted = _Handle.from_buffer_copy(handle)
        self._call("IpcOpenMemHandle", ctypes.byref(pointer), wanted, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return pointer.value or 0

    def close(self, pointer: int) -> None:
        self._call("IpcCloseMemHandle", ctypes.c_void_p(pointer))

    def size(self, pointer: int) -> int:
        base, size = ctypes.c_void_p(), ctypes.c_size_t()
        code = self._range(ctypes.byref(base), ctypes.byref(size), ctypes.c_void_p(pointer))
        if code:
            raise DeviceMemoryError("MemGetAddressRange", code, "the extent of the memory is unknown")
        return size.value - (pointer - (base.value or 0))


@functools.cache
def _runtime() -> _Runtime | None:
    """The runtime that torch has loaded; None where there is none of its own, as in builds that link it statically."""
    import torch

    prefix, library = ("hip", "libamdhip64") if torch.version.hip else ("cuda", "libcudart")
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        found = re.search(rf"\s(/\S*/{library}[^/\s]*\.so[^/\s]*)$", mapped, re.MULTILINE)
        return _Runtime(found[1], prefix) if found else None
    except (OSError, AttributeError):
        return None


def shareable(device: torch.device) -> bool:
    """Whether memory of the device can be shared with other processes by this module."""
    return device.type == "cuda" and _runtime() is not None and bool(identity(device))


def identity(device: torch.device) -> str:
    """What names the device in every process of the host, however each numbers its devices.

    Empty for a CPU, and where torch does not know.
    """
    import torch

    return str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) if device.type == "cuda" else ""


class _Pointer:
    """Memory that torch takes as it is, and that goes back when the last tensor over it is gone."""

    def __init__(self, pointer: int, size: int, device: int, give_back: Any) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 2}
        finalizer = weakref.finalize(self, _give_back, os.getpid(), give_back, pointer, device)
        finalizer.atexit = False  # the process's end gives everything back, and the runtime may be gone by then


def _give_back(owner: int, give_back: Any, pointer: int, device: int) -> None:
    import torch

    if os.getpid() != owner:  # a forked child inherits the finalizer
        return
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # nothing may still be using it
        give_back(pointer)


def _tensor(pointer: int, size: int, device: torch.device, give_back: Any) -> torch.Tensor:
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.as_tensor(_Pointer(pointer, size, index, give_back), device=torch.device(device.type, index))


class DeviceSegment:
    """Device memory owned by this process that others can map.

    Args:
        size: length in bytes.
        device: where; :func:`shareable`.

    Attributes:
        path: the file that names it; other processes map the memory with :func:`attach`.
        memory: uint8 tensor of shape ``[size]`` on the device.

    Raises:
        EngineOutOfMemoryError: the device has no room for it.
        ConfigurationError: the file cannot be made, or the device shares no memory.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        import torch

        runtime = _runtime()
        assert runtime is not None, "ask shareable() first"
        self.memory = _allocate(runtime, size, device)
        with _on(device):
            try:
                handle = runtime.export(self.memory.data_ptr())
            except DeviceMemoryError as error:
                raise ConfigurationError(f"{device} shares no memory between processes ({error}): {_HOST}") from error
        note = json.dumps({"device": identity(self.memory.device), "handle": handle.hex()}).encode()
        self._file = shared_memory.Segment(_NOTE_BYTES)
        self._file.memory.copy_(torch.frombuffer(bytearray(note.ljust(_NOTE_BYTES)), dtype=torch.uint8))
        self.path = self._file.path
        _own[str(self.path)] = self

    def close(self) -> None:
        """Let nobody map it any more. The memory goes back when the tensors over it are gone, here and elsewhere."""
        self._file.close()
        _own.pop(str(self.path), None)


#: A handle cannot be opened in the process that exported it.
_own: weakref.WeakValueDictionary[str, DeviceSegment] = weakref.WeakValueDictionary()


def _on(device: torch.device) -> Any:
    import torch

    return torch.cuda.device(device)


def _allocate(runtime: _Runtime, size: int, device: torch.device) -> torch.Tensor:
    import torch

    whole = max(-(-size // _GRANULE), 1) * _GRANULE
    with _on(device):
        try:
            try:
                pointer = runtime.allocate(whole)
            except DeviceMemoryError as error:
                if error.code != _OUT_OF_MEMORY:
                    raise ConfigurationError(f"{device} gives no memory to share ({error}): {_HOST}") from error
                torch.cuda.empty_cache()  # what torch keeps for later is no use to anybody else
                pointer = runtime.allocate(whole)
        except DeviceMemoryError as error:
            raise EngineOutOfMemoryError(
                f"no room for a bucket of {whole} bytes on {device} ({error}): {OUT_OF_MEMORY_REMEDY}, or send with a "
                "smaller bucket_bytes or with BucketSender(via_host=True)"
            ) from error
        return _tensor(pointer, whole, device, runtime.free)[:size]


def attach(path: str, size: int, device: torch.device) -> torch.Tensor:
    """Map another process's segment.

    Args:
        path: its name.
        size: how many bytes of it are wanted.
        device: this process's device, which must be the one that the segment lies on.

    Returns:
        uint8 tensor of shape ``[size]`` on the device. The mapping ends with the last tensor over it.

    Raises:
        WeightUpdateError: there is no such segment, it is shorter, or lies on another device.
    """
    own = _own.get(path)
    if own is not None:
        return _long_enough(path, own.memory, size)
    note = shared_memory.attach(path, _NOTE_BYTES)
    try:
        described = json.loads(bytes(note.tolist()))
        where, handle = described["device"], bytes.fromhex(described["handle"])
        if len(handle) != _HANDLE_BYTES or not isinstance(where, str):
            raise ValueError(f"a handle of {len(handle)} bytes")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WeightUpdateError(f"{path} names no device memory ({error}); pack the bucket again") from error
    runtime = _runtime() if device.type == "cuda" else None
    if runtime is None or identity(device) != where:
        raise WeightUpdateError(
            f"the bucket lies on the device {shown(where)}, and this worker has "
            f"{identity(device) or f'a {device.type}'}: send through weight_update(), pack with "
            "BucketSender(via_host=True), or use the collective transport"
        )
    with _on(device):
        try:
            pointer = runtime.open(handle)
        except DeviceMemoryError as error:
            raise WeightUpdateError(
                f"cannot map the sender's device memory ({error}): keep the sender open until the engine has confirmed "
                f"the update, and run both on one host; or {_HOST}"
            ) from error
        try:
            length = runtime.size(pointer)
        except DeviceMemoryError as error:
            runtime.close(pointer)
            raise WeightUpdateError(f"cannot tell how long the sender's memory is ({error}): {_HOST}") from error
        return _long_enough(path, _tensor(pointer, length, device, runtime.close), size)


def _long_enough(path: str, memory: torch.Tensor, size: int) -> torch.Tensor:
    if memory.nbytes < size:
        raise WeightUpdateError(
            f"the segment {path} has {memory.nbytes} bytes, its metadata says {size}: pack the bucket again"
        )
    return memory[:size]
