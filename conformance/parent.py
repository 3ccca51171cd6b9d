"""A user's own script, for the tests that kill it: starts an engine, says so, and waits.

Run as ``python -m conformance.parent '{"engine": {"model": ...}}'``, with what :func:`main` takes as JSON. It prints a
line of JSON when the engine is up, shuts the engine down at the first line that it reads, and ends at the second.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any


async def main(engine: dict[str, Any], generate: bool = False, ray: dict[str, Any] | None = None) -> None:
    """Do what the module says.

    Args:
        engine: arguments of ``create_async_llm``.
        generate: whether to generate something, from whatever the weights are.
        ray: ``address`` of a cluster and ``bundles`` of the placement group to make there; None without Ray.
    """
    from roll_vllm import create_async_llm

    if ray is not None:
        engine = {**engine, "distributed_executor_backend": "ray", "resource_placement_groups": places(**ray)}
    started = await create_async_llm(allow_dummy_weights=generate, **engine)
    tokens: list[int] = []
    if generate:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=2, ignore_eos=True)
        async for output in started.generate({"prompt_token_ids": [1, 2, 3]}, params, request_id="1"):
            tokens = list(output.outputs[0].token_ids)
    ports = [values["VLLM_PORT"] for values in await started.worker_environment(["VLLM_PORT"])]
    workers = [worker.pid for worker in (await started.state()).workers]
    seed = started.vllm_config.model_config.seed
    said = {"pid": os.getpid(), "workers": workers, "ports": ports, "seed": seed, "tokens": tokens}
    print(json.dumps(said), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    started.shutdown()
    await asyncio.to_thread(sys.stdin.readline)


def places(address: str, bundles: list[dict[str, float]]) -> list[tuple[Any, int]]:
    """Make a placement group, as a user does."""
    import ray
    from ray.util.placement_group import placement_group

    ray.init(address=address, log_to_driver=False)
    group = placement_group(bundles)
    if not group.wait(60):
        sys.exit(f"no room for {bundles}: {ray.available_resources()}")
    return [(group, index) for index in range(len(bundles))]


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
