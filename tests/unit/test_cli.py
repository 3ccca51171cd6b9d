"""``roll-vllm``, as typed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patch_target import RELEASE, Faked, patch

from roll_vllm import cli, versions
from roll_vllm.patches import command, drift, released
from roll_vllm.patches.apply import selected
from roll_vllm.patches.patch import Patch
from roll_vllm.patches.registry import PATCHES

RUN = patch("engine:Engine.run", relies_on=("faked.base:Base.inherited",))
LOAD = patch("worker:Worker.load", versions="<0.12")


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faked]:
    """Two patches of the stand-in, which has the same code in every release."""
    faked = Faked(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    patches: tuple[Patch, ...] = (RUN, LOAD)
    monkeypatch.setattr(command, "PATCHES", patches)
    monkeypatch.setattr(released, "trees", lambda releases, **options: {release: faked.tree for release in releases})
    monkeypatch.setattr(drift, "FILE", tmp_path / "fingerprints.json")
    drift.FILE.write_text("{}", encoding="utf-8")
    drift.recorded.cache_clear()
    monkeypatch.setattr(versions, "installed", lambda: versions.Installed("vllm", RELEASE))
    yield faked
    drift.recorded.cache_clear()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    drift.recorded.cache_clear()
    status = cli.main(["patches", *arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_record_then_verify(faked: Faked, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--record") == (0, f"wrote {drift.FILE}\n")
    data = json.loads(drift.FILE.read_text(encoding="utf-8"))
    assert set(data) == {"faked.engine:Engine.run", "faked.base:Base.inherited", "faked.worker:Worker.load"}
    assert list(data["faked.engine:Engine.run"]) == [row.release for row in versions.TESTED]
    assert "0.12.0" not in data["faked.worker:Worker.load"]
    assert data["faked.base:Base.inherited"]["0.8.4"]["parameters"] == ["self", "value"]
    status, output = run(capsys, "--verify")
    assert status == 0
    assert output.startswith("14 targets in 5 releases checked, 0 mismatches")


def test_verify_says_wanted_and_found(faked: Faked, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--record")
    faked.edit("base", "def inherited(self, value)", "def inherited(self, value, more)")
    (faked.root / "faked/worker.py").unlink()
    status, output = run(capsys, "--verify")
    assert status == 1
    assert "9 mismatches" in output
    assert (
        "MISMATCH 0.12.0: patch 'run' does not fit the installed code: faked.base:Base.inherited: wanted the" in output
    )
    assert "parameters (self, value), found (self, value, more) in " in output
    assert "MISMATCH 0.8.4: patch 'load' has no target: faked.worker:Worker.load: wanted (self, value)" in output


def test_verify_finds_a_patch_without_a_fingerprint(faked: Faked, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = run(capsys, "--verify")
    assert status == 1
    assert "0.8.4: patch 'run' covers this release, but has no fingerprint for it" in output


def test_record_refuses_a_missing_target(faked: Faked, capsys: pytest.CaptureFixture[str]) -> None:
    faked.edit("worker", "load", "loads")
    status, output = run(capsys, "--record")
    assert status == 2
    assert "patch 'load' covers 0.8.4, where faked.worker:Worker.load is not found" in output
    assert drift.FILE.read_text(encoding="utf-8") == "{}"


def test_all(faked: Faked, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--record")
    status, output = run(capsys, "--all")
    assert status == 0
    assert [line.split() for line in output.splitlines()] == [
        [row.release for row in versions.TESTED],
        ["run", "yes", "yes", "yes", "yes", "yes"],
        ["load", "yes", "yes", "yes", "yes", "-"],
    ]


def test_all_marks_what_was_not_reviewed(faked: Faked, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--all")[1].splitlines()[1].split() == ["run", "?", "?", "?", "?", "?"]


def test_the_installed_version(faked: Faked, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--record")
    status, output = run(capsys)
    assert status == 0
    assert output.splitlines()[0] == f"vllm {RELEASE}"
    assert "run: fits, applied in the processes of a rollout engine" in output
    for line in ("  target       faked.engine:Engine.run", "  why          w", "  remove when  r"):
        assert line in output
    assert "not applicable: load" in output


def test_an_installed_version_that_was_changed(faked: Faked, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--record")
    faked.edit("engine", '["run", value]', '["ran", value]')
    status, output = run(capsys)
    assert status == 1
    assert "run: does not fit: patch 'run'" in output


def test_an_installed_version_that_is_not_tested(
    faked: Faked, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, "--record")
    monkeypatch.setattr(versions, "installed", lambda: versions.Installed("vllm", "0.11.2"))
    status, output = run(capsys)
    assert (status, "run: not applied, because this release was not reviewed" in output) == (0, True)


def test_without_vllm(faked: Faked, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: None)
    assert run(capsys) == (
        2,
        "roll-vllm: vLLM is not installed here; install a tested version, or use --all\n",
    )


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["patches", "--all", "--verify"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: roll-vllm" in capsys.readouterr().err


def test_the_real_registry_over_sources_that_are_not_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the network: every target of every patch is missed, in every release."""
    for row in versions.TESTED:
        (tmp_path / f"vllm-{row.release}/vllm").mkdir(parents=True)
    drift.recorded.cache_clear()
    status, output = run(capsys, "--verify", "--sources", str(tmp_path))
    assert status == 1
    assert output.count("has no target") == sum(len(selected(PATCHES, row.release)) for row in versions.TESTED)


def test_commands_are_declared_by_modules() -> None:
    for one in cli._COMMANDS:
        module: Any = one
        assert callable(module.add_to)
        assert callable(module.run)
