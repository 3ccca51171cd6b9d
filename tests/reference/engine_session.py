"""One engine on the reference platform, from start to end, as a program: what it did is printed as one JSON object.

Every session is a process of its own, since a process has one engine generation. Usage::

    python engine_session.py '{"kind": "random", "cache_dir": "/tmp/models", "dtype": "float32", "ranks": 1, ...}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KV_BLOCKS = 512


class Extension:
    """What the session asks of the workers."""

    def session_load(self, kind: str, cache_dir: str, version: int) -> None:
        from pytest_roll_vllm.models import make

        self.model_runner.get_model().load_weights(make(kind, Path(cache_dir)).weights(version).items())

    def session_watch(self) -> None:
        """From now on note how many tokens go into each step."""
        self.session_steps: list[int] = []
        runner = self.model_runner
        execute = runner.execute_model

        def watched(*args: Any, **kwargs: Any) -> Any:
            if args:  # V1
                self.session_steps.append(args[0].total_num_scheduled_tokens)
            else:
                self.session_steps.append(kwargs["model_input"].input_tokens.numel())
            return execute(*args, **kwargs)

        runner.execute_model = watched

    def session_take_steps(self) -> list[int]:
        steps, self.session_steps = self.session_steps, []
        return steps

    def session_describe(self) -> dict[str, Any]:
        from vllm.platforms import current_platform

        return {
            "device": current_platform.get_device_name(),
            "worker": type(self).__module__,
            "kv_shapes": [list(tensor.shape) for tensor in self.model_runner.kv_caches],
        }


def main(options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    from pytest_roll_vllm.models import make

    where = (options["kind"], options["cache_dir"])
    llm = LLM(
        model=str(make(where[0], Path(where[1])).path),
        load_format="dummy",
        dtype=options["dtype"],
        tensor_parallel_size=options["ranks"],
        distributed_executor_backend="mp" if options["ranks"] > 1 else None,
        worker_extension_cls="engine_session.Extension",
        enable_prefix_caching=True,
        num_gpu_blocks_override=KV_BLOCKS,
        max_num_seqs=32,
        seed=0,
    )

    def generate(prompts: list[list[int]], **params: Any) -> list[Any]:
        return llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], SamplingParams(**params), use_tqdm=False
        )

    def greedy() -> list[list[int]]:
        outputs = generate(options["prompts"], temperature=0.0, max_tokens=options["max_tokens"])
        return [list(output.outputs[0].token_ids) for output in outputs]

    said: dict[str, Any] = {"workers": llm.collective_rpc("session_describe")}
    for version in options["versions"]:
        llm.collective_rpc("session_load", args=(*where, version))
        llm.reset_prefix_cache()
        said[f"greedy {version}"] = greedy()
    said["greedy again"] = greedy()

    llm.collective_rpc("session_watch")
    said["steps"], said["cached"] = [], []
    for _ in range(2):
        (output,) = generate([options["long_prompt"]], temperature=0.0, max_tokens=2)
        said["steps"].append(llm.collective_rpc("session_take_steps")[0])
        said["cached"].append(output.num_cached_tokens)

    (sampled,) = generate([options["prompts"][0]], temperature=1.0, n=3, max_tokens=8, seed=1, logprobs=2)
    said["sampled"] = [list(sample.token_ids) for sample in sampled.outputs]
    said["logprobs"] = [
        [step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)]
        for sample in sampled.outputs
    ]

    engine = llm.llm_engine
    engine.add_request("victim", {"prompt_token_ids": options["prompts"][0]}, SamplingParams(max_tokens=200))
    engine.step()
    running = engine.has_unfinished_requests()
    engine.abort_request(["victim"])
    said["abort"] = [running, engine.has_unfinished_requests()]
    said["greedy after abort"] = greedy()
    return said


if __name__ == "__main__":
    result = main(json.loads(sys.argv[1]))
    print("\n" + json.dumps(result))
