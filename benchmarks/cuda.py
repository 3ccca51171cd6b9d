"""The figures for one NVIDIA GPU, and for two: ``python -m benchmarks.cuda``.

The model has the shape of Qwen2-7B (15.2 GB) and dummy weights. Each section runs in a process tree of its own:

- ``update``: weights on the trainer's side of the same GPU sent to the engine by each way of sending, against one plain
  copy of the same bytes on the device, and the device memory that this takes for a while;
- ``sleep``: level 1 against what the host's link can do, measured in the same run, and level 2 against vLLM's own;
- ``generation``: tokens per second against vLLM's own engine, eager and with CUDA graphs;
- ``broadcast``: an update over a process group from a second GPU, against one broadcast by ``torch.distributed``.

An engine and the one that it is compared with take turns in every round. A section that fails is an error in the table
and in ``bench-cuda.json``, and the others run all the same. ``--device cpu`` with a small model tries the code out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.measure import medians, ratio, side_by_side, table, timed, write
from roll_vllm.worker.extension import RollVllmWorkerExtension

if TYPE_CHECKING:
    import torch

_MIB = 2**20

#: How each ratio must compare with its limit.
TARGETS: Mapping[str, tuple[str, float]] = {
    "update, shared tensors": ("<=", 1.5),
    "first update, shared tensors": ("<=", 3.0),
    "first sleep, level 1": ("<=", 3.0),
    "first wake, level 1": ("<=", 3.0),
    "sleep, level 1": ("<=", 1.2),
    "wake, level 1": ("<=", 1.2),
    "sleep and wake, level 2": ("<=", 1.1),
    "generation, eager": (">=", 0.99),
    "generation, CUDA graphs": (">=", 0.99),
    "update, broadcast": (">=", 0.8),
    # Of one bucket and as much again as torch and the driver may keep for themselves.
    "device memory of an update, shared tensors": ("<=", 1.0),
    "device memory of an update, packed tensors": ("<=", 1.0),
}
_SPARE_BYTES = 256 * _MIB

#: What `--only` takes, and the sections that this stands for.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "update": ("update",),
    "sleep": ("sleep",),
    "generation": ("generation-eager", "generation-graphs"),
    "broadcast": ("broadcast",),
}

_PROMPT = 64  # tokens
_WARM_UP = 3  # rounds; the clocks of an idle GPU are low
_SLOW_ROUNDS = 2  # of what takes seconds
_LINK_BYTES = 2**31
_LINK_ROUNDS = 5

Report = Callable[[dict[str, Any]], None]


# -- figures ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the table: a median, and the ratio that it is judged by."""

    what: str
    value: float
    unit: str
    ratio: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the ratio keeps to its target; None where there is none."""
        if self.ratio is None or self.what not in TARGETS:
            return None
        sign, limit = TARGETS[self.what]
        return self.ratio <= limit if sign == "<=" else self.ratio >= limit

    def row(self) -> tuple[str, str, str, str]:
        """The line, as text."""
        target = ""
        if self.what in TARGETS:
            sign, limit = TARGETS[self.what]
            word = {True: "met", False: "MISSED", None: "not judged"}[self.met]
            target = f"{sign} {limit:g}: {word}"
        return self.what, shown(self.value, self.unit), "" if self.ratio is None else f"{self.ratio:.3f}", target

    def as_dict(self) -> dict[str, Any]:
        """The line, as data."""
        return {**dataclasses.asdict(self), "target": TARGETS.get(self.what), "met": self.met}


def shown(value: float, unit: str) -> str:
    """A value in a unit that suits its size."""
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
    if unit == "B":
        return f"{value / _MIB:.0f} MiB"
    if unit == "B/s":
        return f"{value / 1e9:.2f} GB/s"
    return f"{value:.0f} {unit}"


def rows(name: str, result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The lines of the table for one section, whatever became of it."""
    lines = [
        Figure(each["what"], each["value"], each["unit"], each["ratio"]).row() for each in result.get("figures", ())
    ]
    if "skipped" in result:
        lines.append((name, "skipped", result["skipped"], ""))
    for what, text in errors(name, result).items():
        lines.append((what, "ERROR", text.strip().splitlines()[-1][:100] if text.strip() else "unknown", ""))
    return lines


