"""One engine through a training step: refused, fed, asked, put to sleep, fed again, woken, asked.

The counting model makes the effect visible: with version k of its weights, each token is the last one plus k.
Run it with ``tox exec -e vllm0.12.0-cpu -- python examples/rollout_and_update.py``.
"""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from pathlib import Path
from typing import Any

from pytest_roll_vllm.models import make
from roll_vllm import WeightsNotReadyError, create_async_llm


async def ask(engine: Any, prompt: list[int]) -> Any:
    """The greedy continuation, five tokens long."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    async for output in engine.generate({"prompt_token_ids": prompt}, params, request_id=uuid.uuid4().hex):
        answer = output
    return answer


async def show(engine: Any, prompt: list[int]) -> None:
    answer = await ask(engine, prompt)
    print(f"weight version {answer.weight_version}: {prompt} -> {list(answer.outputs[0].token_ids)}")


async def main(folder: Path) -> None:
    trainer = make("counting", folder)  # stands in for a trainer: a checkpoint for every version of the weights
    engine = await create_async_llm(
        model=str(trainer.path),
        dtype=trainer.dtype,
        worker_name="example",  # the next start finds this one's caches
        enforce_eager=True,
        max_model_len=512,
        num_gpu_blocks_override=64,  # on a CPU, vLLM would take 4 GiB for the KV cache
    )
    try:
        try:
            await ask(engine, [10, 20])
        except WeightsNotReadyError as error:
            print(f"before the first update: {error}")

        async with engine.weight_update() as update:
            await update.send(trainer.weights(1))
        await show(engine, [10, 20])

        await engine.offload_states(level=2)
        print(f"asleep: {sorted((await engine.state()).sleeping)}")

        async with engine.weight_update() as update:  # wakes the weights, not the KV cache
            await update.send(trainer.weights(3))
        print(f"after an update: {sorted((await engine.state()).sleeping)} still asleep")

        await engine.load_states()
        await show(engine, [10, 20])
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the engine's processes import this module again
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(main(Path(temporary)))
