"""The arithmetic of the benchmarks for GPUs, their arguments and the file that they write; nothing is measured here."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

# The benchmarks are in no package that is installed. Not for longer: beside them lies another copy of what is.
sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import cuda

sys.path.pop(0)


def by_name(figures: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["what"]: each for each in figures}


def test_the_model_has_the_size_of_qwen2_7b() -> None:
    config = cuda.configuration(28, 3584)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (28, 4, 18944)
    assert cuda.size_of(config) == 15_231_233_024
    assert cuda.largest(config) == 2 * 152064 * 3584


@pytest.mark.parametrize("hidden", [64, 128, 256, 896, 3584])
def test_a_model_of_any_width_can_run(hidden: int) -> None:
    config = cuda.configuration(2, hidden)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    assert hidden % heads == heads % kv == config["intermediate_size"] % 64 == 0
    assert len(cuda.shapes(config)) == 3 + 2 * 12


def test_all_sections_run_by_default() -> None:
    options = cuda.arguments().parse_args([])
    assert options.only == list(cuda.SECTIONS)
    assert not options.check


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("update", ["update"]),
        ("broadcast, sleep", ["sleep", "broadcast"]),
        ("generation", ["generation-eager", "generation-graphs"]),
        ("generation-graphs,generation-graphs", ["generation-graphs"]),
    ],
)
def test_sections_are_chosen_by_name(text: str, expected: list[str]) -> None:
    assert cuda.sections(text) == expected


def test_a_section_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'updates' is none of update, sleep"):
        cuda.sections("updates")
    with pytest.raises(SystemExit):
        cuda.arguments().parse_args(["--only", "updates"])
    assert "updates" in capsys.readouterr().err


def test_every_choice_is_a_section() -> None:
    assert [section for sections in cuda.CHOICES.values() for section in sections] == list(cuda.SECTIONS)


@pytest.mark.parametrize(
    ("what", "ratio", "met"),
    [
        ("update, shared tensors", 1.5, True),
        ("update, shared tensors", 1.51, False),
        ("generation, eager", 0.99, True),
        ("generation, eager", 0.98, False),
        ("update, shared tensors", None, None),
        ("update, packed tensors", 9.0, None),
    ],
)
def test_verdict(what: str, ratio: float | None, met: bool | None) -> None:
    figure = cuda.Figure(what, 1.0, "s", ratio)
    assert figure.met is met
    assert figure.as_dict()["met"] is met
    assert ("MISSED" in figure.row()[3]) is (met is False)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.0123, "s", "12.3 ms"), (2.5, "s", "2.50 s"), (2**30, "B", "1024 MiB"), (5.5e10, "B/s", "55.00 GB/s")],
)
def test_shown(value: float, unit: str, text: str) -> None:
    assert cuda.shown(value, unit) == text


def test_updates_are_measured_in_plain_copies() -> None:
    results = {
        "seconds": {
            "plain copy": [1.0, 2.0, 1.0],
            "update, shared tensors": [1.2, 2.4, 1.2],
            "update, through host memory": [8.0, 8.0],
        },
        "first_s": {"shared tensors": 4.0},
        "extra_bytes": {"shared tensors": 512 * 2**20},
    }
    figures = by_name(cuda.update_figures(results, 2**30 - 256 * 2**20))
    assert figures["update, shared tensors"]["ratio"] == pytest.approx(1.2)
    assert figures["update, through host memory"]["ratio"] == 8.0  # of another number of rounds
    assert figures["first update, shared tensors"]["met"] is False
    assert figures["device memory of an update, shared tensors"]["ratio"] == 0.5


def test_sleep_is_measured_in_transfers_and_in_times_of_vllm() -> None:
    parts = {"sleep": [0.5, 0.5], "wake": [0.25, 0.25]}
    first = {"sleep": 1.0, "wake": 0.25}
    results = {
        "bytes": 100,
        "link_bytes_per_s": {"to host": [200.0], "to device": [400.0]},
        "first_s": {"ours": first, "vllm": first},
        "seconds": {
            "1": {"ours": parts, "vllm": parts},
            "2": {"ours": parts, "vllm": {"sleep": [0.25, 0.25], "wake": [0.25, 0.25]}},
        },
    }
    figures = by_name(cuda.sleep_figures(results))
    assert figures["first sleep, level 1"]["ratio"] == 2.0
    assert figures["sleep, level 1"]["ratio"] == figures["wake, level 1"]["ratio"] == 1.0
    assert figures["sleep and wake, level 2"]["ratio"] == 1.5
    assert figures["sleep and wake, level 2"]["met"] is False
    assert figures["sleep, level 1, plain vLLM"]["met"] is None


class Sleeper:
    """Stands in for an engine, and for the process that serves it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def sleep(self, level: int) -> None:
        self.calls.append(level)

    async def wake_up(self) -> None:
        self.calls.append("wake")

    def __call__(self, method: str, *args: Any) -> Any:
        call = cuda.nap(self, *args) if method == "nap" else cuda.host_memory()
        with ThreadPoolExecutor(1) as thread:  # this one has a loop that runs
            return thread.submit(asyncio.run, call).result()