def errors(name: str, result: Mapping[str, Any]) -> dict[str, str]:
    """What went wrong in a section, by the part of it."""
    found: dict[str, str] = dict(result.get("errors", {}))
    if "error" in result:
        found[name] = result["error"]
    return found


def status(results: Mapping[str, Mapping[str, Any]], check: bool) -> int:
    """The exit status: 1 when something failed, and with `check` also when a target was missed."""
    failed = any(errors(name, result) for name, result in results.items())
    missed = any(each["met"] is False for result in results.values() for each in result.get("figures", ()))
    return int(failed or (check and missed))


# -- the model ----------------------------------------------------------------------------------------------


def configuration(layers: int, hidden: int) -> dict[str, Any]:
    """The ``config.json`` of Qwen2-7B, in another size if asked for."""
    heads = hidden // 128 or hidden // 32
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": -(-hidden * 18944 // (3584 * 64)) * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": math.gcd(heads, 4),
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 152064,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of the checkpoint, by their names in it."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def size_of(config: Mapping[str, Any]) -> int:
    """Bytes of the checkpoint in bfloat16."""
    return 2 * sum(math.prod(shape) for shape in shapes(config).values())


def model(config: Mapping[str, Any], cache_dir: Path) -> Path:
    """A directory with the configuration and nothing else."""
    from pytest_roll_vllm.models.cache import publish

    text = json.dumps(config, indent=2)

    def fill(directory: Path) -> None:
        (directory / "config.json").write_text(text)

    return publish(cache_dir / "models", "qwen2-shape", hashlib.sha256(text.encode()).hexdigest(), fill)


def random_weights(config: Mapping[str, Any], device: str) -> dict[str, torch.Tensor]:
    """Random tensors of the checkpoint, the same every time."""
    import torch

    generator = torch.Generator(device).manual_seed(1)
    weights = {}
    for name, shape in shapes(config).items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        weights[name] = tensor.normal_(0, 0.02, generator=generator)
    return weights


# -- engines ------------------------------------------------------------------------------------------------


class Synchronising(RollVllmWorkerExtension):
    """Adds a call that returns when the worker's device has nothing left to do."""

    def bench_synchronize(self) -> None:
        """Wait for the device: copies go on after the call that asked for them."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def engine_arguments(options: argparse.Namespace, eager: bool = True) -> dict[str, Any]:
    """What every engine here is started with, ours and vLLM's."""
    length = _PROMPT + options.tokens
    arguments: dict[str, Any] = {
        "model": str(model(configuration(options.layers, options.hidden), options.cache_dir)),
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": eager,
        "enable_prefix_caching": False,
        "max_model_len": max(512, length),
        "max_num_seqs": options.requests,
        "max_num_batched_tokens": max(4096, length),
        # Small, so that there is room for a second engine, or for the trainer.
        "num_gpu_blocks_override": options.requests * (length // 16 + 2),
        "seed": 0,
    }
    if options.device == "cuda":
        # More than an engine takes: while two start at once, vLLM counts what the other one takes as its own.
        arguments |= {"gpu_memory_utilization": 0.6, "enable_sleep_mode": True}
    if not eager:
        arguments["compilation_config"] = {"cudagraph_capture_sizes": _capture_sizes(options.requests)}
    return arguments


def _capture_sizes(requests: int) -> list[int]:
    """Powers of two up to the number of requests, and that number: every size more is a graph more to capture."""
    return sorted({2**power for power in range(requests.bit_length())} | {requests})


async def _ours(arguments: Mapping[str, Any], name: str) -> Any:
    from roll_vllm import create_async_llm

    own = {key: value for key, value in arguments.items() if key != "enable_sleep_mode"}  # always on
    return await create_async_llm(
        worker_name=f"bench-cuda-{name}",
        allow_dummy_weights=True,
        worker_extension_cls="benchmarks.cuda.Synchronising",  # its own module has another name in a spawned process
        **own,
    )


async def _vllm(arguments: Mapping[str, Any]) -> Any:
    from roll_vllm import backends, devices, versions

    installed = versions.installed()
    assert installed is not None
    os.environ.update(backends.of(devices.detect()).worker_environment(installed.version, os.environ, 1))
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


async def serve_engine(pipe: Connection, ours: bool, arguments: Mapping[str, Any], name: str) -> None:
    """Start an engine, and answer calls for it."""
    engine = await (_ours(arguments, name) if ours else _vllm(arguments))
    try:
        await _answer(
            pipe,
            {
                "generate": lambda *args: generate(engine, *args),
                "nap": lambda level: nap(engine, level),
                "host_memory": host_memory,
            },
        )
    finally:
        engine.shutdown()


async def generate(engine: Any, seed: int, requests: int, tokens: int) -> dict[str, Any]:
    """Seconds for several requests at once, and what they answered."""
    from vllm import SamplingParams

    draw = random.Random(seed)
    prompts = [[draw.randrange(1000, 40000) for _ in range(_PROMPT)] for _ in range(requests)]
    answers: list[list[int]] = []

    async def one(prompt: list[int]) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        async for output in engine.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex):
            answer = list(output.outputs[0].token_ids)
        return answer

    async def several() -> None:
        answers.extend(await asyncio.gather(*map(one, prompts)))

    seconds = await timed(several)
    assert all(len(answer) == tokens for answer in answers), "a request ended early"
    return {"seconds": seconds, "answers": answers}


