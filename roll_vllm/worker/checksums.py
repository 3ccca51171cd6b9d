"""A checksum for every tensor a model holds, computed where the tensor is."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def checksum(tensor: torch.Tensor) -> str:
    """XXH3 (64 bits, hexadecimal) of the tensor's bytes in row-major order, whatever its device and layout."""
    import xxhash

    data = tensor.detach().to("cpu").contiguous()
    # Not data.numpy(): torch then never lets the storage be resized again, and sleep lives by that.
    return xxhash.xxh3_64_hexdigest((ctypes.c_char * data.nbytes).from_address(data.data_ptr()) if data.nbytes else b"")


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, buffer (also non-persistent) and tensor kept as a plain attribute, once a name.

    Tied tensors appear under each of their names.
    """
    import torch

    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for module_name, module in model.named_modules():
        for attribute, value in vars(module).items():
            # The KV cache hangs on the attention layers but belongs to the requests, not to the model.
            if isinstance(value, torch.Tensor) and attribute != "kv_cache":
                yield f"{module_name}.{attribute}" if module_name else attribute, value


def model_checksums(model: torch.nn.Module) -> dict[str, str]:
    """:func:`checksum` of every tensor of :func:`named_tensors`, by name."""
    seen: dict[tuple[Any, ...], str] = {}
    sums: dict[str, str] = {}
    for name, tensor in named_tensors(model):
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
        if key not in seen:
            seen[key] = checksum(tensor)
        sums[name] = seen[key]
    return sums
