"""Targets: what they declare, how they are found, and which contracts concern them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar

import pytest
from plugin_harness import Inner

from pytest_roll_vllm import targets
from pytest_roll_vllm.targets import CAPABILITIES, FULL, Capability, NotSupportedError, Support, Target
from roll_vllm.errors import ConfigurationError

NO = Capability(Support.UNSUPPORTED, "it is a stone")


class Stone(Target):
    name = "stone"
    capabilities: ClassVar[Mapping[str, Capability]] = {
        **dict.fromkeys(CAPABILITIES, NO),
        "abort": FULL,
        "lora": Capability(Support.NOT_IMPLEMENTED, "later"),
        "pause": Capability(Support.VERSIONED, "old stones roll", versions=">=0.11", engines=("V1",)),
    }

    async def start(self, arguments: Mapping[str, Any]) -> None:
        pass

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        return
        yield

    async def shutdown(self) -> None:
        pass


class Mute(Stone):
    name = "mute"
    capabilities: ClassVar[Mapping[str, Capability]] = {}


MAKES_NO_SENSE: list[tuple[dict[str, Any], str]] = [
    ({"support": Support.FULL, "versions": ">=1"}, "VERSIONED"),
    ({"support": Support.VERSIONED, "reason": "why"}, "VERSIONED"),
    ({"support": Support.UNSUPPORTED}, "reason"),
    ({"support": Support.NOT_IMPLEMENTED}, "reason"),
    ({"support": Support.VERSIONED, "versions": "new", "reason": "why"}, "new"),
]


@pytest.mark.parametrize(("fields", "says"), MAKES_NO_SENSE)
def test_a_declaration_that_makes_no_sense(fields: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, ConfigurationError), match=says):
        Capability(**fields)


@pytest.mark.parametrize(
    ("capability", "vllm_version", "engine", "here"),
    [
        ("abort", "0.8.4", "V0", True),
        ("sleep", "0.12.0", "V1", False),
        ("lora", "0.12.0", "V1", False),
        ("pause", "0.10.2", "V1", False),
        ("pause", "0.12.0.post2", "V1", True),
        ("pause", "0.12.0", "V0", False),
    ],
)
def test_what_is_missing(capability: str, vllm_version: str, engine: str, here: bool) -> None:
    why = targets.missing(Stone, capability, vllm_version, "cpu", engine)
    assert not why if here else Stone.capability(capability).reason in why
    assert not targets.missing(Mute, capability, vllm_version, "cpu", engine), "what nobody has said runs"


@pytest.mark.parametrize(
    ("call", "capability"),
    [
        (lambda target: target.abort(["a"]), "abort"),
        (lambda target: target.update({}), "update"),
        (lambda target: target.update({}, transport="collective"), "update.collective"),
        (lambda target: target.sleep(), "sleep"),
        (lambda target: target.sleep(2), "sleep.level2"),
        (lambda target: target.wake_up(), "sleep"),
        (lambda target: target.wake_up(["weights"]), "sleep.tags"),
        (lambda target: target.add_lora({}, {}), "lora"),
        (lambda target: target.pause_generation("keep"), "pause.keep"),
        (lambda target: target.resume_generation(), "pause"),
        (lambda target: target.state(), "state"),
        (lambda target: target.checksums(), "checksum"),
        (lambda target: target.reset_prefix_cache(), "cache.reset"),
    ],
)
def test_what_is_not_written_is_refused(call: Any, capability: str) -> None:
    with pytest.raises(NotSupportedError) as caught:
        asyncio.run(call(Stone()))
    assert f"{capability} (" in str(caught.value)
    declared = Stone.capability(capability)
    assert (declared.reason or "NOT_IMPLEMENTED") in str(caught.value)


def test_ours_declare_every_capability() -> None:
    for name in ("roll_vllm", "vllm"):
        assert set(targets.resolve(name).capabilities) == set(CAPABILITIES)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rolvllm", "roll_vllm, vllm"),
        ("nowhere:Target", "nowhere"),
        ("pytest_roll_vllm.targets:Missing", "Missing"),
        ("pytest_roll_vllm.targets:Support", "no subclass"),
    ],
)
def test_a_target_that_is_none(name: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        targets.resolve(name)


def test_an_unknown_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mute, "capabilities", {"levitation": FULL})
    with pytest.raises(ConfigurationError, match=r"levitation; the capabilities are abort, "):
        targets.resolve(f"{__name__}:Mute")


SOURCE = """
    import pytest
    from pytest_roll_vllm.contracts import contract

    @contract("a-sleeps", "It sleeps.", needs=("sleep",))
    def test_sleep(): pass

    @pytest.mark.vllm_needs("abort", "lora")
    def test_lora(): pass

    @contract("b-aborts", "It aborts.", needs=("abort",))
    def test_abort(): pass
"""


def test_contracts_that_need_what_is_missing_do_not_apply(installed: Inner) -> None:
    result = installed.run(f"--vllm-target={__name__}:Stone", "--vllm-report=out", source=SOURCE)
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(
        ["NOT APPLICABLE a-sleeps: *needs sleep, which the target stone declares unsupported: it is a stone"]
    )
    installed.run("test_contracts_that_need_what_is_missing_do_not_apply.py").assert_outcomes(passed=3)


def test_a_capability_that_nobody_knows(installed: Inner) -> None:
    source = "import pytest\n@pytest.mark.vllm_needs('slep')\ndef test(): pass"
    result = installed.run(source=source)
    result.stderr.fnmatch_lines(["*unknown capability 'slep'; choose from abort, *"])


def test_a_target_that_is_not_there(installed: Inner) -> None:
    result = installed.run("--vllm-target=nothing", source=SOURCE)
    result.stderr.fnmatch_lines(["ERROR: target nothing (from --vllm-target): no target named 'nothing'*"])
