"""LoRA adapters that a trainer sends as tensors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from conformance.oracles import PARITY, TRANSPORTS
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender, CollectiveSender, ConfigurationError
from roll_vllm.environment import free_port

if TYPE_CHECKING:
    import torch

RANK, ALPHA = 8, 24  # a scale that is not 1, so that it shows when it is left out or applied twice
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(MODULES), "peft_type": "LORA"}


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    """Random weights: every token's probability depends on every adapted module."""
    return vllm_model_factory("random")


@pytest.fixture
def vllm_engine_args(vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
    return {**vllm_engine_args, "enable_lora": True, "max_lora_rank": 16, "max_loras": 1}


def adapter(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The tensors of an adapter for all modules, by PEFT's names; large enough to change every answer."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.endswith(MODULES):
            rows, columns = weight.shape
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * columns**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.2
    return tensors


def merged(weights: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with the adapter multiplied in, which need no LoRA at all."""
    result = dict(weights)
    for name in weights:
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in tensors:
            change = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
            result[name] = weights[name] + change * (ALPHA / RANK)
    return result


async def assert_answers_as(
    engine: EngineHandle, trainer: Trainer, weights: dict[str, torch.Tensor], prompts: list[list[int]]
) -> None:
    """The engine's log-probabilities are those of a reference forward pass on the given weights."""
    outputs = await asyncio.gather(
        *(
            engine.complete(list(p), temperature=0.0, max_tokens=8, logprobs=0, lora_request=engine.lora_request)
            for p in prompts
        )
    )
    trainer.reference.load(weights)
    for output in outputs:
        prompt, tokens = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        rows = trainer.reference.logits(prompt + tokens)[:-1].log_softmax(dim=-1)[len(prompt) - 1 :]
        for row, token, entry in zip(rows, tokens, output.outputs[0].logprobs, strict=True):
            difference = abs(float(row[token]) - entry[token].logprob)
            assert difference <= PARITY[1], f"log-probability off by {difference:.2g}, allowed is {PARITY[1]:.2g}"


async def send(engine: EngineHandle, tensors: dict[str, torch.Tensor], transport: str = "bucket") -> None:
    if transport == "bucket":
        with BucketSender() as bucket:
            for payload in bucket.payloads(tensors):
                await engine.update_parameter_in_bucket([payload], is_lora=True)
    else:
        port, name = free_port(), f"lora-{len(tensors)}-{id(tensors)}"
        joining = asyncio.to_thread(CollectiveSender, "127.0.0.1", port, 2, name)
        _, sender = await asyncio.gather(engine.setup_collective_group("127.0.0.1", port, 1, 2, name, "gloo"), joining)
        received = engine.broadcast_parameter(**sender.describe(tensors), group_name=name, is_lora=True)
        await asyncio.gather(received, asyncio.to_thread(sender.send, tensors))
        sender.close()
    await engine.add_lora(CONFIG)


@contract(
    "lora-tensors-parity",
    "An adapter that is sent as tensors, by either transport, answers as the weights it is merged into; the next one "
    "takes its place.",
    references=("vllm-project/vllm#12609", "NovaSky-AI/SkyRL#2221"),
)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_adapter_answers_as_merged_weights(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]], transport: str
) -> None:
    weights = vllm_trainer.weights(vllm_trainer.reference_version)
    names = set()
    for seed in (1, 2):
        tensors = adapter(weights, seed)
        await send(vllm_engine, tensors, transport)
        names.add(vllm_engine.lora_request.lora_name)
        await assert_answers_as(vllm_engine, vllm_trainer, merged(weights, tensors), prompts[:4])
    assert len(names) == 2, "both adapters have one name, so that a cache may take one for the other"


@contract(
    "lora-survives-sleep",
    "After level 1 the adapter still applies; after level 2 it is gone, the engine says so, and it can be sent again.",
    references=("vllm-project/vllm#53888", "verl-project/verl#3461"),
)
async def test_adapter_and_sleep(vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]]) -> None:
    version = vllm_trainer.reference_version
    weights = vllm_trainer.weights(version)
    tensors = adapter(weights, 3)
    await send(vllm_engine, tensors)
    await vllm_engine.offload_states(1)
    await vllm_engine.load_states()
    await assert_answers_as(vllm_engine, vllm_trainer, merged(weights, tensors), prompts[:2])
    await vllm_engine.offload_states(2)
    await vllm_engine.load_states()
    await vllm_trainer.push(vllm_engine, version)
    assert vllm_engine.lora_request is None, "level 2 destroys adapters, and the engine still names one"
    with pytest.raises(ConfigurationError, match="tensors"):
        await vllm_engine.add_lora(CONFIG)
    await assert_answers_as(vllm_engine, vllm_trainer, weights, prompts[:2])
    await send(vllm_engine, tensors)
    await assert_answers_as(vllm_engine, vllm_trainer, merged(weights, tensors), prompts[:2])
