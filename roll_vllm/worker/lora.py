"""The LoRA adapters that were handed to this worker as tensors, by ``lora_int_id``.

vLLM asks for an adapter whenever a request uses one that it does not hold, also after it has evicted it: what is
registered stays here until it is forgotten. The patch ``lora-from-tensors`` looks here.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from roll_vllm.errors import ConfigurationError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Attributes:
        config: PEFT's ``adapter_config.json``; at least ``r``, ``lora_alpha`` and ``target_modules``.
        tensors: The tensors by PEFT's names (``base_model.model.<module>.lora_A.weight``), on the CPU.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


_lock = threading.Lock()
_adapters: dict[int, Adapter] = {}


def register(lora_int_id: int, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Keep a copy of an adapter. vLLM takes it when a request names its id for the first time.

    An id that vLLM already holds goes on with the tensors it has: give every version of an adapter a new id.

    Args:
        lora_int_id: the id, 1 or more, that a ``LoRARequest`` will name.
        config: see :class:`Adapter`.
        tensors: see :class:`Adapter`; on any device, copied.

    Raises:
        ConfigurationError: the id is not positive, there are no tensors, or the configuration lacks something.
    """
    if lora_int_id < 1:
        raise ConfigurationError(f"lora_int_id must be 1 or more, got {lora_int_id}")
    missing = [name for name in ("r", "lora_alpha", "target_modules") if name not in config]
    if missing:
        raise ConfigurationError(f"the LoRA configuration lacks {', '.join(missing)}; pass PEFT's adapter_config")
    if not tensors:
        raise ConfigurationError(f"LoRA adapter {lora_int_id} has no tensors; send them before the configuration")
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    with _lock:
        _adapters[lora_int_id] = Adapter(dict(config), copies)


def forget(lora_int_id: int) -> bool:
    """Give the copy back; returns whether there was one. What vLLM itself holds stays until ``remove_lora``."""
    with _lock:
        return _adapters.pop(lora_int_id, None) is not None


def get(lora_int_id: int) -> Adapter | None:
    """The adapter of an id, if it was registered here."""
    with _lock:
        return _adapters.get(lora_int_id)


def registered() -> list[int]:
    """The ids, in ascending order."""
    with _lock:
        return sorted(_adapters)


def request(lora_int_id: int) -> Any:
    """vLLM's ``LoRARequest`` for a registered adapter: a name of its own, and a path that is never read."""
    from vllm.lora.request import LoRARequest

    name = _name(lora_int_id)
    return LoRARequest(lora_name=name, lora_int_id=lora_int_id, lora_path=name)


def is_from_tensors(lora_request: Any) -> bool:
    """Whether a ``LoRARequest``, or None, is one of :func:`request`."""
    return lora_request is not None and lora_request.lora_path == _name(lora_request.lora_int_id)


def _name(lora_int_id: int) -> str:
    return f"roll_vllm-{lora_int_id}"
