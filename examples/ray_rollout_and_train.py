"""Rollout and training on Ray: one trainer, two engines on placement groups, weights broadcast to both at once.

The trainer rewards even tokens. While it learns, the engines sleep; after each step they must say what it says.
Run it with ``tox exec -e vllm0.12.0-cpu -- python examples/ray_rollout_and_train.py``.
"""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group
from transformers import AutoConfig, AutoModelForCausalLM

from pytest_roll_vllm.models import Model, make
from roll_vllm import CollectiveSender, RolloutEngine, create_async_llm
from roll_vllm.environment import free_port

PROMPTS = [[7 * first, 5, 9] for first in range(16)]
SKIP, TOKENS, STEPS = len(PROMPTS[0]), 8, 3
RANKS, GROUP = 3, "weights"  # of the process group by which the weights travel: the trainer, and one for each engine


@ray.remote(num_cpus=1)
class Trainer:
    """A small network; rank 0 of the group."""

    def __init__(self, model: Model) -> None:
        self.network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.path))
        self.network.load_state_dict(model.weights(1))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)

    def join(self, host: str, port: int) -> dict[str, Any]:
        self.sender = CollectiveSender(host, port, RANKS, GROUP, "gloo")
        return self.sender.describe(self.network.state_dict())

    def send(self) -> None:
        self.sender.send(self.network.state_dict())

    def learn(self, rollouts: list[list[int]]) -> float:
        """One step of REINFORCE; returns the mean reward."""
        tokens = torch.tensor(rollouts)
        reward = (tokens[:, SKIP:] % 2 == 0).float()
        logits = self.network(tokens).logits[:, SKIP - 1 : -1]
        surprise = torch.nn.functional.cross_entropy(logits.mT, tokens[:, SKIP:], reduction="none")
        self.optimizer.zero_grad()
        ((reward - reward.mean()) * surprise).mean().backward()
        self.optimizer.step()
        return float(reward.mean())

    def greedy(self) -> list[list[int]]:
        return self.network.generate(torch.tensor(PROMPTS), max_new_tokens=TOKENS, do_sample=False).tolist()


async def rollout(engine: RolloutEngine, prompt: list[int], temperature: float) -> list[int]:
    """The prompt and its answer."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=TOKENS, ignore_eos=True)
    async for output in engine.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex):
        answer = output
    return [*prompt, *answer.outputs[0].token_ids]


async def main(model: Model) -> None:
    trainer, engines, rewards = Trainer.remote(model), [], []
    with ExitStack() as stack:
        for seed in range(RANKS - 1):
            place = (placement_group([{"CPU": 1}]), 0)
            sizes = {"max_model_len": 512, "num_gpu_blocks_override": 64}
            options = {"model": str(model.path), "dtype": model.dtype, "enforce_eager": True, "seed": seed}
            engines.append(await create_async_llm([place], worker_name=f"rollout-{seed}", **options, **sizes))
            stack.callback(engines[-1].shutdown)
        at = (ray.util.get_node_ip_address(), free_port())
        joining = [one.setup_collective_group(*at, rank, RANKS, GROUP, "gloo") for rank, one in enumerate(engines, 1)]
        tensors, *_ = await asyncio.gather(trainer.join.remote(*at), *joining)
        for _ in range(STEPS + 1):
            receiving = [engine.broadcast_parameter(**tensors, group_name=GROUP) for engine in engines]
            await asyncio.gather(trainer.send.remote(), *receiving)  # this wakes the weights
            await asyncio.gather(*(engine.load_states() for engine in engines))  # and this the KV cache
            answers = await asyncio.gather(*(rollout(one, prompt, 0.0) for one in engines for prompt in PROMPTS))
            assert answers == await trainer.greedy.remote() * len(engines)
            rollouts = await asyncio.gather(*(rollout(one, prompt, 1.0) for one in engines for prompt in PROMPTS))
            await asyncio.gather(*(engine.offload_states(level=2) for engine in engines))
            rewards.append(await trainer.learn.remote(rollouts))
            print(f"weight version {engines[0].weight_version}: mean reward {rewards[-1]:.2f}", flush=True)
    assert rewards[-1] > rewards[0] + 0.2, rewards


if __name__ == "__main__":  # the engine's processes import this module again
    with tempfile.TemporaryDirectory() as folder:
        ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
        asyncio.run(main(make("random", Path(folder))))
