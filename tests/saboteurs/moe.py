"""Breakages of experts, of what is computed from weights, and of a second model."""

from __future__ import annotations

from tests.saboteurs.base import in_worker

EXPERTS = {"model": "counting-moe"}
FP8 = {"model": "random", "dtype": "bfloat16", "arguments": {"quantization": "fp8"}}

in_worker("keep-one-expert", "wu-moe-loader-survives", **EXPERTS)
in_worker("swap-gate-and-up-of-experts", "wu-moe-loader-survives", **EXPERTS)
in_worker("move-the-parameters", "wu-derived-and-graph-state", **EXPERTS)
in_worker("forget-the-drafter", "wu-draft-follows", **EXPERTS)
in_worker("keep-the-scales", "q-scales-refreshed", **FP8)
in_worker("keep-a-quantised-weight", "q-refit-equals-fresh", **FP8)
