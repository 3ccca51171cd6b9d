"""The right implementation for each version, and errors that say what to do."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender, RollVllmError, create_async_llm, versions


@contract(
    "vd-range-resolved",
    "Every spelling of a tested version finds its row, any other is announced as untested; never by comparing text.",
    references=("alibaba/ROLL worker.py: '0.10.2' < '0.8.5'",),
    needs=("runtime",),
)
def test_versions_resolve(vllm_version: str, caplog: pytest.LogCaptureFixture) -> None:
    row = versions.resolve(vllm_version)
    assert row is not None, f"the suite runs on {vllm_version}, which no row of the table describes"
    assert versions.same_release(row.release, vllm_version)
    for suffix in ("", "+cu128", ".post2", "rc1", ".dev3+gabc123", ".post1+cpu"):
        assert versions.resolve(row.release + suffix) is row, suffix
    assert not versions.satisfies("0.10.2", "<0.8.5"), "0.10.2 comes after 0.8.5"
    for unknown in ("0.10.20", "0.12.1", "1.12.0", "0.1.2"):
        assert versions.resolve(unknown) is None, unknown
    with caplog.at_level(logging.WARNING):
        versions.warn_if_untested("0.12.99", logging.getLogger("roll_vllm"))
        versions.warn_if_untested(vllm_version, logging.getLogger("roll_vllm"))
    messages = [record.getMessage() for record in caplog.records]
    assert sum("ROLL is not tested on vllm version" in message for message in messages) == 1
    assert "ROLL is not tested on vllm version 0.12.99" in " ".join(messages)


async def _send(engine: EngineHandle, weights: dict[str, Any]) -> None:
    async with engine.weight_update() as update:
        await update.send(weights)


@contract(
    "err-actionable",
    "Every refusal names the cause and the remedy, the rank or the parameter, and the engine stays usable or says not.",
    references=("vllm-project/vllm#49237", "verl-project/verl#7859"),
    needs=("runtime",),
)
async def test_refusals_say_what_to_do(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_engine_args: dict[str, Any], tmp_path: Path
) -> None:
    import torch

    weights = vllm_trainer.weights(vllm_trainer.reference_version)
    name = "model.norm.weight"
    lora = {"r": 8, "lora_alpha": 16}

    def payload(**changes: Any) -> bytes:
        import json

        document = json.loads(next(sender.payloads({name: weights[name]})))
        return json.dumps({**document, **changes}).encode()

    sender = BucketSender()
    engine = vllm_engine
    wide = weights[name].double()
    cases: list[tuple[Callable[[], Awaitable[Any]], list[str]]] = [
        (lambda: engine.offload_states(3), ["sleep level", "1", "2", "3"]),
        (lambda: engine.load_states(["cache"]), ["weights", "kv_cache", "cache"]),
        (lambda: engine.add_lora(lora), ["LoRA", "enable_lora=True"]),
        (lambda: engine.update_parameter_in_bucket([payload()], is_lora=True), ["LoRA", "enable_lora=True"]),
        (lambda: engine.update_parameter_in_bucket([]), ["one payload for each rank"]),
        (lambda: engine.update_parameter_in_bucket([b"\x80\x04."]), ["BucketSender", "pickle", "rank 0"]),
        (lambda: engine.update_parameter_in_bucket([payload(size=8)]), [name, "metadata", "rank 0"]),
        (lambda: engine.update_parameter_in_bucket([payload(segment="/etc/passwd")]), ["segment", "rank 0"]),
        (lambda: engine.update_parameter_in_bucket([payload(tensors=[[name, "float32", [1 << 40], 0]])]), [name]),
        (
            lambda: engine.broadcast_parameter([name], ["float32"], [[4]], "nobody"),
            ["nobody", "setup_collective_group"],
        ),
        (lambda: engine.broadcast_parameter([name], [], [[4]], "nobody"), ["names", "dtypes", "shapes"]),
        (lambda: engine.setup_collective_group("127.0.0.1", 1, 0, 2, "g", "gloo"), ["rank_offset", "world_size"]),
        (lambda: engine.weight_update("pigeon").__aenter__(), ["pigeon", "bucket", "collective"]),
        (lambda: engine.weight_update(running="kill").__aenter__(), ["abort", "wait", "kill"]),
        (lambda: create_async_llm(**{**vllm_engine_args, "modle": "x"}), ["modle", "model"]),
        (lambda: create_async_llm(model=str(tmp_path)), [str(tmp_path), "config.json"]),
        (lambda: create_async_llm(), ["model"]),
        (lambda: create_async_llm([object()], **vllm_engine_args), ["ray", "resource_placement_groups"]),
        (lambda: create_async_llm(**{**vllm_engine_args, "worker_extension_cls": "os.path"}), ["worker_extension_cls"]),
    ]
    with sender:
        for call, words in cases:
            with pytest.raises(RollVllmError) as caught:
                await call()
            missing = [word for word in words if word not in str(caught.value)]
            assert not missing, f"{caught.value!r} does not say {missing}"
    # Refused before anything was written: the engine still serves.
    assert (await engine.state()).ready
    await engine.greedy([[1, 2, 3]], 2)
    for wrong, words in [
        ({**weights, name: wide}, [name, "float64", "cast"]),
        ({**weights, name: torch.cat([weights[name]] * 2)}, [name, "shape"]),
        ({**weights, "no.such.weight": weights[name]}, ["no.such.weight"]),
    ]:
        with pytest.raises(RollVllmError) as caught:
            await _send(engine, wrong)
        missing = [word for word in [*words, "rank 0"] if word not in str(caught.value)]
        assert not missing, f"{caught.value!r} does not say {missing}"
    await vllm_trainer.push(engine, vllm_trainer.reference_version)
    assert (await engine.state()).ready
