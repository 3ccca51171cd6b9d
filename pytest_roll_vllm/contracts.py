"""Contracts: sentences that an engine must keep, each proven by one or more tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

BACKENDS = ("cpu", "cuda", "rocm", "npu")
VERSIONS = ">=0.8.4,<0.13"


@dataclass(frozen=True)
class Contract:
    """What a test proves.

    Attributes:
        id: Short name, in lower case: ``abort-unblocks-caller``.
        sentence: What an engine must do.
        versions: The vLLM versions it concerns, as a PEP 440 specifier.
        backends: The kinds of device it concerns.
        references: Where it comes from: issues, pull requests, papers.
        needs: The capabilities that a target must have for it, by the names of ``targets.CAPABILITIES``.
    """

    id: str
    sentence: str
    versions: str = VERSIONS
    backends: Sequence[str] = BACKENDS
    references: Sequence[str] = ()
    needs: Sequence[str] = ()

    def __post_init__(self) -> None:
        from roll_vllm import versions

        if not re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", self.id):
            raise ValueError(f"the id {self.id!r} must be lower-case words joined by '-'")
        if not self.sentence.strip():
            raise ValueError("the sentence is empty")
        versions.satisfies("0", self.versions)  # raises if malformed
        check_backends(self.backends)
        check_capabilities(self.needs)


def contract(
    id: str,
    sentence: str,
    *,
    versions: str = VERSIONS,
    backends: Sequence[str] = BACKENDS,
    references: Sequence[str] = (),
    needs: Sequence[str] = (),
) -> pytest.MarkDecorator:
    """Make a test function, or every test of a class, a test of a contract.

    Several tests may carry one contract, with the same words: keep the decorator in a variable to share it.
    The arguments are those of :class:`Contract`, and are checked when the test is collected. Off the given
    versions and backends, and on a target without a capability that it needs, the test does not run, and the contract
    is "not applicable".
    """
    return pytest.mark.vllm_contract(
        id=id,
        sentence=sentence,
        versions=versions,
        backends=tuple(backends),
        references=tuple(references),
        needs=tuple(needs),
    )


def check_backends(kinds: Sequence[str]) -> None:
    """Check that all kinds of device are known, and that there is one.

    Raises:
        ValueError: If not.
    """
    unknown = ", ".join(repr(kind) for kind in kinds if kind not in BACKENDS)
    if unknown or not kinds:
        raise ValueError(f"unknown backend {unknown or '(none)'}; choose from {', '.join(BACKENDS)}")


def check_capabilities(names: Sequence[str]) -> None:
    """Check that targets have capabilities of all these names.

    Raises:
        ValueError: If not.
    """
    from pytest_roll_vllm.targets import CAPABILITIES

    unknown = [repr(name) for name in names if name not in CAPABILITIES]
    if unknown:
        raise ValueError(f"unknown capability {', '.join(unknown)}; choose from {', '.join(CAPABILITIES)}")
