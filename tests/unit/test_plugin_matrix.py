"""The table at the end of a session with several versions."""

from __future__ import annotations

from pytest_roll_vllm.matrix import matrix


def test_matrix() -> None:
    lines = matrix(
        {
            "0.8.4-cpu-reference-V0": {"wu-one": "passed", "wu-two": "known gap", "sl": "could not run"},
            "0.12.0-cpu": {"wu-one": "passed", "wu-two": "failed", "abort-x": "not applicable"},
        }
    )
    assert [line for line, _ in lines] == [
        "contracts  0.8.4-cpu-reference-V0  0.12.0-cpu",
        "abort      -                       1 n/a",
        "sl         1 not run               -",
        "wu         1 ok, 1 gap             1 ok, 1 FAILED",
        "all        1 ok, 1 gap, 1 not run  1 ok, 1 FAILED, 1 n/a",
    ]
    assert [set(found) for _, found in lines[:3]] == [set(), {"not applicable"}, {"could not run"}]
