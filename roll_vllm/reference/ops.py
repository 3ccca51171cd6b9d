"""The compiled operators that vLLM's layers look up when they are built on a CPU, in plain PyTorch.

With custom operators switched off nothing else is left of vLLM's ``csrc/cpu``, whose schemas these have: norms and
rotary embeddings have a PyTorch form in vLLM itself, attention is in :mod:`roll_vllm.reference.attention`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch.nn.functional import gelu, silu

_SCHEMA = "(Tensor! out, Tensor input) -> ()"


def _gated(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """The first half of the last dimension, activated, times the second half."""

    def operator(out: torch.Tensor, input: torch.Tensor) -> None:
        gate, value = input.chunk(2, dim=-1)
        out.copy_(activation(gate) * value)

    return operator


def _plain(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def operator(out: torch.Tensor, input: torch.Tensor) -> None:
        out.copy_(activation(input))

    return operator


_OPERATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "silu_and_mul": _gated(silu),
    "gelu_and_mul": _gated(gelu),
    "gelu_tanh_and_mul": _gated(lambda x: gelu(x, approximate="tanh")),
    "gelu_new": _plain(lambda x: gelu(x, approximate="tanh")),
    "gelu_fast": _plain(lambda x: gelu(x, approximate="tanh")),
    "gelu_quick": _plain(lambda x: x * torch.sigmoid(1.702 * x)),
}
_library: torch.library.Library | None = None  # the operators last as long as this


def install() -> None:
    """Define the operators that are missing; one that is there already, with a kernel for CPUs, is left alone."""
    global _library
    if _library is not None:
        return
    with contextlib.suppress(ImportError):  # it links libcuda; without it none of its operators exist
        import vllm._C  # noqa: F401
    _library = torch.library.Library("_C", "FRAGMENT")
    for name, function in _OPERATORS.items():
        if not hasattr(torch.ops._C, name):
            _library.define(name + _SCHEMA)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"_C::{name}", "CPU"):
            _library.impl(name, function, "CPU")
