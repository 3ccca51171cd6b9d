"""LoRA adapters that a trainer sends as tensors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from conformance.oracles import TRANSPORTS, completed, ended, memory_held, parity_bounds, pids
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender, CollectiveSender, ConfigurationError
from roll_vllm.devices import Device
from roll_vllm.environment import free_port

if TYPE_CHECKING:
    import torch

RANK, ALPHA = 8, 24  # a scale that is not 1, so that it shows when it is left out or applied twice
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(MODULES), "peft_type": "LORA"}

#: Of the one engine with adapters, which the random walk of test_traffic shares; hence the key.
ENGINE_ARGS = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 1}
shares_engine = pytest.mark.vllm_engine_key("adapters")
pytestmark = shares_engine


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    """Random weights: every token's probability depends on every adapted module."""
    return vllm_model_factory("random")


@pytest.fixture
def vllm_engine_args(vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
    return {**vllm_engine_args, **ENGINE_ARGS}


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
    """With the adapter that the engine holds, its log-probabilities are those of the given weights."""
    assert_said(await ask(engine, prompts, engine.lora_request), trainer, weights)


async def ask(engine: EngineHandle, prompts: list[list[int]], lora_request: Any) -> list[Any]:
    """Greedy answers with log-probabilities."""
    sampling = {"temperature": 0.0, "max_tokens": 8, "logprobs": 0, "lora_request": lora_request}
    return await asyncio.gather(*(engine.complete(list(prompt), **sampling) for prompt in prompts))


def assert_said(outputs: list[Any], trainer: Trainer, weights: dict[str, torch.Tensor]) -> None:
    """The log-probabilities are those of a reference forward pass on the given weights."""
    answers = [(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]
    expected, allowed = reference_logprobs(trainer, weights, answers)
    differences = [
        abs(wanted - entry[token].logprob)
        for row, output in zip(expected, outputs, strict=True)
        for wanted, token, entry in zip(row, output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
    ]
    assert max(differences) <= allowed, f"log-probability off by {max(differences):.2g}, allowed is {allowed:.2g}"


def reference_logprobs(
    trainer: Trainer, weights: dict[str, torch.Tensor], answers: Sequence[tuple[list[int], list[int]]]
) -> tuple[list[list[float]], float]:
    """The log-probability of every token of some answers, by a reference forward pass on the given weights.

    Args:
        trainer: of a model of these shapes.
        weights: to compute with.
        answers: prompts, each with the tokens that followed.

    Returns:
        The log-probabilities of each answer, and by how much an engine's may differ from them.
    """
    references = [trainer.reference]
    if trainer.model.dtype != "float32":
        references.append(trainer.rounded_reference)
    for reference in references:
        reference.load(weights)
    expected: list[list[float]] = []
    rounding: list[float] = []
    for prompt, tokens in answers:
        rows, *rounded = [r.logits(prompt + tokens)[len(prompt) - 1 : -1].log_softmax(dim=-1) for r in references]
        expected.append([float(rows[place, token]) for place, token in enumerate(tokens)])
        for other in rounded:
            rounding += [abs(float(rows[place, token] - other[place, token])) for place, token in enumerate(tokens)]
    return expected, parity_bounds(rounding)[1]


async def send_bucket(engine: EngineHandle, tensors: dict[str, torch.Tensor]) -> None:
    """Send an adapter's tensors, without adding it."""
    with BucketSender() as bucket:
        for payload in bucket.payloads(tensors):
            await engine.update_parameter_in_bucket([payload], is_lora=True)


async def send(engine: EngineHandle, tensors: dict[str, torch.Tensor], transport: str = "bucket") -> None:
    if transport == "bucket":
        await send_bucket(engine, tensors)
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
    needs=("lora", "runtime"),
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
    needs=("lora", "runtime"),
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


right_version = contract(
    "lora-right-version-used",
    "Each request uses the adapter version that it asks for: from A over B back to A, on a cached prompt, and beside "
    "requests for the base model; for an adapter that is gone it gets an error.",
    references=("vllm-project/vllm#42125", "vllm-project/vllm#30931", "vllm-project/vllm#48352"),
    needs=("lora", "runtime"),
)


@right_version
async def test_versions_share_no_cache(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    weights = vllm_trainer.weights(vllm_trainer.reference_version)
    prompt = [number * 7 % vllm_trainer.model.vocab_size for number in range(300)]  # more than two blocks
    for seed in (1, 2, 1):
        tensors = adapter(weights, seed)
        await send(vllm_engine, tensors)
        with_adapter = merged(weights, tensors)
        await assert_answers_as(vllm_engine, vllm_trainer, with_adapter, [prompt])
        again = {"temperature": 0.0, "max_tokens": 8, "logprobs": 0}
        for request, expected in ((vllm_engine.lora_request, with_adapter), (None, weights), (None, weights)):
            output, cached = await completed(vllm_engine, prompt, lora_request=request, **again)
            assert_said([output], vllm_trainer, expected)
        assert cached > 0, "the prompt was not cached, so that nothing could be mistaken"


@right_version
async def test_adapter_and_base_side_by_side(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]]
) -> None:
    weights = vllm_trainer.weights(vllm_trainer.reference_version)
    tensors = adapter(weights, 4)
    await send(vllm_engine, tensors)
    groups = (prompts[:4], vllm_engine.lora_request), (prompts[:4], None), (prompts[4:8], vllm_engine.lora_request)
    said = await asyncio.gather(*(ask(vllm_engine, some, request) for some, request in groups))
    for (_, request), outputs in zip(groups, said, strict=True):
        assert_said(outputs, vllm_trainer, merged(weights, tensors) if request else weights)


@right_version
async def test_adapter_that_is_gone(vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]]) -> None:
    version = vllm_trainer.reference_version
    weights = vllm_trainer.weights(version)
    first, second = adapter(weights, 5), adapter(weights, 6)
    await send(vllm_engine, first)
    gone = [vllm_engine.lora_request]
    await vllm_engine.pause_generation()
    waiting = asyncio.ensure_future(ask(vllm_engine, prompts[:1], gone[0]))
    await asyncio.sleep(0.1)
    await send(vllm_engine, second)
    await vllm_engine.resume_generation()
    (error,) = await ended([waiting], 30, "requests")
    assert isinstance(error, ConfigurationError), f"an adapter was replaced, and a request that waited got {error!r}"
    with pytest.raises(ConfigurationError, match=gone[0].lora_name):
        await ask(vllm_engine, prompts[:1], gone[0])
    await assert_answers_as(vllm_engine, vllm_trainer, merged(weights, second), prompts[:2])
    gone.append(vllm_engine.lora_request)
    await vllm_engine.offload_states(2)
    await vllm_engine.load_states()
    await vllm_trainer.push(vllm_engine, version)
    for again in (False, True):
        if again:
            await send(vllm_engine, first)
        for request in gone:
            with pytest.raises(ConfigurationError, match=request.lora_name):
                await ask(vllm_engine, prompts[:1], request)
    await assert_answers_as(vllm_engine, vllm_trainer, merged(weights, first), prompts[:2])