def test_both_engines_sleep_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = {"ours": Sleeper(), "vllm": Sleeper()}
    monkeypatch.setattr(cuda, "both_engines", lambda options, eager: contextlib.nullcontext(engines))
    monkeypatch.setattr(cuda, "link_rates", lambda: {"to host": [1e9], "to device": [2e9]})
    monkeypatch.setattr(cuda, "devices_of", lambda options: {"devices": []})
    reports: list[dict[str, Any]] = []
    results = asyncio.run(cuda.sleep(cuda.arguments().parse_args(["--rounds", "2"]), reports.append))
    assert engines["ours"].calls == engines["vllm"].calls == [1, "wake"] * 4 + [2, "wake"] * 3
    assert results["link_bytes_per_s"] == {"to host": [1e9, 1e9], "to device": [2e9, 2e9]}
    assert set(results["host_memory"]["ours"]) == {"before", "asleep", "awake"}
    assert len(results["figures"]) == 2 + 2 * 4 + 2 * 3
    assert reports[0]["first_s"]["ours"]["sleep"] >= 0
    json.dumps(results)


def test_rates_are_compared_the_other_way_round_than_times() -> None:
    figures = by_name(cuda.generation_figures("generation, eager", {"ours": [2.0, 2.0], "vllm": [1.0, 1.0]}, 100))
    assert figures["generation, eager"]["value"] == 50
    assert figures["generation, eager"]["ratio"] == 0.5
    seconds = {"torch.distributed": [1.0, 1.0], "update, broadcast": [1.25, 1.25]}
    figures = by_name(cuda.broadcast_figures({"bytes": 10, "first_s": 3.0, "seconds": seconds}))
    assert figures["update, broadcast"]["ratio"] == 0.8
    assert figures["update, broadcast"]["met"] is True


def test_graphs_are_captured_for_few_sizes() -> None:
    assert cuda._capture_sizes(48) == [1, 2, 4, 8, 16, 32, 48]
    assert cuda._capture_sizes(64) == [1, 2, 4, 8, 16, 32, 64]


def test_engines_take_turns() -> None:
    engines: Any = {"ours": None, "vllm": None}
    assert cuda.in_turn(engines, 1) == list(reversed(cuda.in_turn(engines, 2)))


def test_memory_of_a_process_is_read_from_proc() -> None:
    assert cuda._kilobytes(Path(f"/proc/{os.getpid()}/status"))["VmRSS"] > 1000
    assert cuda._kilobytes(Path("/proc/meminfo"))["MemAvailable"] > 1000
    assert cuda._kilobytes(Path("/nowhere")) == {}


GOOD = {"figures": [cuda.Figure("generation, eager", 100.0, "tokens/s", 1.0).as_dict()]}
MISSED = {"figures": [cuda.Figure("generation, eager", 100.0, "tokens/s", 0.5).as_dict()]}


@pytest.mark.parametrize(
    ("result", "plain", "checked"),
    [
        (GOOD, 0, 0),
        (MISSED, 0, 1),
        ({"skipped": "it needs 2 GPUs"}, 0, 0),
        ({**GOOD, "error": "no"}, 1, 1),
        ({**GOOD, "errors": {"share": "no"}}, 1, 1),
    ],
)
def test_exit_status(result: dict[str, Any], plain: int, checked: int) -> None:
    assert cuda.status({"update": result}, check=False) == plain
    assert cuda.status({"update": result}, check=True) == checked


def test_a_failed_section_is_written_down_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bench.json"
    found: list[list[str]] = []

    def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
        found.append(list(json.loads(output.read_text())["sections"]) if output.exists() else [])
        if name == "sleep":
            raise OSError("no such thing")
        results: dict[str, dict[str, Any]] = {"update": GOOD, "broadcast": {"skipped": "it needs 2 GPUs"}}
        return results[name]

    monkeypatch.setattr(cuda, "run_section", run)
    assert cuda.main(["--only", "update,sleep,broadcast", "--output", str(output)]) == 1
    assert found == [[], ["update"], ["update", "sleep"]]  # the file is there after each section
    written = json.loads(output.read_text())
    assert "OSError: no such thing" in written["sections"]["sleep"]["error"]
    assert written["options"]["layers"] == 28
    assert written["targets"]["update, broadcast"] == [">=", 0.8]
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["sleep", "ERROR"] for line in lines)
    assert any(line.split()[:2] == ["broadcast", "skipped"] for line in lines)
    assert any("generation, eager" in line and ">= 0.99: met" in line for line in lines)


async def stubborn(options: argparse.Namespace, report: cuda.Report) -> dict[str, Any]:
    report({"so": "far"})
    if options.rounds == 1:
        raise ValueError("a bad round")
    if options.rounds == 2:
        os._exit(7)
    if options.rounds == 3:
        time.sleep(600)
    return {"all": "done"}


section = cuda._section


def stubborn_section(name: str, options: argparse.Namespace, pipe: Any) -> None:
    """What runs in the process of the section, where nothing of a test's monkeypatch is."""
    sections: dict[str, Any] = {name: stubborn}
    cuda.SECTIONS = sections
    section(name, options, pipe)


@pytest.mark.parametrize(
    ("rounds", "limit", "error"),
    [(0, 60, ""), (1, 60, "ValueError: a bad round"), (2, 60, "status 7"), (3, 1, "not done within 1 s")],
)
def test_a_section_runs_in_a_process_of_its_own(
    rounds: int, limit: int, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_section", stubborn_section)
    options = cuda.arguments().parse_args(["--rounds", str(rounds), "--limit", str(limit)])
    result = cuda.run_section("stubborn", options)
    assert error in result.get("error", "")
    assert ("error" in result) is bool(error)
    if limit == 60:  # a process that fails leaves what it had until then
        assert result["so"] == "far"
    assert result.get("all") == (None if error else "done")
