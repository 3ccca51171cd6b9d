"""What each process of an engine does with the patches, and the record that it leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patch_target import RELEASE, Faked, clean_imports, patch

from roll_vllm import versions
from roll_vllm.errors import ConfigurationError
from roll_vllm.patches import command, drift, process, registry, sources
from roll_vllm.patches.patch import DriftError, Patch, PatchError
from roll_vllm.patches.process import Record

RUN = patch("engine:Engine.run")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faked]:
    """The stand-in is installed as if it were vLLM 0.12.0, and this process starts anew."""
    monkeypatch.syspath_prepend(tmp_path)
    faked = Faked(tmp_path)
    use(monkeypatch, faked, RUN, patch("worker:Worker.load", versions="<0.12"))
    monkeypatch.setattr(versions, "installed", lambda: versions.Installed("vllm", f"{RELEASE}.post2"))
    monkeypatch.setattr(process, "_state", process._State())
    monkeypatch.delenv(process.VARIABLE, raising=False)
    with clean_imports():
        yield faked
        process.undo_here()


def use(monkeypatch: pytest.MonkeyPatch, faked: Faked, *patches: Patch) -> None:
    monkeypatch.setattr(registry, "PATCHES", patches)
    known = command.fingerprints(patches, {RELEASE: faked.tree})
    monkeypatch.setattr(drift, "recorded", lambda: known)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "records"
    monkeypatch.setenv(process.VARIABLE, str(directory))
    return directory


def outcomes(record: Record) -> dict[str, str]:
    return {name: outcome.outcome for name, outcome in record.patches.items()}


def test_the_plugin_does_nothing_by_itself(faked: Faked) -> None:
    process.load()
    assert faked.module("engine").Engine().run(1) == ["run", 1]
    assert process.record()["patches"] == {}


def test_the_plugin_imports_little(tmp_path: Path) -> None:
    program = "import sys; from roll_vllm.patches.process import load; load(); print(sorted(sys.modules))"
    environ = {name: value for name, value in os.environ.items() if name != process.VARIABLE}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "vllm", "numpy"} & set(done.stdout.replace("'", "").split(", "))


def test_the_plugin_applies_and_records(faked: Faked, records: Path) -> None:
    process.load()
    (record,) = process.read_records(records)
    assert (record.pid, record.ppid, record.role) == (os.getpid(), os.getppid(), "MainProcess")
    assert (record.version, record.argv) == ("0.12.0.post2", tuple(sys.argv))
    assert outcomes(record) == {"run": "deferred", "load": "not applicable"}
    assert faked.module("engine").Engine().run(1) == ["patched", "run", 1]
    (record,) = process.read_records(records)
    assert outcomes(record) == {"run": "applied", "load": "not applicable"}
    assert process.record() == record.as_dict()
    assert [path.suffix for path in records.iterdir()] == [".json"]


def test_applying_again_changes_the_role_only(faked: Faked, records: Path) -> None:
    process.load()
    record = process.require("worker")
    assert faked.module("engine").Engine().run(1) == ["patched", "run", 1]
    assert (record.role, process.read_records(records)[0].role) == ("worker", "worker")


def test_a_worker_whose_plugin_did_not_run(
    faked: Faked, records: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert process.require("worker").late
    assert process.read_records(records)[0].late
    assert "the plugin of roll_vllm did not run in process" in caplog.text
    assert process.require("worker").late
    process.undo_here()
    process.load()
    assert not process.require("worker").late


@pytest.mark.parametrize(("allowed", "fits"), [("", False), ("other", False), ("other,roll_vllm", True)])
def test_an_allow_list_without_the_plugin(
    faked: Faked, monkeypatch: pytest.MonkeyPatch, allowed: str, fits: bool
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    if fits:
        process.require("worker")
        return
    with pytest.raises(ConfigurationError, match="add 'roll_vllm'"):
        process.require("worker")
    process.apply_here("parent")
    assert not process.require("worker").late


def test_without_a_directory_nothing_is_written(faked: Faked) -> None:
    faked.module("engine")
    assert outcomes(process.apply_here("parent"))["run"] == "applied"
    assert process.record()["role"] == "parent"


def test_a_failure_is_recorded_and_raised_later(
    faked: Faked, records: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faked.edit("engine", '["run", value]', '["ran", value]')
    process.load()
    (record,) = process.read_records(records)
    assert outcomes(record) == {"run": "failed", "load": "not applicable"}
    assert record.error == record.patches["run"].reason
    assert "were not applied" in caplog.text
    for _ in range(2):
        with pytest.raises(DriftError, match="does not fit the installed code"):
            process.require("worker")


def test_a_failure_at_a_late_import_is_recorded_and_raised_again(
    faked: Faked, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(original: Any) -> Any:
        raise OSError("no")

    use(monkeypatch, faked, patch("engine:Engine.run", replacement=broken))
    process.apply_here("parent")
    with pytest.raises(PatchError, match="OSError: no"):
        faked.module("engine")
    (record,) = process.read_records(records)
    assert outcomes(record) == {"run": "failed"}
    assert "OSError: no" in record.error
    with pytest.raises(PatchError, match="OSError: no"):
        process.require("worker")


@pytest.mark.parametrize("installed", [None, versions.Installed("vllm", "nonsense")])
def test_no_vllm_is_a_failure_too(
    faked: Faked, records: Path, monkeypatch: pytest.MonkeyPatch, installed: versions.Installed | None
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: installed)
    process.load()
    assert process.read_records(records)[0].error
    with pytest.raises(ConfigurationError):
        process.require("worker")


def test_what_nobody_expected_is_a_patch_error(faked: Faked, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(package: str) -> Any:
        raise RuntimeError("disk")

    monkeypatch.setattr(sources, "installed", lost)
    process.load()
    with pytest.raises(PatchError, match="RuntimeError: disk"):
        process.require("worker")


def test_undo_takes_the_record_along(faked: Faked, records: Path) -> None:
    faked.module("engine")
    process.apply_here("parent")
    process.undo_here()
    assert faked.module("engine").Engine().run(1) == ["run", 1]
    assert process.read_records(records) == []
    assert process.record()["patches"] == {}
    process.apply_here("parent")
    assert faked.module("engine").Engine().run(1) == ["patched", "run", 1]


def child(role: str) -> None:
    if role:
        process.require(role)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_leaves_its_own_record(faked: Faked, records: Path) -> None:
    faked.module("engine")
    process.apply_here("parent")
    context = multiprocessing.get_context("fork")
    started = {role: context.Process(target=child, args=(role,)) for role in ("", "worker")}
    for one in started.values():
        one.start()
    for one in started.values():
        one.join()
        assert one.exitcode == 0
    roles = {record.pid: record.role for record in process.read_records(records)}
    assert roles == {
        os.getpid(): "parent",
        started[""].pid: "fork of parent",
        started["worker"].pid: "worker",
    }
    assert {outcomes(record)["run"] for record in process.read_records(records)} == {"applied"}


def test_a_file_that_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text(json.dumps({"pid": 1}), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="is not a record of applied patches"):
        process.read_records(tmp_path)


def test_records_of_nobody(tmp_path: Path) -> None:
    assert process.read_records(tmp_path) == []


def test_the_entry_point_is_this_function() -> None:
    from importlib.metadata import EntryPoint

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if "patches.process" in line]
    value = line.partition("=")[2].strip().strip('"')
    assert EntryPoint("roll_vllm", value, "vllm.general_plugins").load() is process.load