@contract(
    "lora-no-accumulation",
    "After 50 adapters, each in the place of the one before, the engine holds one, and its memory has not grown.",
    references=("inclusionAI/AReaL#1385", "PrimeIntellect-ai/prime-rl#2921"),
    needs=("lora", "runtime"),
)
async def test_replaced_adapters_leave(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, prompts: list[list[int]], vllm_device: Device
) -> None:
    kinds = ["cpu", *([vllm_device.kind] if vllm_device.kind == "cuda" else [])]  # of other devices nobody tells
    weights = vllm_trainer.weights(vllm_trainer.reference_version)

    async def replace(count: int) -> None:
        with BucketSender() as bucket:
            for number in range(count):
                tensors = adapter(weights, number)
                for payload in bucket.payloads(tensors):
                    await vllm_engine.update_parameter_in_bucket([payload], is_lora=True)
                await vllm_engine.add_lora(CONFIG)
                if number % 10 == 0:
                    await ask(vllm_engine, prompts[:1], vllm_engine.lora_request)
        assert await vllm_engine.list_loras() == {vllm_engine.lora_request.lora_int_id}
        await assert_answers_as(vllm_engine, vllm_trainer, merged(weights, tensors), prompts[:1])

    await replace(10)
    workers = await pids(vllm_engine)
    before = {kind: memory_held(workers, kind) for kind in kinds}
    await replace(50)
    for kind in kinds:
        grown = memory_held(workers, kind) - before[kind]
        assert grown < 50 * 2**20, f"the engine grew by {grown / 2**20:.0f} MiB ({kind})"
