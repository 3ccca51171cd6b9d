"""A model that vLLM changes after loading it takes complete sets all the same, each of its tensors in its place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from roll_vllm.errors import UnsupportedFeatureError
from roll_vllm.worker import refit
from roll_vllm.worker.checksums import named_tensors


class Quantised(torch.nn.Module):
    """One layer, with a weight that is halved to integers and a scale, as a tensor and as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.weight = torch.nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        self.layer.register_buffer("table", torch.arange(4.0))
        self.layer.number = 0.0


def process(model: torch.nn.Module, dtype: torch.dtype = torch.int8) -> None:
    layer: Any = model.layer
    scale = layer.weight.abs().max().reshape(1)
    layer.number = float(scale)
    layer.scale = torch.nn.Parameter(scale, requires_grad=False)
    layer.weight = torch.nn.Parameter((layer.weight / scale * 100).to(dtype).t(), requires_grad=False)


def a_worker(lora: Any = None) -> Any:
    return SimpleNamespace(vllm_config=SimpleNamespace(quant_config="fp8", lora_config=lora))


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Quantised:
    """A model that runs, processed; new ones are made alike."""
    monkeypatch.setattr(refit, "_new_model", lambda worker, device: Quantised())
    model = Quantised()
    model.layer.weight.data.fill_(1.0)
    process(model)
    return model


def test_each_set_arrives_in_place(running: Quantised) -> None:
    other = refit.Refit(a_worker(), running, process)
    addresses = {name: tensor.data_ptr() for name, tensor in named_tensors(running)}
    for value in (2.0, 5.0):
        second: Any = other.begin()
        assert second.layer.weight.dtype == torch.float32
        second.layer.weight.data.copy_(value * torch.arange(6.0).view(2, 3))
        other.finish()
        assert running.layer.weight.t().tolist() == [[0, 20, 40], [60, 80, 100]]
        assert running.layer.scale.tolist() == [5 * value]
        assert running.layer.number == 5 * value
    assert {name: tensor.data_ptr() for name, tensor in named_tensors(running)} == addresses


def test_a_set_that_is_given_up_changes_nothing(running: Quantised) -> None:
    other = refit.Refit(a_worker(), running, process)
    before = running.layer.weight.clone()
    second: Any = other.begin()
    second.layer.weight.data.fill_(7.0)
    other.drop()
    assert torch.equal(running.layer.weight, before)


@pytest.mark.parametrize("fault", ["dtype", "missing", "extra"])
def test_what_does_not_fit_is_refused_before_anything_is_copied(running: Quantised, fault: str) -> None:
    def otherwise(model: torch.nn.Module) -> None:
        layer: Any = model.layer
        process(model, torch.int16 if fault == "dtype" else torch.int8)
        if fault == "missing":
            del layer.scale
        if fault == "extra":
            layer.zero_point = torch.ones(1)

    other = refit.Refit(a_worker(), running, otherwise)
    second: Any = other.begin()
    second.layer.weight.data.fill_(3.0)
    before = running.layer.scale.clone()
    with pytest.raises(UnsupportedFeatureError, match="start a new engine"):
        other.finish()
    assert torch.equal(running.layer.scale, before)


def test_scales_of_the_kv_cache_are_optional(running: Quantised) -> None:
    class BaseKVCacheMethod:
        pass

    class Fp8KVCacheMethod(BaseKVCacheMethod):
        pass

    other = refit.Refit(a_worker(), running, process)
    second: Any = other.begin()
    second.attention = torch.nn.Module()
    second.attention.quant_method = Fp8KVCacheMethod()
    second.attention.k_scale = torch.nn.Parameter(torch.tensor(-1.0))
    assert other.optional() == {"attention.k_scale"}


def test_adapters_are_refused(running: Quantised) -> None:
    with pytest.raises(UnsupportedFeatureError, match="enable_lora"):
        refit.Refit(a_worker(lora=object()), running, process).begin()


def test_only_quantised_models_need_it() -> None:
    assert refit.is_quantised(a_worker())
    assert not refit.is_quantised(SimpleNamespace(vllm_config=SimpleNamespace(quant_config=None)))
