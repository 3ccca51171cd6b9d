"""The reference platform runs real engines: correct tokens, live weights, prefix cache, several ranks.

They need an official vLLM wheel, this project installed next to it, and a machine that shows no accelerator.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_session
import pytest

from pytest_roll_vllm.models import make
from pytest_roll_vllm.models.reference import ReferenceModel
from roll_vllm import reference, versions

INSTALLED = versions.installed()
ROW = versions.resolve(INSTALLED.version) if INSTALLED else None
REFUSAL = reference.why_not()
SESSIONS = list(
    itertools.product(ROW.engines if ROW else (), [("random", "float32", 1), ("counting-tied", "bfloat16", 2)])
)
MAX_TOKENS = 12
VERSIONS = (1, 3)
LONG_PROMPT = [(7 * i) % 256 for i in range(80)]

pytestmark = pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL)


class Session:
    """What went into a session and what came out of it."""

    def __init__(self, engine: str, kind: str, dtype: str, ranks: int, cache_dir: Path) -> None:
        self.engine, self.kind, self.ranks = engine, kind, ranks
        self.model = make(kind, cache_dir)
        self.prompts = [[5, 6, 7], list(range(40)), [9], list(range(100, 170))]
        options = {
            "kind": kind,
            "cache_dir": str(cache_dir),
            "dtype": dtype,
            "ranks": ranks,
            "versions": VERSIONS,
            "prompts": self.prompts,
            "long_prompt": LONG_PROMPT,
            "max_tokens": MAX_TOKENS,
        }
        environ = os.environ | {
            reference.VARIABLE: "1",
            "VLLM_USE_V1": str(int(engine == "V1")),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }
        done = subprocess.run(
            [sys.executable, engine_session.__file__, json.dumps(options)],
            env=environ,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        self.said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])

    def expected(self, version: int) -> list[list[int]]:
        if self.kind.startswith("counting"):
            return [[(prompt[-1] + version * i) % 256 for i in range(1, MAX_TOKENS + 1)] for prompt in self.prompts]
        oracle = ReferenceModel(self.model)
        return [oracle.greedy(prompt, MAX_TOKENS, version) for prompt in self.prompts]


@pytest.fixture(scope="module", params=SESSIONS, ids=lambda session: "-".join(map(str, (session[0], *session[1]))))
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    engine, (kind, dtype, ranks) = request.param
    return Session(engine, kind, dtype, ranks, tmp_path_factory.mktemp("models"))


def test_the_platform_is_ours_in_every_worker(session: Session) -> None:
    workers = session.said["workers"]
    assert [(worker["device"], worker["worker"]) for worker in workers] == [
        ("cpu-reference", f"roll_vllm.reference.worker_{session.engine.lower()}")
    ] * session.ranks


def test_the_kv_cache_is_reachable_and_has_the_size_asked_for(session: Session) -> None:
    shape = [2, engine_session.KV_BLOCKS, 16, 4 // session.ranks, 64]
    assert [worker["kv_shapes"] for worker in session.said["workers"]] == [[shape, shape]] * session.ranks


def test_greedy_tokens_follow_weights_that_are_changed_in_place(session: Session) -> None:
    for version in VERSIONS:
        assert session.said[f"greedy {version}"] == session.expected(version)


def test_greedy_tokens_are_the_same_from_the_prefix_cache(session: Session) -> None:
    assert session.said["greedy again"] == session.said[f"greedy {VERSIONS[-1]}"]


def test_a_cached_prefix_is_not_computed_again(session: Session) -> None:
    first, second = session.said["steps"]
    assert first[0] == len(LONG_PROMPT)
    assert second[0] <= 16  # what remains is less than two blocks
    if session.engine == "V0" or reports_cached_tokens():
        assert session.said["cached"][0] == 0
        assert session.said["cached"][1] >= 64


def reports_cached_tokens() -> bool:
    # The V1 engine of 0.8.4 leaves num_cached_tokens empty on every platform.
    assert INSTALLED is not None
    return versions.at_least(INSTALLED.version, "0.10.2")


def test_samples_differ_and_carry_logprobs(session: Session) -> None:
    assert [len(sample) for sample in session.said["sampled"]] == [8, 8, 8]
    assert all(logprob <= 0 for sample in session.said["logprobs"] for logprob in sample)
    if session.kind == "random":  # the counting model is certain of its answer
        assert len({tuple(sample) for sample in session.said["sampled"]}) > 1


def test_an_aborted_request_is_gone(session: Session) -> None:
    assert session.said["abort"] == [True, False]
    assert session.said["greedy after abort"] == session.said[f"greedy {VERSIONS[-1]}"]
