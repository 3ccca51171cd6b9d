"""``--vllm-prove``: what is collected, and the table. The proof itself needs engines."""

from __future__ import annotations

from typing import Any

import pytest
from plugin_harness import Inner

from pytest_roll_vllm.proof.session import InnerSession
from pytest_roll_vllm.proof.table import lines

SABOTEURS = """
    from contextlib import nullcontext
    from pytest_roll_vllm.proof import Saboteur

    ALL = [
        Saboteur("under-ray", ("c",), nullcontext, executor="ray"),
        Saboteur("starts", ("a",), nullcontext, starts_engine=True),
        Saboteur("breaks", ("a", "b"), nullcontext),
        Saboteur("one-rank", ("b",), nullcontext, ranks=2),
        Saboteur("gpu", ("b",), nullcontext, backends=("cuda",)),
    ]
    SABOTEURS = {one.name: one for one in ALL}
"""


def test_engines_of_one_kind_follow_each_other(installed: Inner) -> None:
    installed.pytester.makepyfile(mine=SABOTEURS)
    result = installed.run("--vllm-prove", "--vllm-saboteurs=mine", "--collect-only", "-q")
    names = [line.partition("[")[2].rstrip("]") for line in result.outlines if "::" in line]
    assert names == ["shared", "breaks-shared", "starts-shared", "ranks", "one-rank-ranks", "ray", "under-ray-ray"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--vllm-prove", "tests"], "*chooses the tests itself, and tests was given*-k"),
        (["--vllm-prove", "--vllm-saboteurs=nowhere"], "*nowhere cannot be imported*"),
        (["--vllm-prove", "--vllm-saboteurs=json"], "*json has no SABOTEURS*"),
    ],
)
def test_mistakes(installed: Inner, arguments: list[str], says: str) -> None:
    installed.pytester.mkdir("tests")
    result = installed.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {says}"])


def test_table() -> None:
    records: list[dict[str, Any]] = [
        {"kind": "shared", "saboteur": "", "verdicts": {"a-one": "passed", "b": "failed", "c": "n/a"}},
        {"kind": "ranks", "saboteur": "", "verdicts": {"a-one": "passed"}},
        {"kind": "shared", "saboteur": "breaks", "verdicts": {"a-one": "failed", "b": "passed"}},
        {"kind": "shared", "saboteur": "stops", "verdicts": {"a-one": "not run", "c": "n/a"}},
    ]
    assert lines(records) == [
        "contract  honest    saboteurs",
        "a-one     passed    breaks: caught, stops: NOT RUN",
        "b         FAILED    breaks: SURVIVED",
        "c         n/a       stops: n/a",
        "3 contracts, 2 saboteurs: 1 of 3 pairs caught",
    ]


def test_a_verdict_needs_an_answer() -> None:
    session = InnerSession(None, None, {}, once=False)  # type: ignore[arg-type]
    session.failed["fails"].append("no")
    session.passed.update(fails=1, passes=1, breaks=1)
    session.other["breaks"].append("error")
    session.elsewhere.add("elsewhere")
    verdicts = {one: session.verdict(one, "passed") for one in ("fails", "passes", "breaks", "elsewhere", "absent")}
    assert verdicts == {
        "fails": "failed", "passes": "passed", "breaks": "not run", "elsewhere": "n/a", "absent": "not run"
    }  # fmt: skip
    assert session.verdict("breaks", "failed") == "passed", "one test noticed nothing"