async def nap(engine: Any, level: int) -> dict[str, Any]:
    """Seconds to sleep at the level, and to wake; both engines have these calls under vLLM's names."""
    return {
        "sleep": await timed(lambda: engine.sleep(level)),
        "host_memory_asleep": await host_memory(),
        "wake": await timed(lambda: engine.wake_up()),
    }


async def host_memory() -> dict[str, int]:
    """Bytes of host memory of the processes that this one has started, and what the host has left.

    What a driver pins is in no count of a process, depending on its version, so the last one is here to compare.
    """
    sums = dict.fromkeys(("VmRSS", "RssAnon", "RssShmem", "VmLck", "VmPin"), 0)
    for child in psutil.Process().children(recursive=True):
        for name, size in _kilobytes(Path(f"/proc/{child.pid}/status")).items():
            if name in sums:
                sums[name] += 1024 * size
    return {**sums, "MemAvailable": 1024 * _kilobytes(Path("/proc/meminfo")).get("MemAvailable", 0)}


def _kilobytes(path: Path) -> dict[str, int]:
    """The lines of a file in /proc that end with kB."""
    try:
        lines = path.read_text().splitlines()
    except OSError:  # the process has just ended
        return {}
    fields = (line.replace(":", " ").split() for line in lines if line.endswith("kB"))
    return {name: int(size) for name, size, _ in fields}


async def serve_peer(pipe: Connection, rank: int, port: int, device: str, size: int) -> None:
    """One of two plain processes, and one large tensor that goes from rank 0 to rank 1."""
    import torch
    import torch.distributed as distributed

    from roll_vllm import environment

    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        os.environ.update(environment.one_host_environment(os.environ))
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    tensor = torch.full((size,), rank, dtype=torch.uint8, device=device)

    def send() -> None:
        distributed.broadcast(tensor, 0)
        if on_gpu:
            torch.cuda.synchronize()

    async def seconds() -> float:
        taken = await timed(send)
        assert not int(tensor[-1]), "nothing arrived"
        return taken

    try:
        await _answer(pipe, {"broadcast": seconds})
    finally:
        distributed.destroy_process_group()


# -- processes ----------------------------------------------------------------------------------------------


