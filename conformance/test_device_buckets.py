"""Weights that a trainer holds on the engine's own GPU go there directly, and leave nothing behind."""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance.oracles import assert_holds, assert_says
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.models import Model
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import BucketSender
from roll_vllm.transfer.manifest import BucketManifest

if TYPE_CHECKING:
    import torch

MiB = 2**20
BALLAST = 1024 * MiB  # bytes; what a device gives and takes otherwise is little against it
RETURNED_WITHIN_S = 5.0


@pytest.fixture
def vllm_model(vllm_model_factory: Callable[[str], Model]) -> Model:
    return vllm_model_factory("counting")


direct = contract(
    "wu-bucket-on-device",
    "Tensors on the engine's own GPU go to it by memory of that GPU, exactly, from whatever process and under whatever "
    "number it sees the GPU; the memory is free again once the sender has closed, or has died.",
    references=("verl-project/verl#6958", "THUDM/slime#1731", "vllm-project/vllm#51258"),
    backends=("cuda", "rocm"),
    needs=("runtime",),
)


def on_device(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cuda:0") for name, tensor in weights.items()}


def assert_direct(sender: BucketSender, weights: dict[str, torch.Tensor]) -> None:
    """All of it goes by the device: this proves nothing if it goes through the host."""
    assert {BucketManifest.decode(payload).memory for payload in sender.payloads(weights)} == {"device"}


@direct
@pytest.mark.parametrize("bucket_bytes", [4096, 256 * MiB])
async def test_packed(vllm_engine: EngineHandle, vllm_trainer: Trainer, bucket_bytes: int) -> None:
    version = vllm_trainer.reference_version
    with BucketSender(bucket_bytes) as sender:
        assert_direct(sender, on_device(vllm_trainer.weights(version)))
        for step in (1, 2, 3):  # the first is learned, the others are replayed
            async with vllm_engine.weight_update(sender=sender) as update:
                await update.send(on_device(vllm_trainer.weights(version + step)))
            await assert_holds(vllm_engine, vllm_trainer, version + step)
    await assert_says(vllm_engine, vllm_trainer, version + 3)


@direct
async def test_shared(vllm_engine: EngineHandle, vllm_trainer: Trainer) -> None:
    version = vllm_trainer.reference_version
    weights = on_device(vllm_trainer.weights(version))
    with BucketSender() as sender:
        sender.share(weights)
        assert_direct(sender, weights)
        for step in (1, 2, 3):
            for name, tensor in vllm_trainer.weights(version + step).items():
                weights[name].copy_(tensor)  # trained in place, and not waited for
            async with vllm_engine.weight_update(sender=sender) as update:
                await update.send(weights)
            await assert_holds(vllm_engine, vllm_trainer, version + step)
            await vllm_engine.offload_states(step % 2 + 1)
            await vllm_engine.load_states()
    await vllm_trainer.push(vllm_engine, version)
    await assert_says(vllm_engine, vllm_trainer, version)


async def assert_returned(free: int) -> None:
    """The device has as much free memory again, soon."""
    import torch

    torch.cuda.empty_cache()
    end = time.monotonic() + RETURNED_WITHIN_S
    while (now := torch.cuda.mem_get_info(0)[0]) < free - BALLAST // 8 and time.monotonic() < end:
        await asyncio.sleep(0.1)
    assert now >= free - BALLAST // 8, f"{free - now} bytes of the device are still taken"


@direct
@pytest.mark.parametrize("shared", [False, True], ids=["packed", "shared"])
async def test_memory_returns(vllm_engine: EngineHandle, vllm_trainer: Trainer, shared: bool) -> None:
    import torch

    version = vllm_trainer.reference_version + 1
    torch.zeros(1, device="cuda:0")  # the context itself takes memory
    await vllm_trainer.push(vllm_engine, version)
    free, _ = torch.cuda.mem_get_info(0)
    weights = on_device(vllm_trainer.weights(version + 1))
    ballast = torch.zeros(BALLAST, dtype=torch.uint8, device="cuda:0")
    with BucketSender(2 * BALLAST) as sender:
        if shared:  # in one segment with the weights
            sender.share({**weights, "ballast": ballast})
        async with vllm_engine.weight_update(sender=sender) as update:
            await update.send(weights)
        assert torch.cuda.mem_get_info(0)[0] < free - BALLAST // 2, "nothing was taken, so this proves nothing"
        await assert_holds(vllm_engine, vllm_trainer, version + 1)
    del ballast, weights
    await assert_returned(free)
    await assert_says(vllm_engine, vllm_trainer, version + 1)


@pytest.fixture
def other_trainer(vllm_trainer: Trainer, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a trainer's process that shares a version; returns it and its payloads."""
    from safetensors.torch import save_file

    started: list[subprocess.Popen[str]] = []

    def start(version: int, **variables: str) -> tuple[subprocess.Popen[str], list[bytes]]:
        checkpoint = tmp_path / f"{version}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in vllm_trainer.weights(version).items()}, checkpoint)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **variables}
        command = [sys.executable, "-m", "conformance.device_trainer", str(checkpoint)]
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "\n")
        payloads = [base64.b64decode(line) for line in lines if line]
        return process, payloads

    yield start
    for process in started:
        process.kill()
        process.communicate()


@direct
async def test_other_numbering(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, other_trainer: Callable[..., Any]
) -> None:
    """A trainer's process that knows the GPU by its name, as the first of its own, and dies after the update."""
    import torch

    version = vllm_trainer.reference_version + 1
    (identity, *_) = await vllm_engine.device_identities()
    devices = [torch.cuda.get_device_properties(index).uuid for index in range(torch.cuda.device_count())]
    names = [f"GPU-{identity}", *(f"GPU-{uuid}" for uuid in devices if str(uuid) != identity)]
    process, payloads = other_trainer(version, CUDA_VISIBLE_DEVICES=",".join(names))
    assert {BucketManifest.decode(payload).memory for payload in payloads} == {"device"}
    for payload in payloads:
        await vllm_engine.update_parameter_in_bucket([payload])
    await assert_holds(vllm_engine, vllm_trainer, version)
    process.kill()
    process.wait()
    await asyncio.sleep(1)
    await vllm_trainer.push(vllm_engine, version + 1)
    await assert_holds(vllm_engine, vllm_trainer, version + 1)
    await assert_says(vllm_engine, vllm_trainer, version + 1)
