"""Reports to make pages of: all outcomes, several versions, and texts that mean harm."""

from __future__ import annotations

from typing import Any

from pytest_roll_vllm.outcomes import OUTCOMES

HOSTILE = (
    '</script><script>window.hit=1</script><img src=x onerror="window.hit=2"> `|` **b** [a](javascript:hit) &amp; \'"'
)

_TEXTS = {
    "passed": ("", ""),
    "failed": (
        "AssertionError: rank 1: 3 of 9 parameters are not version 2",
        "AssertionError: rank 1: 3 of 9 parameters are not version 2\nassert ['q', 'k', 'v'] == []\n"
        "  Left contains 3 more items, first extra item: 'q'",
    ),
    "known gap": ("the release keeps no loader (vllm-project/vllm#17429)", "KeyError: 'w13_weight'"),
    "expected skip": ("loading an adapter hangs there (https://github.com/my/engine/issues/34)", ""),
    "not applicable": ("needs vLLM >=0.11, found 0.8.4", ""),
    "could not run": ("error in setup: TimeoutError: no answer in 60 s", "TimeoutError: no answer in 60 s"),
}


def contract(id: str, outcome: str, seconds: float = 1.5, **changes: Any) -> dict[str, Any]:
    """Return a contract as in ``report.json``."""
    reason, detail = _TEXTS[outcome]
    ranks = [1] if "rank 1" in detail else []
    test = {"nodeid": f"conformance/test_{id.partition('-')[0]}.py::test_{id.replace('-', '_')}"}
    judged = {"outcome": outcome, "seconds": seconds, "reason": reason}
    return {
        "id": id,
        "sentence": f"After an update by any transport, what {id} promises holds on every rank, and nothing is left.",
        "versions": ">=0.8.4,<0.13",
        "backends": ["cpu", "cuda", "rocm", "npu"],
        "references": ["vllm-project/vllm#22197", "verl-project/verl#4453"],
        **judged,
        "again": f"pytest --pyargs conformance --vllm-version 0.12.0 -m 'vllm_contract(id=\"{id}\")'",
        "tests": [{**test, **judged, "detail": detail, "ranks": ranks}],
        **changes,
    }


def run(version: str, backend: str, contracts: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Return what a report says of one version and backend."""
    totals = {outcome: sum(one["outcome"] == outcome for one in contracts) for outcome in OUTCOMES}
    return {
        "vllm": {"distribution": "vllm", "version": version},
        "torch": "2.9.0",
        "python": "3.11.7",
        "backend": backend,
        "engine": "V1",
        "device": {
            "kind": backend,
            "count": 2,
            "names": ["NVIDIA H100 80GB HBM3"] * 2,
            "memory_bytes": [85899345920] * 2,
            "reason": "2 NVIDIA GPUs are visible",
            "backend": backend,
        },
        "environment": {
            "system": "Linux-6.1.0-x86_64-with-glibc2.36",
            "packages": {"numpy": "2.2.6", "transformers": "4.57.1"},
            "variables": {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        },
        "complete": not totals["could not run"],
        "problem": "",
        "totals": totals,
        "contracts": {one["id"]: one for one in contracts},
        "expectations": [
            {
                "contract": "sl-typo",
                "test": "*",
                "outcome": "fail",
                "reason": "After a wake the prefix cache holds what was computed before.",
                "link": "my/engine#12",
                "source": "/home/me/known.toml, entry 2 (line 9)",
                "tests": 0,
                "unmatched": True,
            }
        ],
        "patches": [
            {
                "name": "abort-logprobs-once",
                "target": "vllm.v1.engine.output_processor:RequestState._new_completion_output",
                "why": "An aborted request would get its last log-probabilities twice.",
                "upstream": "https://github.com/vllm-project/vllm/issues/22197, fixed later",
                "processes": {"applied": 12, "deferred": 3},
            }
        ],
        "notes": {"engine starts": [{"model": "counting", "seed": 0}, {"model": "counting", "seed": 0}, {"seed": 1}]},
        **changes,
    }


def session(**changes: Any) -> dict[str, Any]:
    """Return what a report says of the whole session."""
    return {
        "suite": {"distribution": "pytest-roll-vllm", "version": "0.1.0"},
        "settings": {"version": {"value": "0.8.4 0.12.0", "source": "--vllm-version"}},
        "date": "2026-11-25T21:06:36+00:00",
        "command": "pytest --pyargs conformance --vllm-version 0.8.4 --vllm-version 0.12.0 --vllm-provision",
        "xdist": True,
        "exit_status": 1,
        "model": "counting",
        **changes,
    }


def single() -> dict[str, Any]:
    """Return a report of one version, with every outcome."""
    contracts = [contract(f"wu-{outcome.replace(' ', '-')}", outcome) for outcome in OUTCOMES]
    return {"schema": "pytest-roll-vllm/report/1", **session(), **run("0.12.0", "cuda", contracts)}


def several() -> dict[str, Any]:
    """Return a report of four versions with the usual number of contracts, of which not all selected the same."""
    names = ("abort", "cache", "env", "ex", "gen", "lora", "lp", "sl", "wu")
    ids = [f"{name}-{what}" for name in names for what in ("keeps-partial", "leaves-no-state", "ranks-agree", "safe")]
    columns = []
    for number, (version, backend) in enumerate(
        [("0.8.4", "cpu-reference"), ("0.10.2", "cuda"), ("0.11.0", "cpu"), ("0.12.0", "cpu")]
    ):
        outcomes = {3: "known gap", 7: "not applicable"} if number == 0 else {5: "failed", 11: "could not run"}
        contracts = [
            contract(id, outcomes.get(place + (number == 3), "passed"), 0.7 * (place + 1) * (number + 1))
            for place, id in enumerate(ids)
            if not (number == 2 and place == 1)
        ]
        columns.append({"label": f"{version}-{backend}", **run(version, backend, contracts)})
    columns[1]["problem"] = "its process died in a test more often than four times"
    return {
        "schema": "pytest-roll-vllm/report/2",
        **session(),
        "complete": False,
        "totals": {outcome: sum(one["totals"][outcome] for one in columns) for outcome in OUTCOMES},
        "runs": columns,
    }


def hostile() -> dict[str, Any]:
    """Return a report whose every text means harm, and whose numbers and outcomes are those of any other."""
    kept = ("schema", "outcome", "date")

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            same = key in ("contracts", "settings", "totals", "processes")
            return {
                (f"{name}{HOSTILE}" if key in ("packages", "variables", "notes", "settings", "contracts") else name): (
                    spoil(one, "" if same else name)
                )
                for name, one in value.items()
            }
        if isinstance(value, list):
            return [spoil(one, key) for one in value]
        return f"{value} {HOSTILE}\x1b[31m\x00\ud800" if isinstance(value, str) and key not in kept else value

    spoiled: dict[str, Any] = spoil(single())
    return spoiled