class Child:
    """A process that serves calls: it starts at once, and :meth:`ready` waits for it.

    Args:
        serve: what runs there, given its end of the pipe and the arguments.
        arguments: for it.
    """

    def __init__(self, serve: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        # Not a daemon, which could have no children.
        self._process = context.Process(target=_child, args=(serve, end, arguments))
        self._process.start()
        end.close()

    def ready(self) -> None:
        """Wait until it serves."""
        self.receive()

    def __call__(self, *call: Any) -> Any:
        self.send(*call)
        return self.receive()

    def send(self, *call: Any) -> None:
        """Make a call, and do not wait."""
        self._pipe.send(call)

    def receive(self) -> Any:
        """Wait for the answer.

        Raises:
            RuntimeError: the call failed, or the process ended.
        """
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            raise RuntimeError(f"process {self._process.pid} ended with status {self._process.exitcode}") from None
        if kind == "error":
            raise RuntimeError(f"in process {self._process.pid}:\n{value}")
        return value

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(30)
        if self._process.is_alive():
            self._process.terminate()


def _child(serve: Callable[..., Awaitable[None]], pipe: Connection, arguments: Sequence[Any]) -> None:
    try:
        asyncio.run(serve(pipe, *arguments))  # type: ignore[arg-type]
    except EOFError:
        pass  # nobody asks any more
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send(("error", traceback.format_exc()))
        raise


async def _answer(pipe: Connection, methods: Mapping[str, Callable[..., Awaitable[Any]]]) -> None:
    """Answer the calls that come through the pipe, until one is None."""
    pipe.send(("value", "ready"))
    while (call := await asyncio.to_thread(pipe.recv)) is not None:
        method, *args = call
        try:
            pipe.send(("value", await methods[method](*args)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))


@contextlib.contextmanager
def both_engines(options: argparse.Namespace, eager: bool) -> Iterator[dict[str, Child]]:
    """Our engine and vLLM's, each in a process tree of its own, started at the same time."""
    arguments = engine_arguments(options, eager)
    name = "eager" if eager else "graphs"
    engines = {which: Child(serve_engine, which == "ours", arguments, name) for which in ("ours", "vllm")}
    try:
        for engine in engines.values():
            engine.ready()
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


def in_turn(engines: Mapping[str, Child], turn: int) -> list[str]:
    """The engines in the order of a round, which changes with every round."""
    names = list(engines)
    return names if turn % 2 else names[::-1]


# -- sections -----------------------------------------------------------------------------------------------


class Peak:
    """The most device memory that is used at once in a block, by any process; looks every few milliseconds."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before = self.most = 0

    def __enter__(self) -> Peak:
        if self._device != "cpu":
            self.before = self.most = self._used()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device != "cpu":
            self._end.set()
            self._thread.join()

    @property
    def extra(self) -> int:
        """Bytes more than before."""
        return self.most - self.before

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self.most = max(self.most, self._used())
        self.most = max(self.most, self._used())

    def _used(self) -> int:
        import torch

        free, total = torch.cuda.mem_get_info()
        return int(total - free)


async def update(options: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Updates by each way of sending, beside plain copies of the same bytes."""
    import torch

    from roll_vllm import BucketSender

    config = configuration(options.layers, options.hidden)
    on_gpu = options.device != "cpu"
    results: dict[str, Any] = {"bytes": size_of(config), "rounds": options.rounds, "errors": {}, **devices_of(options)}
    engine = await _ours(engine_arguments(options), "eager")
    weights = random_weights(config, options.device)
    bucket = options.bucket_mib * _MIB
    senders = {"shared tensors": BucketSender(), "packed tensors": BucketSender(bucket)}
    if on_gpu:
        senders["through host memory"] = BucketSender(bucket, via_host=True)
    ways = list(senders)
    try:
        with Peak(options.device) as peak, noted(results, "share"):
            results["share_s"] = await timed(lambda: senders["shared tensors"].share(weights))
        if results["errors"]:
            ways.remove("shared tensors")
        results["share_extra_bytes"] = peak.extra
        if on_gpu:
            torch.cuda.empty_cache()  # where the tensors were before
        copies = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
        sources, targets = list(weights.values()), list(copies.values())

        def copy() -> None:
            torch._foreach_copy_(targets, sources)
            if on_gpu:
                torch.cuda.synchronize()

        async def send(way: str) -> None:
            # Returns when the worker's device has done all copies: its memory is the sender's again then.
            async with engine.weight_update(sender=senders[way]) as session:
                await session.send(weights if way == "shared tensors" else copies)
            results.setdefault("counts", {})[way] = session.counts

        await timed(copy)
        first, extra, worker_extra = {}, {}, {}
        for way in list(ways):
            before = (await engine.device_memory(reset_peak=True))[0] if on_gpu else {}
            with Peak(options.device) as peak, noted(results, f"first update, {way}"):
                first[way] = await timed(lambda way=way: send(way))  # type: ignore[misc]
            if way not in first:
                ways.remove(way)
            elif on_gpu:
                extra[way] = peak.extra
                worker_extra[way] = (await engine.device_memory())[0]["peak"] - before["peak"]
        results |= {"first_s": first, "extra_bytes": extra, "extra_bytes_of_torch_in_the_worker": worker_extra}
        report(results)

        contenders: dict[str, Callable[[], Any]] = {"plain copy": copy}
        for way in ways:
            if way != "through host memory":
                contenders[f"update, {way}"] = lambda way=way: send(way)  # type: ignore[misc]
        await side_by_side(contenders, _WARM_UP)
        results["seconds"] = await side_by_side(contenders, options.rounds)
        report(results)
        if "through host memory" in ways:
            with noted(results, "update, through host memory"):
                slow = {"update, through host memory": lambda: send("through host memory")}
                results["seconds"] |= await side_by_side(slow, _SLOW_ROUNDS)
        results["figures"] = update_figures(results, max(bucket, largest(config)))
        report(results)

        sums: dict[str, str] = {}
        for way in ways:
            with noted(results, f"arrival, {way}"):
                # Every parameter must change with every update now.
                torch._foreach_neg_(sources)
                torch._foreach_neg_(targets)
                await send(way)
                now = (await engine.checksums())[0]
                compare(weights, now, sums)
                sums = now
    finally:
        for sender in senders.values():
            sender.close()
        engine.shutdown()
    return results


@contextlib.contextmanager
def noted(results: Mapping[str, Any], what: str) -> Iterator[None]:
    """Note an error in the results, and go on: one way that fails shall not cost the figures of the others."""
    try:
        yield
    except Exception:
        results["errors"][what] = traceback.format_exc()


def largest(config: Mapping[str, Any]) -> int:
    """Bytes of the largest tensor, which has a bucket of its own if it must."""
    return 2 * max(math.prod(shape) for shape in shapes(config).values())


def compare(weights: Mapping[str, torch.Tensor], sums: Mapping[str, str], before: Mapping[str, str]) -> None:
    """Raise unless an update has arrived: the engine's checksums are the trainer's, and not those before."""
    from roll_vllm.worker.checksums import checksum

    # What vLLM does not fuse; checksums of all the rest would take seconds.
    same = [name for name in weights if name.endswith(("norm.weight", "o_proj.weight"))]
    wrong = [name for name in same if sums[name] != checksum(weights[name])]
    assert not wrong, f"the engine does not hold what was sent as {', '.join(wrong[:5])}"
    stale = [name for name, value in before.items() if name.endswith((".weight", ".bias")) and sums[name] == value]
    assert not stale, f"the update did not change {', '.join(stale[:5])}"


def update_figures(results: Mapping[str, Any], bucket: int) -> list[dict[str, Any]]:
    """The lines of the table about updates; `bucket` is the size of the largest one, in bytes."""
    seconds, middle = results["seconds"], medians(results["seconds"])
    copying = middle["plain copy"]
    figures = [Figure("plain device copy", copying, "s")]
    for what, times in seconds.items():
        if what != "plain copy":
            together = len(times) == len(seconds["plain copy"])
            by = ratio(times, seconds["plain copy"]) if together else middle[what] / copying
            figures.append(Figure(what, middle[what], "s", by))
    figures += [
        Figure(f"first update, {way}", taken, "s", taken / copying) for way, taken in results["first_s"].items()
    ]
    for way, extra in results["extra_bytes"].items():
        figures.append(Figure(f"device memory of an update, {way}", extra, "B", extra / (bucket + _SPARE_BYTES)))
    return [each.as_dict() for each in figures]


async def sleep(options: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Level 1 beside what the link to the host can do, and level 2 beside vLLM's own."""
    if options.device == "cpu":
        return {"skipped": "vLLM sleeps on accelerators only"}
    size = size_of(configuration(options.layers, options.hidden))
    results: dict[str, Any] = {"bytes": size, "rounds": options.rounds, **devices_of(options)}
    link = link_rates()
    with both_engines(options, eager=True) as engines:
        before = {name: engine("host_memory") for name, engine in engines.items()}
        first = {name: engine("nap", 1) for name, engine in engines.items()}
        after = {name: engine("host_memory") for name, engine in engines.items()}
        results["host_memory"] = {
            name: {"before": before[name], "asleep": first[name]["host_memory_asleep"], "awake": after[name]}
            for name in engines
        }
        results["first_s"] = first
        report(results)
        naps: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for level in (1, 2):
            naps[str(level)] = {name: [] for name in engines}
            for turn in range(options.rounds + 1):
                for name in in_turn(engines, turn):
                    taken = engines[name]("nap", level)
                    if turn:  # the first one warms up
                        naps[str(level)][name].append(taken)
            report({**results, "naps": naps})
    # Again, because the link is shared with whatever else the host does.
    again = link_rates()
    results["link_bytes_per_s"] = link = {way: rates + again[way] for way, rates in link.items()}
    results["seconds"] = {
        level: {name: {part: [nap[part] for nap in each] for part in ("sleep", "wake")} for name, each in pair.items()}
        for level, pair in naps.items()
    }
    results["figures"] = sleep_figures(results)
    return results


def link_rates() -> dict[str, list[float]]:
    """Bytes per second between a pinned buffer of the host and the device, each way."""
    import torch

    host = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.ones(_LINK_BYTES, dtype=torch.uint8, device="cuda")
    rates: dict[str, list[float]] = {"to host": [], "to device": []}
    for turn in range(_LINK_ROUNDS + 1):
        for way, target, source in (("to host", host, device), ("to device", device, host)):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            if turn:
                rates[way].append(_LINK_BYTES / (time.perf_counter() - begun))
    del host, device
    torch.cuda.empty_cache()
    return rates


def sleep_figures(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table about sleep: level 1 in times of a bare transfer, level 2 in times of vLLM's."""
    rates = medians(results["link_bytes_per_s"])
    limit = {"sleep": results["bytes"] / rates["to host"], "wake": results["bytes"] / rates["to device"]}
    figures = [Figure(f"link, {way}", rate, "B/s") for way, rate in rates.items()]
    for engine, suffix in (("ours", ""), ("vllm", ", plain vLLM")):
        for part, least in limit.items():
            first = results["first_s"][engine][part]
            figures.append(Figure(f"first {part}, level 1{suffix}", first, "s", first / least))
        for part, least in limit.items():
            later = statistics.median(results["seconds"]["1"][engine][part])
            figures.append(Figure(f"{part}, level 1{suffix}", later, "s", later / least))
    deep = {
        name: {**parts, "sleep and wake": [sum(both) for both in zip(parts["sleep"], parts["wake"], strict=True)]}
        for name, parts in results["seconds"]["2"].items()
    }
    for part in ("sleep", "wake", "sleep and wake"):
        ours, theirs = deep["ours"][part], deep["vllm"][part]
        figures.append(Figure(f"{part}, level 2, plain vLLM", statistics.median(theirs), "s"))
        figures.append(Figure(f"{part}, level 2", statistics.median(ours), "s", ratio(ours, theirs)))
    return [each.as_dict() for each in figures]


async def generation(options: argparse.Namespace, report: Report, eager: bool) -> dict[str, Any]:
    """Tokens per second beside vLLM's own engine."""
    results: dict[str, Any] = {"rounds": options.rounds, "requests": options.requests, "tokens": options.tokens}
    results |= devices_of(options)
    seconds: dict[str, list[float]] = {"ours": [], "vllm": []}
    same = []
    with both_engines(options, eager) as engines:
        for turn in range(options.rounds + 1):
            answers = {}
            for name in in_turn(engines, turn):
                answer = engines[name]("generate", turn, options.requests, options.tokens)
                answers[name] = answer["answers"]
                if turn:  # the first one warms up
                    seconds[name].append(answer["seconds"])
            # For the record: batches that differ may round differently, and dummy weights leave logits close.
            same.append(sum(one == other for one, other in zip(*answers.values(), strict=True)))
            report({**results, "seconds": seconds, "same_answers": same})
    results |= {"seconds": seconds, "same_answers": same}
    what = "generation, eager" if eager else "generation, CUDA graphs"
    results["figures"] = generation_figures(what, seconds, options.requests * options.tokens)
    return results


async def generation_eager(options: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Generation without CUDA graphs."""
    return await generation(options, report, True)


async def generation_graphs(options: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Generation with CUDA graphs."""
    if options.device == "cpu":
        return {"skipped": "there are no CUDA graphs on a CPU"}
    return await generation(options, report, False)


def generation_figures(what: str, seconds: Mapping[str, list[float]], tokens: int) -> list[dict[str, Any]]:
    """The lines of the table about generation: the ratio of rates is that of the times, turned over."""
    rates = {name: tokens / taken for name, taken in medians(seconds).items()}
    theirs = Figure(f"{what}, plain vLLM", rates["vllm"], "tokens/s")
    ours = Figure(what, rates["ours"], "tokens/s", ratio(seconds["vllm"], seconds["ours"]))
    return [theirs.as_dict(), ours.as_dict()]


async def broadcast(options: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Updates over a process group, beside a broadcast of one tensor of the same bytes."""
    from roll_vllm.environment import free_port

    config = configuration(options.layers, options.hidden)
    size = size_of(config)
    results: dict[str, Any] = {"bytes": size, "rounds": options.rounds, "errors": {}, **devices_of(options)}
    engines_device = trainers_device = "cpu"
    if options.device == "cuda":
        if len(results["devices"]) < 2:
            return {**results, "skipped": f"it needs 2 GPUs, and this process sees {len(results['devices'])}"}
        # A multiprocessing engine has the first device, and the runtime sends from the next one.
        engines_device, trainers_device = "cuda:0", "cuda:1"
    peers: list[Child] = []
    engine = await _ours(engine_arguments(options), "eager")
    try:
        weights = random_weights(config, trainers_device)
        port = free_port()
        peers = [
            Child(serve_peer, rank, port, device, size) for rank, device in enumerate((trainers_device, engines_device))
        ]
        for peer in peers:
            peer.ready()

        async def send() -> None:
            async with engine.weight_update(transport="collective") as session:
                await session.send(weights)
            await engine.collective_rpc("bench_synchronize")

        def plain() -> float:
            for peer in peers:
                peer.send("broadcast")
            return max([peer.receive() for peer in peers])

        results["first_s"] = await timed(send)  # sets the group up, and learns the routes
        seconds: dict[str, list[float]] = {"torch.distributed": [], "update, broadcast": []}
        for turn in range(options.rounds + 2):
            taken = plain(), await timed(send)
            if turn >= 2:  # the first ones warm up
                for times, one in zip(seconds.values(), taken, strict=True):
                    times.append(one)
                report({**results, "seconds": seconds})
        results["seconds"] = seconds
        results["figures"] = broadcast_figures(results)
        report(results)
        with noted(results, "arrival, broadcast"):
            compare(weights, (await engine.checksums())[0], {})
    finally:
        for peer in peers:
            peer.close()
        engine.shutdown()
    return results


def broadcast_figures(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table about the broadcast: the ratio of rates is that of the times, turned over."""
    seconds, size = results["seconds"], results["bytes"]
    middle = medians(seconds)
    plain, ours = seconds["torch.distributed"], seconds["update, broadcast"]
    figures = [
        Figure("torch.distributed broadcast of one tensor", size / middle["torch.distributed"], "B/s"),
        Figure("update, broadcast", size / middle["update, broadcast"], "B/s", ratio(plain, ours)),
        Figure("first update, broadcast", results["first_s"], "s"),
    ]
    return [each.as_dict() for each in figures]


def devices_of(options: argparse.Namespace) -> dict[str, Any]:
    """The GPUs of this process, and what NCCL was told."""
    if options.device == "cpu":
        return {"devices": []}
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "devices": [{"name": each.name, "bytes": each.total_memory} for each in found],
        "cuda": torch.version.cuda,
        "nccl": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
    }


SECTIONS: Mapping[str, Callable[[argparse.Namespace, Report], Awaitable[dict[str, Any]]]] = {
    "update": update,
    "sleep": sleep,
    "generation-eager": generation_eager,
    "generation-graphs": generation_graphs,
    "broadcast": broadcast,
}


# -- in the process that runs them --------------------------------------------------------------------------


def run_section(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a section in a process tree of its own; whatever goes wrong there is in the result."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=_section, args=(name, options, end))
    begun = time.monotonic()
    process.start()
    end.close()
    started = {psutil.Process(process.pid)}
    result: dict[str, Any] = {}
    try:
        while True:
            started |= _descendants(process.pid)
            if time.monotonic() - begun > options.limit:
                result["error"] = f"not done within {options.limit:g} s"
                break
            if not pipe.poll(1):
                continue
            kind, value = pipe.recv()
            result |= {"error": value} if kind == "error" else value
            if kind != "so far":
                break
    except EOFError:
        process.join(10)
        result["error"] = f"the section's process ended with status {process.exitcode}"
    finally:
        process.join(30 if "error" not in result else 1)
        _end(started | _descendants(process.pid))
    return {**result, "wall_s": time.monotonic() - begun}


def _section(name: str, options: argparse.Namespace, pipe: Connection) -> None:
    def report(results: dict[str, Any]) -> None:
        pipe.send(("so far", results))

    try:
        pipe.send(("done", asyncio.run(_run(name, options, report))))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))


async def _run(name: str, options: argparse.Namespace, report: Report) -> dict[str, Any]:
    return await SECTIONS[name](options, report)


def _descendants(pid: int | None) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _end(processes: set[psutil.Process]) -> None:
    """End what a section has left: an engine that nobody waits for keeps its memory."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(list(processes), timeout=10)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def sections(text: str) -> list[str]:
    """The sections that a list of names with commas stands for, in the order of the table."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in CHOICES and name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CHOICES)}")
    chosen = {section for name in names for section in CHOICES.get(name, (name,))}
    return [name for name in SECTIONS if name in chosen]


def arguments() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", type=sections, default=list(SECTIONS), help=f"names with commas, of {', '.join(CHOICES)}"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: 7)")
    parser.add_argument("--output", type=Path, default=Path("bench-cuda.json"), help="default: bench-cuda.json")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "pytest-roll-vllm")
    parser.add_argument("--check", action="store_true", help="fail also when a target is missed")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a section may take (default: 300)")
    parser.add_argument("--layers", type=int, default=28, help="of the model (default: 28)")
    parser.add_argument("--hidden", type=int, default=3584, help="the model's width (default: 3584)")
    parser.add_argument("--bucket-mib", type=int, default=1024, help="bucket of packed tensors (default: 1024 MiB)")
    parser.add_argument("--requests", type=int, default=64, help="at once, for generation (default: 64)")
    parser.add_argument("--tokens", type=int, default=128, help="of each request (default: 128)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the code out")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, write the file after each, and print the table."""
    options = arguments().parse_args(argv)
    told = {name: value for name, value in vars(options).items() if name not in ("output", "cache_dir")}
    results: dict[str, dict[str, Any]] = {}
    lines = [("what", "median", "ratio", "target")]
    for name in options.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            results[name] = run_section(name, options)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        for what, text in errors(name, results[name]).items():
            print(f"{what}: {text}", file=sys.stderr, flush=True)
        lines += rows(name, results[name])
        write(options.output, {"options": told, "targets": TARGETS, "sections": results})
    print("sleep of level 1: ratio to the link's own time; other ratios: to the line of plain torch or vLLM before")
    print(table(lines))
    print(f"written to {options.output}")
    return status(results, options.check)


if __name__ == "__main__":
    sys.exit(main())
