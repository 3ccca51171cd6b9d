"""What ``create_async_llm`` makes of its arguments, before anything is started."""

from __future__ import annotations

import enum
from typing import Any

import pytest

from roll_vllm import factory
from roll_vllm.backends import BACKENDS
from roll_vllm.errors import ConfigurationError, UnsupportedFeatureError

MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


def resolved(version: str = "0.12.0", generation: str = "V1", **given: Any) -> dict[str, Any]:
    return factory._engine_arguments(given, version, BACKENDS["cpu"], generation)


@pytest.mark.parametrize("given", [{}, {"seed": None}])
def test_every_engine_has_a_seed_of_its_own(given: dict[str, Any]) -> None:
    seeds = {resolved(**given)["seed"] for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_given_seed_is_kept(seed: int) -> None:
    assert resolved(seed=seed)["seed"] == seed


@pytest.mark.parametrize(
    ("version", "generation", "modes"),
    [
        ("0.8.4", "V1", MODES[:1]),
        ("0.8.4", "V0", MODES[1:2]),
        ("0.10.2", "V0", MODES[1:2]),
        ("0.10.2", "V1", MODES),
        ("0.12.0+cpu", "V1", MODES),
    ],
)
def test_logprobs_modes(version: str, generation: str, modes: tuple[str, ...]) -> None:
    for mode in (*MODES, "logprobs"):
        if mode not in modes:
            with pytest.raises(ConfigurationError, match=f"'{mode}'.*{modes[0]}"):
                resolved(version, generation, logprobs_mode=mode)
        elif len(modes) > 1:
            assert resolved(version, generation, logprobs_mode=mode)["logprobs_mode"] == mode
        else:  # the only one, for which there may be no argument
            assert "logprobs_mode" not in resolved(version, generation, logprobs_mode=mode)
    assert "logprobs_mode" not in resolved(version, generation, logprobs_mode=None)


class LogprobsMode(enum.Enum):
    """As vLLM 0.10.2's."""

    RAW_LOGPROBS = "raw_logprobs"


def test_a_mode_may_be_vllm_s_own_enumeration() -> None:
    mode = LogprobsMode.RAW_LOGPROBS
    assert resolved("0.10.2", logprobs_mode=mode)["logprobs_mode"] is mode


def test_replicas_inside_one_engine_are_refused() -> None:
    factory._check_replicas({"data_parallel_size": 1})
    factory._check_replicas({})
    with pytest.raises(UnsupportedFeatureError, match=r"data_parallel_size=2.*one engine for each replica"):
        factory._check_replicas({"data_parallel_size": 2})


@pytest.mark.parametrize(("backend", "generation"), [("cpu", "V1"), ("cpu", "V0"), ("cuda", "V0")])
def test_no_drafter_where_none_can_run(backend: str, generation: str) -> None:
    given = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    with pytest.raises(UnsupportedFeatureError, match="leave speculative_config out"):
        factory._engine_arguments(given, "0.10.2", BACKENDS[backend], generation)


def test_speculation_is_left_to_vllm_elsewhere() -> None:
    given = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    arguments = factory._engine_arguments(given, "0.12.0", BACKENDS["cuda"], "V1")
    assert arguments["speculative_config"] == given["speculative_config"]
