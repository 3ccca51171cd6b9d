"""Updating a model whose weights vLLM changes after it has loaded them: quantised ones.

What a checkpoint holds no longer fits into such a model's parameters: they have other dtypes and shapes, and have lost
their loaders. So each set goes into a second model, made and processed as at a start, whose tensors are then copied
into the one that runs. All of its tensors stay where they are, so that graphs and handles stay valid. While the update
lasts, the worker holds the weights twice, the second time as the checkpoint has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from roll_vllm import versions
from roll_vllm.errors import UnsupportedFeatureError
from roll_vllm.worker.checksums import named_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def is_quantised(worker: Any) -> bool:
    """Whether vLLM quantises or repacks the weights of this worker's model when it loads them."""
    return getattr(worker.vllm_config, "quant_config", None) is not None


class Refit:
    """Makes the second model and takes it over.

    Args:
        worker: vLLM's worker.
        model: the model that runs.
        process: vLLM's post-load step, for a model.
    """

    def __init__(self, worker: Any, model: torch.nn.Module, process: Callable[[torch.nn.Module], None]) -> None:
        self._worker = worker
        self._model = model
        self._process = process
        self._second: torch.nn.Module | None = None

    def begin(self) -> torch.nn.Module:
        """Return a new model that a complete set of weights can be loaded into.

        Raises:
            UnsupportedFeatureError: the engine takes LoRA adapters, which lie between the model's layers.
        """
        if self._worker.vllm_config.lora_config is not None:
            raise UnsupportedFeatureError(
                "the weights of a quantised model cannot be updated in an engine with enable_lora=True; start it "
                "without one of the two"
            )
        self.drop()
        self._second = _new_model(self._worker, next(self._model.parameters()).device)
        return self._second

    def drop(self) -> None:
        """Let go of the second model."""
        self._second = None

    def optional(self) -> frozenset[str]:
        """Parameters of the second model that a checkpoint need not have: the scales of a quantised KV cache."""
        assert self._second is not None
        return frozenset(
            f"{name}.{parameter}"
            for name, module in self._second.named_modules()
            if any(base.__name__ == "BaseKVCacheMethod" for base in type(getattr(module, "quant_method", None)).__mro__)
            for parameter, _ in module.named_parameters(recurse=False)
        )

    def finish(self) -> None:
        """Process the second model, copy all of its tensors and numbers into the one that runs, and drop it.

        Raises:
            UnsupportedFeatureError: the two do not fit; nothing was copied.
        """
        assert self._second is not None
        second, self._second = self._second, None
        self._process(second)
        pairs = list(_pairs(self._model, second))
        with torch.no_grad():
            for tensor, source in pairs:
                if tensor.data_ptr() != source.data_ptr():  # rotary tables are one for all
                    tensor.copy_(source)
        modules = dict(second.named_modules())
        for name, module in self._model.named_modules():
            for attribute, value in vars(modules[name]).items():
                if isinstance(value, float):  # scales are kept as numbers, too
                    setattr(module, attribute, value)


def _new_model(worker: Any, device: torch.device) -> torch.nn.Module:
    from vllm import __version__
    from vllm.config import set_current_vllm_config

    if versions.satisfies(__version__, "<0.8.5"):
        from vllm.model_executor.model_loader.loader import _initialize_model as make
    else:
        from vllm.model_executor.model_loader.utils import initialize_model as make
    compilation = worker.vllm_config.compilation_config
    default = torch.get_default_dtype()
    # Attention layers enter their names there, and those of the running model must stay.
    running, compilation.static_forward_context = compilation.static_forward_context, {}
    torch.set_default_dtype(worker.model_config.dtype)
    try:
        with set_current_vllm_config(worker.vllm_config), device:
            model: torch.nn.Module = make(vllm_config=worker.vllm_config)
            return model
    finally:
        torch.set_default_dtype(default)
        compilation.static_forward_context = running


def _pairs(model: torch.nn.Module, second: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    sources = dict(named_tensors(second))
    for name, tensor in named_tensors(model):
        source = sources.pop(name, None)
        if source is None or (source.shape, source.dtype) != (tensor.shape, tensor.dtype):
            raise UnsupportedFeatureError(
                f"vLLM's post-load step gives {name} another form with each load, so that it cannot be updated in "
                "place; start a new engine, or use weights that are not quantised"
            )
        yield tensor.detach(), source.detach()
    if sources:
        raise UnsupportedFeatureError(
            f"vLLM's post-load step makes {next(iter(sources))}, which the running model has not got; start a new "
            "engine, or use weights that are not quantised"
        )
