"""The figures for engines of two ranks: ``python -m benchmarks.ranks``.

Measures, under multiprocessing and under Ray, a weight update by the bucket transport against one plain copy of the
same bytes to each rank's share, and time to first token and tokens per second against vLLM's own engine. Each engine
lives in a process tree of its own, and the trees that are not on turn are stopped: idle workers of vLLM spin. vLLM's
own Ray executor runs on the CPU by the reference platform only. Prints a table and writes ``bench-ranks.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import uuid
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import fastest, medians, ratio, table, timed, write

RANKS = 2
#: The most that each figure may be: an update in plain copies, generation in times of vLLM's.
TARGETS = {"update, shared tensors": 2.2, "time to first token": 1.03, "time per token": 1.03}

_GENERATION = ("time to first token", "time per token")
_FIRST_TOKENS, _REQUESTS, _LENGTH = 3, 8, 24  # in a round: requests for one token; requests at once, and their tokens


def model(cache_dir: Path) -> Path:
    """SmolLM2-135M with 8 heads in place of 9 and 4 of keys in place of 3, which two ranks can share; no weights."""
    from pytest_roll_vllm.models import make
    from pytest_roll_vllm.models.cache import publish

    original = make("smollm2", cache_dir).path
    config = json.loads((original / "config.json").read_text())
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}

    def fill(directory: Path) -> None:
        for file in original.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, directory)
        (directory / "config.json").write_text(json.dumps(config, indent=2))

    return publish(cache_dir, "smollm2-even", hashlib.sha256(json.dumps(config).encode()).hexdigest(), fill)


# -- in the process of one engine ---------------------------------------------------------------------------


def serve(ours: bool, executor: str, path: str, address: str, pipe: Connection) -> None:
    """Start an engine and answer the calls that come through the pipe, until one is None."""
    asyncio.run(_serve(ours, executor, path, address, pipe))


async def _serve(ours: bool, executor: str, path: str, address: str, pipe: Connection) -> None:
    if executor == "ray":
        import ray

        os.environ["RAY_ADDRESS"] = address
        ray.init(log_to_driver=False)
    arguments = {
        "model": path, "dtype": "bfloat16", "tensor_parallel_size": RANKS, "distributed_executor_backend": executor,
        "enforce_eager": True, "enable_prefix_caching": False, "max_model_len": 512, "max_num_seqs": _REQUESTS,
        "num_gpu_blocks_override": 64, "seed": 0,
    }  # fmt: skip
    engine = await (_ours(arguments) if ours else _vllm(arguments))
    try:
        pipe.send("started")
        while (call := await asyncio.to_thread(pipe.recv)) is not None:
            method, *args = call
            pipe.send(await {"generate": generate, "update": update}[method](engine, *args))
    finally:
        engine.shutdown()


async def _ours(arguments: dict[str, Any]) -> Any:
    from roll_vllm import create_async_llm

    return await create_async_llm(worker_name="bench-ranks", allow_dummy_weights=True, **arguments)


async def _vllm(arguments: dict[str, Any]) -> Any:
    from roll_vllm import backends, devices, versions

    installed = versions.installed()
    assert installed is not None
    # vLLM would bind the ranks to NUMA nodes that most hosts do not have; both get the same threads.
    os.environ.update(backends.of(devices.detect()).worker_environment(installed.version, os.environ, RANKS))
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(load_format="dummy", **arguments))


async def generate(engine: Any, seed: int) -> dict[str, Any]:
    """One round: seconds to the first token of single requests, and per token of several at once."""
    from vllm import SamplingParams

    random_ids = random.Random(seed)

    async def one(tokens: int) -> list[int]:
        prompt = [random_ids.randrange(1000, 40000) for _ in range(64)]
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        async for output in engine.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex):
            answer = list(output.outputs[0].token_ids)
        return answer

    await one(2)  # the caches of a process that was stopped are cold
    first = [await timed(lambda: one(1)) for _ in range(_FIRST_TOKENS)]
    answers: list[list[int]] = []

    async def several() -> None:
        answers.extend(await asyncio.gather(*(one(_LENGTH) for _ in range(_REQUESTS))))

    seconds = await timed(several)
    return {
        "time to first token": first,
        "time per token": [seconds / (_REQUESTS * _LENGTH)],
        "answers": answers,
    }


async def update(engine: Any, rounds: int) -> dict[str, Any]:
    """Update the engine over and over, by each way of sending, beside plain copies of the same bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from roll_vllm import BucketSender

    config = AutoConfig.from_pretrained(engine.vllm_config.model_config.model)
    network = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    packed = {name: tensor.detach() for name, tensor in network.named_parameters()}  # a tied head is left out
    shared = {name: tensor.neg() for name, tensor in packed.items()}
    size = sum(tensor.nbytes for tensor in packed.values())
    whole = sum(tensor.nbytes for name, tensor in packed.items() if "norm" in name)  # what every rank holds
    share = (size - whole) // RANKS + whole
    for worker in (await engine.state()).workers:
        held = worker.resident_bytes.get("weights", share)
        assert share <= held < 1.1 * share, f"a rank holds {held} bytes, and its share is {share}"
    sources = [torch.ones(share, dtype=torch.uint8) for _ in range(RANKS)]
    targets = [torch.zeros(share, dtype=torch.uint8) for _ in range(RANKS)]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    seconds: dict[str, list[float]] = {"plain copy": [], "update, shared tensors": [], "update, packed tensors": []}
    with BucketSender(bucket_bytes=2 * size) as packing, BucketSender() as sharing:
        sharing.share(shared)

        async def send(weights: dict[str, Any], sender: BucketSender) -> None:
            async with engine.weight_update(sender=sender) as session:
                await session.send(weights)

        first = await timed(lambda: send(packed, packing))
        sums = await engine.checksums()
        for turn in range(rounds + 3):
            with only(psutil.Process()):  # the copy has the cores to itself
                copying = await timed(copy)
            by_sharing = await timed(lambda: send(shared, sharing))
            if not turn:
                changed = [one != other for one, other in zip(sums, await engine.checksums(), strict=True)]
                assert changed == [True] * RANKS, "the update did not arrive"
            by_packing = await timed(lambda: send(packed, packing))
            if turn >= 3:
                for times, one in zip(seconds.values(), (copying, by_sharing, by_packing), strict=True):
                    times.append(one)
    base = seconds["plain copy"]
    return {
        "bytes": size,
        "bytes_of_a_rank": share,
        "threads_of_the_copy": torch.get_num_threads(),
        "first_update_s": first,
        "seconds": seconds,
        "median_s": medians(seconds),
        "ratio_to_plain_copy": {name: ratio(times, base) for name, times in seconds.items()},
        "ratio_of_fastest": {name: fastest(times, base) for name, times in seconds.items()},
    }


