"""LoRA adapters from tensors that were handed to this worker, instead of from a directory."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from roll_vllm.errors import ConfigurationError
from roll_vllm.patches.patch import Patch

Options = Callable[[Any], dict[str, Any]]


def from_tensors(options: Options) -> Callable[[Any], Any]:
    """``WorkerLoRAManager._load_adapter`` that knows the adapters of :mod:`roll_vllm.worker.lora`.

    Args:
        options: what ``LoRAModel.from_lora_tensors`` wants besides, from the manager: as vLLM gives it itself.
    """

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def _load_adapter(self: Any, lora_request: Any) -> Any:
            from roll_vllm.worker import lora

            adapter = lora.get(lora_request.lora_int_id)
            if adapter is None:
                return original(self, lora_request)
            from vllm.lora.peft_helper import PEFTHelper

            helper = PEFTHelper.from_dict(
                {**adapter.config, "vllm_max_position_embeddings": self.max_position_embeddings}
            )
            helper.validate_legal(self.lora_config)
            model = self._lora_model_cls.from_lora_tensors(
                lora_request.lora_int_id,
                # Copies: vLLM multiplies the scaling into them, and loads an adapter again that it has evicted.
                {name: tensor.clone() for name, tensor in adapter.tensors.items()},
                helper,
                device="cpu",
                dtype=self.lora_config.lora_dtype,
                weights_mapper=getattr(self._adapter_manager.model, "hf_to_vllm_mapper", None),
                **options(self),
            )
            _check_modules(self._adapter_manager, lora_request, model)
            return model

        return _load_adapter

    return replacement


def _check_modules(manager: Any, request: Any, model: Any) -> None:
    """Refuse what the model has no place for, as vLLM does with an adapter from a directory."""
    packed = manager.packed_modules_mapping
    expected = {part for module in manager.supported_lora_modules for part in (*packed.get(module, [module]), module)}
    unexpected = []
    for name in model.loras:
        place = name.find(".experts")
        if name.rpartition(".")[2] not in expected and (place < 0 or name[place + 1 :] not in expected):
            unexpected.append(name)
    if unexpected:
        raise ConfigurationError(
            f"LoRA adapter {request.lora_name!r} has tensors for {', '.join(sorted(unexpected))}, where this model "
            f"takes none; leave them out, it takes: {', '.join(sorted(expected))}"
        )


def _padded(manager: Any) -> dict[str, Any]:
    return {
        "target_embedding_padding": manager.vocab_size + manager.lora_config.lora_extra_vocab_size,
        "embedding_modules": manager.embedding_modules,
        "embedding_padding_modules": manager.embedding_padding_modules,
    }


def _fixed(manager: Any) -> dict[str, Any]:
    return {"model_vocab_size": manager.vocab_size}


def _entry(versions: str, options: Options) -> Patch:
    return Patch(
        name="lora-from-tensors",
        target="vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
        versions=versions,
        replacement=from_tensors(options),
        why="vLLM loads LoRA adapters from directories only; a trainer has them as tensors.",
        upstream="https://github.com/vllm-project/vllm/issues/12609",
        remove_when="LoRARequest can carry tensors",
        relies_on=(
            "vllm.lora.models:LoRAModel.from_lora_tensors",
            "vllm.lora.models:LoRAModel.from_local_checkpoint",
            "vllm.lora.peft_helper:PEFTHelper.from_dict",
            "vllm.lora.peft_helper:PEFTHelper.from_local_dir",
        ),
    )


# Two entries, because the constructor's arguments changed; each is for what exists between its bounds.
PATCHES = (_entry(">=0.8.4,<0.12", _padded), _entry(">=0.12,<0.13", _fixed))
