"""The figures for a machine with no GPU: ``python -m benchmarks.cpu``.

Measures a weight update of SmolLM2-135M (bucket transport, trainer and engine in two processes) against one
plain copy of the same bytes, what the plugin adds to collecting an unrelated project, and with ``--suite``
the whole conformance run. Prints a table and writes ``bench-cpu.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import medians, side_by_side, table, write

#: The most that each figure may be.
TARGETS = {"update, shared tensors": 1.6, "collect-only, extra ms": 30.0, "suite, s": 180.0, "suite, engine starts": 4}


async def weight_update(cache_dir: Path, rounds: int) -> dict[str, Any]:
    """Update SmolLM2 over and over, by each way of sending, beside plain copies of the same bytes."""
    import torch

    from pytest_roll_vllm.models import make
    from roll_vllm import BucketSender, create_async_llm

    model = make("smollm2", cache_dir / "models")
    engine = await create_async_llm(
        model=str(model.path), dtype=model.dtype, worker_name="bench", enforce_eager=True, max_model_len=512,
        num_gpu_blocks_override=16,
    )  # fmt: skip
    try:
        packed, shared = model.weights(1), model.weights(2)
        size = sum(tensor.nbytes for tensor in shared.values())
        packing, sharing = BucketSender(bucket_bytes=2 * size), BucketSender()
        sharing.share(shared)
        targets = [torch.empty_like(tensor) for tensor in packed.values()]
        one_source = torch.ones(size, dtype=torch.uint8)
        one_target = torch.zeros(size, dtype=torch.uint8)

        async def update(weights: dict[str, torch.Tensor], sender: BucketSender) -> None:
            async with engine.weight_update(sender=sender) as session:
                await session.send(weights)

        begun = time.perf_counter()
        await update(packed, packing)
        first = time.perf_counter() - begun
        sums = (await engine.checksums())[0]
        await update(shared, sharing)
        assert (await engine.checksums())[0] != sums, "the update did not arrive"

        def copy_each() -> None:
            for target, source in zip(targets, packed.values(), strict=True):
                target.copy_(source)

        contenders = {
            "plain copy": lambda: one_target.copy_(one_source),
            "plain copy, tensor by tensor": copy_each,
            "update, shared tensors": lambda: update(shared, sharing),
            "update, packed tensors": lambda: update(packed, packing),
        }
        await side_by_side(contenders, 3)
        median = medians(await side_by_side(contenders, rounds))
        sharing.close()
        packing.close()
    finally:
        engine.shutdown()
    ratios = {name: seconds / median["plain copy"] for name, seconds in median.items()}
    return {"bytes": size, "first_update_s": first, "rounds": rounds, "median_s": median, "ratio_to_plain_copy": ratios}


def collecting(rounds: int) -> dict[str, Any]:
    """``pytest --collect-only`` of an unrelated project with the plugin and without."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_unrelated.py").write_text("def test_one():\n    pass\n")
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", folder]

        def run(*extra: str) -> None:
            subprocess.run([*command, *extra], check=True, capture_output=True, cwd=folder)

        contenders = {"with": run, "without": lambda: run("-p", "no:roll_vllm")}
        asyncio.run(side_by_side(contenders, 2))
        median = medians(asyncio.run(side_by_side(contenders, rounds)))
    return {"rounds": rounds, "median_s": median, "extra_ms": 1000 * (median["with"] - median["without"])}


def suite() -> dict[str, Any]:
    """One conformance run, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "--pyargs", "conformance", "-q", "--vllm-report", folder]
        begun = time.perf_counter()
        finished = subprocess.run(command, cwd=folder, check=False)
        seconds = time.perf_counter() - begun
        report = json.loads(Path(folder, "report.json").read_text())
    starts = len(report["notes"]["engine starts"])
    return {"seconds": seconds, "engine_starts": starts, "exit_status": finished.returncode, "totals": report["totals"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default: 15)")
    parser.add_argument("--output", type=Path, default=Path("bench-cpu.json"), help="default: bench-cpu.json")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "pytest-roll-vllm")
    parser.add_argument("--suite", action="store_true", help="also measure a whole conformance run")
    options = parser.parse_args()

    update = asyncio.run(weight_update(options.cache_dir, options.rounds))
    collect = collecting(options.rounds)
    results: dict[str, Any] = {"weight_update": update, "collect_only": collect, "targets": TARGETS}
    rows = [("what", "median", "ratio to plain copy", "target")]
    for name, seconds in update["median_s"].items():
        ratio = update["ratio_to_plain_copy"][name]
        target = f"<= {TARGETS[name]}" if name in TARGETS else ""
        rows.append((name, f"{1000 * seconds:.1f} ms", f"{ratio:.2f}", target))
    rows.append(("first update (learns the routes)", f"{1000 * update['first_update_s']:.0f} ms", "", ""))
    rows.append(("collect-only, extra", f"{collect['extra_ms']:.1f} ms", "", "<= 30 ms"))
    if options.suite:
        results["suite"] = run = suite()
        rows.append(
            ("conformance run", f"{run['seconds']:.0f} s", f"{run['engine_starts']} engine starts", "<= 180 s, 4")
        )
    print(f"SmolLM2-135M, {update['bytes'] / 1e6:.0f} MB, medians of {options.rounds} rounds")
    print(table(rows))
    write(options.output, results)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