# -- in the process that compares them ----------------------------------------------------------------------


@contextlib.contextmanager
def only(process: psutil.Process) -> Iterator[None]:
    """Stop what the process has started."""
    children = process.children(recursive=True)
    try:
        for child in children:
            child.suspend()
        yield
    finally:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.resume()


class Contender:
    """An engine in a process tree of its own, which runs only while it answers a call."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        # Not a daemon, which could have no children.
        self._process = context.Process(target=serve, args=(*arguments, end))
        self._process.start()
        end.close()
        self._pipe.recv()
        self._each("suspend")

    def __call__(self, *call: Any) -> Any:
        self._each("resume")
        self._pipe.send(call)
        answer = self._pipe.recv()
        self._each("suspend")
        return answer

    def close(self) -> None:
        self._each("resume")
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join(60)
        if self._process.is_alive():
            self._process.terminate()

    def _each(self, action: str) -> None:
        root = psutil.Process(self._process.pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, action)()


def compare(executor: str, path: Path, rounds: int, address: str, both: bool) -> dict[str, Any]:
    """The figures of our engine under an executor, and beside it vLLM's, if there is one."""
    engines: dict[str, Contender] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    try:
        for name in ("ours", "vllm") if both else ("ours",):
            engines[name] = Contender(name == "ours", executor, str(path), address)
            answers[name] = []
        for turn in range(rounds + 1):
            order = list(engines) if turn % 2 else list(reversed(engines))
            for name in order:
                answer = engines[name]("generate", turn)
                if turn:
                    answers[name].append(answer)
        updates = engines["ours"]("update", rounds)
    finally:
        for engine in engines.values():
            engine.close()
    seconds = {
        name: {what: [one for answer in given for one in answer[what]] for what in _GENERATION}
        for name, given in answers.items()
    }
    results: dict[str, Any] = {"weight_update": updates, "generation_s": seconds}
    results["median_s"] = {name: medians(each) for name, each in seconds.items()}
    results["tokens_per_s"] = {name: 1 / each["time per token"] for name, each in results["median_s"].items()}
    if both:
        # The same weights, computed alike: a difference would mean that the two did not do the same work.
        results["same_answers"] = [a["answers"] == b["answers"] for a, b in zip(*answers.values(), strict=True)]
        pairs = {what: (seconds["ours"][what], seconds["vllm"][what]) for what in _GENERATION}
        results["ratio_to_vllm"] = {what: ratio(*pair) for what, pair in pairs.items()}
        results["ratio_of_fastest"] = {what: fastest(*pair) for what, pair in pairs.items()}
    return results


def rows(executor: str, results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The lines of the table for one executor."""
    updates, ours = results["weight_update"], results["median_s"]["ours"]
    against = {**updates["ratio_to_plain_copy"], **results.get("ratio_to_vllm", {})}
    best = {**updates["ratio_of_fastest"], **results.get("ratio_of_fastest", {})}
    lines = []
    for name, seconds in {**updates["median_s"], **ours}.items():
        ratio_text = f"{against[name]:.2f} ({best[name]:.2f})" if name in against else "vLLM has none"
        target = f"<= {TARGETS[name]}" if name in TARGETS and name in against else ""
        lines.append((f"{executor}: {name}", f"{1000 * seconds:.1f} ms", ratio_text, target))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executors", nargs="+", choices=("mp", "ray"), default=["mp", "ray"])
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default: 15)")
    parser.add_argument("--output", type=Path, default=Path("bench-ranks.json"), help="default: bench-ranks.json")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "pytest-roll-vllm")
    options = parser.parse_args()

    from roll_vllm import backends, devices

    reference = backends.of(devices.detect()).name == "cpu-reference"
    path = model(options.cache_dir / "models")
    results: dict[str, Any] = {"rounds": options.rounds, "ranks": RANKS, "targets": TARGETS}
    lines = [("what", "median", "ratio (of the fastest)", "target")]
    for executor in options.executors:
        if executor == "ray":
            from pytest_roll_vllm.ray_cluster import RayCluster

            cluster = RayCluster(resource="GPU", devices=RANKS)  # by GPUs vLLM's own executor counts its ranks
            try:
                results[executor] = compare(executor, path, options.rounds, cluster.address, reference)
            finally:
                cluster.close()
        else:
            results[executor] = compare(executor, path, options.rounds, "", True)
        lines += rows(executor, results[executor])
        write(options.output, results)
    print("updates: ratio to a plain copy; generation: ratio to vLLM's own engine; medians, lower is better")
    print(table(lines))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
