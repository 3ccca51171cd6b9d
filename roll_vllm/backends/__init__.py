"""What differs between the backends that an engine can run on, as objects with one face.

``BACKENDS["rocm"]``, ``get("rocm")`` and ``of(devices.detect())`` give a :class:`Backend`, which answers what the
runtime must know: variables, resource keys, worker classes, sleep. Nothing here imports torch or vllm, except
:meth:`Backend.release_allocator` when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from roll_vllm.backends.base import VERIFIED, Backend, Kind
from roll_vllm.backends.cpu import Cpu, CpuReference
from roll_vllm.backends.cuda import Cuda
from roll_vllm.backends.npu import Npu
from roll_vllm.backends.rocm import Rocm
from roll_vllm.errors import ConfigurationError

if TYPE_CHECKING:
    from roll_vllm.devices import Device

__all__ = ["BACKENDS", "VERIFIED", "Backend", "Kind", "get", "of", "of_torch"]

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {backend.name: backend for backend in (Cuda(), Rocm(), Npu(), Cpu(), CpuReference())}
)
"""The backends by name; those of an accelerator in the order in which devices are looked for."""


def get(name: str) -> Backend:
    """Return the backend of a name.

    Raises:
        ConfigurationError: If there is none.
    """
    try:
        return BACKENDS[name]
    except KeyError:
        raise ConfigurationError(f"unknown backend {name!r}; choose one of: {', '.join(BACKENDS)}") from None


def of(device: Device) -> Backend:
    """Return the backend that engines run on with these devices."""
    return get(device.backend)


def of_torch(device_type: str) -> Backend:
    """Return a backend whose tensors torch calls by this device type; AMD GPUs are ``cuda`` to torch, too.

    Raises:
        ConfigurationError: If there is none.
    """
    for backend in BACKENDS.values():
        if backend.torch_device == device_type:
            return backend
    known = ", ".join(dict.fromkeys(backend.torch_device for backend in BACKENDS.values()))
    raise ConfigurationError(f"no backend has tensors on {device_type!r}; choose one of: {known}")
