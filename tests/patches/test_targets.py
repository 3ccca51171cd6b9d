"""Every patch fits the installed release: where it is, what it looks like, in every order and every process."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from on_vllm import SELECTED, VERSION, owner_of
from patch_orderings import ORDERINGS

from roll_vllm.patches import drift, process, sources
from roll_vllm.patches.patch import Patch

ROOT = Path(__file__).parents[2]
every = pytest.mark.parametrize("patch", SELECTED, ids=lambda patch: patch.name)

CONFTEST = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from on_vllm import SELECTED, PATCHES, VERSION
"""

ORDERS = """
import importlib, os
from patch_orderings import ORDERINGS, run
from roll_vllm.patches.apply import Application

# One process has imported all that the targets need; each order runs in a fork of it, where the modules of the
# targets themselves are imported anew. Those that register custom operators can be imported only once.
ONCE = ("fused_moe", "layers.linear")
patches = [patch for patch in SELECTED if not any(part in patch.module for part in ONCE)]
for patch in patches:
    importlib.import_module(patch.module)
for patch in patches:
    sys.modules.pop(patch.module, None)
failed = []
for order in ORDERINGS:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            run(order, Application(patches, VERSION), patches)
            status = 0
        except BaseException as error:
            print(error, flush=True)
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        failed.append(order)
print("failed:", failed, "of", len(ORDERINGS), "patches:", len(patches))
"""

APPLY = """
import importlib
from roll_vllm.patches import process

record = process.apply_here("parent")
for patch in SELECTED:
    importlib.import_module(patch.module)
outcomes = process.record()["patches"]
assert all(outcomes[patch.name]["outcome"] == "applied" for patch in SELECTED), outcomes
assert all(outcomes[patch.name]["outcome"] == "not applicable" for patch in PATCHES if patch.name not in
           {chosen.name for chosen in SELECTED}), outcomes
from on_vllm import owner_of
replaced = {patch.name: vars(owner_of(patch)[0])[owner_of(patch)[1]] for patch in SELECTED}
assert all("roll_vllm" in function.__code__.co_filename for function in replaced.values()), replaced
process.undo_here()
for patch in SELECTED:
    owner, name = owner_of(patch)
    assert vars(owner)[name] is replaced[patch.name].__wrapped__, patch.name
print("applied and undone:", len(SELECTED))
"""


def run(program: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environ}, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_the_release_has_patches() -> None:
    assert SELECTED, VERSION


@every
def test_static_and_live_agree(patch: Patch) -> None:
    owner, name = owner_of(patch)
    live = inspect.getattr_static(owner, name)
    found = sources.installed("vllm").find(patch.target)
    live = inspect.unwrap(live) if found.decorated else live
    assert (live.__code__.co_firstlineno, live.__code__.co_filename) == (found.line, str(found.path))
    assert list(inspect.signature(live).parameters) == [name.lstrip("*") for name in found.parameters]


@every
def test_what_a_patch_relies_on_is_live_too(patch: Patch) -> None:
    for target in patch.relies_on:
        module, _, qualname = target.partition(":")
        value = sys.modules.get(module) or __import__(module, fromlist=["_"])
        for part in qualname.split("."):
            value = inspect.getattr_static(value, part)
        function = getattr(value, "__func__", value)
        found = sources.installed("vllm").find(target)
        assert function.__code__.co_firstlineno == found.line, target


@every
def test_the_installed_code_is_the_released_code(patch: Patch) -> None:
    from roll_vllm.versions import resolve

    row = resolve(VERSION)
    assert row is not None
    drift.check(patch, row.release, sources.installed("vllm"), drift.recorded())


@every
def test_a_replacement_takes_what_the_original_takes(patch: Patch) -> None:
    """By its own code, not by the signature that it copies from the original."""
    owner, name = owner_of(patch)
    original = inspect.getattr_static(owner, name)
    replaced = patch.replacement(original)
    own = inspect.signature(replaced, follow_wrapped=False).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
        return
    assert [p.name for p in own] == list(inspect.signature(original).parameters)
    assert [p.default for p in own] == [p.default for p in inspect.signature(original).parameters.values()]


def test_apply_and_undo() -> None:
    assert run(CONFTEST + APPLY) == f"applied and undone: {len(SELECTED)}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_order() -> None:
    done = run(CONFTEST + ORDERS)
    assert done.startswith(f"failed: [] of {len(ORDERINGS)} patches: "), done
    assert int(done.rpartition(" ")[2]) > 0


PLUGIN = """
import multiprocessing, os, sys

def child():
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    import vllm.v1.engine.output_processor

if __name__ == "__main__":
    child()
    one = multiprocessing.get_context("spawn").Process(target=child, name="EngineCore_0")
    one.start()
    one.join()
    assert one.exitcode == 0
    print(os.getpid(), one.pid)
"""


def plugin_environment(directory: Path) -> dict[str, str]:
    """The entry point as it is installed, also where only the checkout is on the path."""
    info = directory / "entry" / "roll_vllm_under_test-0.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: roll-vllm-under-test\nVersion: 0\n")
    info.joinpath("entry_points.txt").write_text("[vllm.general_plugins]\nroll_vllm = roll_vllm.patches.process:load\n")
    return {"PYTHONPATH": os.pathsep.join([str(info.parent), str(ROOT)])}


def test_vllm_s_plugin_loader_reaches_a_spawned_child(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PLUGIN, encoding="utf-8")
    records = tmp_path / "records"
    environ = {**os.environ, **plugin_environment(tmp_path), process.VARIABLE: str(records)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environ, timeout=300)
    assert done.returncode == 0, done.stderr
    parent, child = map(int, done.stdout.split()[-2:])
    found = {record.pid: record for record in process.read_records(records)}
    assert {parent: "MainProcess", child: "EngineCore_0"} == {pid: record.role for pid, record in found.items()}
    assert found[child].ppid == parent
    for record in found.values():
        assert record.error == ""
        assert record.version == VERSION
        outcomes = {name: outcome.outcome for name, outcome in record.patches.items()}
        assert outcomes["abort-logprobs-once"] == "applied"
        assert set(outcomes.values()) <= {"applied", "deferred", "not applicable"}


def test_without_the_variable_vllm_stays_as_it_is(tmp_path: Path) -> None:
    program = (
        "from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "import vllm.v1.engine.output_processor as o; "
        "print(o.RequestState._new_completion_output.__code__.co_filename)"
    )
    environ = {name: value for name, value in os.environ.items() if name != process.VARIABLE}
    environ.update(plugin_environment(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, timeout=300)
    assert done.stdout.strip().endswith("output_processor.py"), done.stderr
