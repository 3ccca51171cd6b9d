"""A LoRA adapter from tensors is the same as from a directory."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from roll_vllm.worker import lora

CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "gate_proj"], "peft_type": "LORA", "bias": "none"}
TENSORS = {
    f"base_model.model.model.layers.0.{module}.lora_{half}.weight": torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed)
    )
    for seed, (module, half, shape) in enumerate(
        (module, half, shape)
        for module in ("self_attn.q_proj", "mlp.gate_proj")
        for half, shape in (("A", (2, 8)), ("B", (8, 2)))
    )
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    yield
    for lora_int_id in lora.registered():
        lora.forget(lora_int_id)


@pytest.fixture
def manager(patched: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker's LoRA manager as far as loading goes, for a model with fused projections."""
    from vllm.config import LoRAConfig
    from vllm.lora import models
    from vllm.lora.models import LoRAModel

    # An official wheel takes any machine for one with a GPU.
    monkeypatch.setattr(models, "is_pin_memory_available", torch.cuda.is_available)
    owner = patched("lora-from-tensors")
    config = LoRAConfig(max_lora_rank=8, max_loras=1)
    config.lora_dtype = torch.float32
    self = SimpleNamespace(
        _adapter_manager=SimpleNamespace(
            supported_lora_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            packed_modules_mapping={
                "qkv_proj": ["q_proj", "k_proj", "v_proj"],
                "gate_up_proj": ["gate_proj", "up_proj"],
            },
            model=SimpleNamespace(hf_to_vllm_mapper=None),
        ),
        _lora_model_cls=LoRAModel,
        lora_config=config,
        vocab_size=32,
        embedding_modules={"embed_tokens": "input_embeddings"},
        embedding_padding_modules=["lm_head"],
        max_position_embeddings=64,
    )
    self.load = lambda request: owner._load_adapter(self, request)
    return self


def request(lora_int_id: int, path: str = "tensors") -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter-{lora_int_id}", lora_int_id, path)


def from_directory(manager: Any, directory: Path, tensors: dict[str, torch.Tensor], lora_int_id: int = 9) -> Any:
    from safetensors.torch import save_file

    (directory / "adapter_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(tensors, directory / "adapter_model.safetensors")
    return manager.load(request(lora_int_id, str(directory)))


def matrices(model: Any) -> dict[str, tuple[list[Any], list[Any], float]]:
    return {name: (layer.lora_a.tolist(), layer.lora_b.tolist(), layer.scaling) for name, layer in model.loras.items()}


def test_the_same_as_from_a_directory(manager: Any, tmp_path: Path) -> None:
    lora.register(3, CONFIG, TENSORS)
    ours, theirs = manager.load(request(3)), from_directory(manager, tmp_path, TENSORS)
    assert len(ours.loras) == 2
    assert matrices(ours) == matrices(theirs)
    assert (ours.id, ours.rank) == (3, theirs.rank)
    assert {name: value for name, value in vars(ours).items() if name not in ("id", "loras")} == {
        name: value for name, value in vars(theirs).items() if name not in ("id", "loras")
    }


def test_loading_again_scales_once(manager: Any) -> None:
    """vLLM multiplies the scaling into the matrices, and loads an adapter anew that it has evicted."""
    lora.register(3, CONFIG, TENSORS)
    first = manager.load(request(3))
    for layer in first.loras.values():
        layer.optimize()
    before = {name: (layer.lora_b.tolist(), layer.scaling) for name, layer in first.loras.items()}
    second = manager.load(request(3))
    for layer in second.loras.values():
        layer.optimize()
    assert before == {name: (layer.lora_b.tolist(), layer.scaling) for name, layer in second.loras.items()}


def test_registering_copies(manager: Any) -> None:
    own = {name: tensor.clone() for name, tensor in TENSORS.items()}
    lora.register(3, CONFIG, own)
    for tensor in own.values():
        tensor.zero_()
    assert matrices(manager.load(request(3))) != {}
    assert all(layer.lora_a.any() for layer in manager.load(request(3)).loras.values())


def test_a_directory_still_works_and_a_forgotten_one_is_gone(manager: Any, tmp_path: Path) -> None:
    lora.register(3, CONFIG, TENSORS)
    assert lora.registered() == [3]
    assert lora.forget(3)
    assert not lora.forget(3)
    with pytest.raises(Exception, match="tensors"):
        manager.load(request(3))
    assert len(from_directory(manager, tmp_path, TENSORS).loras) == 2


def test_a_module_that_the_model_lacks(manager: Any, tmp_path: Path) -> None:
    other = {name.replace("gate_proj", "router"): tensor for name, tensor in TENSORS.items()}
    lora.register(3, CONFIG, other)
    with pytest.raises(ValueError, match=r"'adapter-3' has tensors for model\.layers\.0\.mlp\.router"):
        manager.load(request(3))
    with pytest.raises(ValueError, match="router"):
        from_directory(manager, tmp_path, other)


def test_a_rank_that_is_too_high(manager: Any) -> None:
    lora.register(3, {**CONFIG, "r": 64}, TENSORS)
    with pytest.raises(ValueError, match="rank 64 is greater than max_lora_rank 8"):
        manager.load(request(3))


@pytest.mark.parametrize(
    ("lora_int_id", "config", "tensors", "message"),
    [
        (0, CONFIG, TENSORS, "must be 1 or more"),
        (1, {"r": 2}, TENSORS, "lacks lora_alpha, target_modules"),
        (1, CONFIG, {}, "has no tensors"),
    ],
)
def test_refusals(lora_int_id: int, config: Any, tensors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.register(lora_int_id, config, tensors)
    assert lora.registered() == []


def test_the_arguments_are_those_of_this_release(manager: Any) -> None:
    from vllm.lora.models import LoRAModel

    known = set(inspect.signature(LoRAModel.from_lora_tensors).parameters)
    given: dict[str, Any] = {}

    def note(*args: Any, **kwargs: Any) -> Any:
        given.update(kwargs)
        return SimpleNamespace(loras={})

    manager._lora_model_cls = SimpleNamespace(from_lora_tensors=note)
    lora.register(3, CONFIG, TENSORS)
    manager.load(request(3))
    assert set(given) <= known
    optional = {"embeddings"}  # vLLM passes them only if the directory has some
    assert known - set(given) - optional <= {"lora_model_id", "tensors", "peft_helper"}
