"""Setting patches and taking them back, on a stand-in for vLLM."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patch_target import Faked, clean_imports, patch, prefixed

from roll_vllm.errors import ConfigurationError, RollVllmError
from roll_vllm.patches import apply
from roll_vllm.patches.patch import (
    DriftError,
    ForeignChangeError,
    MissingTargetError,
    OverlapError,
    Patch,
    PatchError,
)

RUN = "engine:Engine.run"


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faked]:
    monkeypatch.syspath_prepend(tmp_path)
    with clean_imports():
        yield Faked(tmp_path)


# --- declarations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("versions", [">=0.8", "!=0.9", ">0.8,!=0.9", ""])
def test_a_range_without_an_end_is_refused(versions: str) -> None:
    with pytest.raises(ConfigurationError, match="has no end"):
        patch(RUN, versions=versions)


@pytest.mark.parametrize("target", ["engine:function", "engine.Engine.run", ":Engine.run"])
def test_only_methods_can_be_patched(target: str) -> None:
    with pytest.raises(ConfigurationError, match="name a method as"):
        Patch("name", target, "<0.13", prefixed, "w", "u", "r")


# --- apply and undo --------------------------------------------------------------------------------------


def test_applies_now_where_the_module_is_imported(faked: Faked) -> None:
    engine = faked.module("engine").Engine()
    application = faked.application(patch(RUN))
    application.apply()
    assert engine.run(1) == ["patched", "run", 1]
    assert application.outcomes["run"].outcome == "applied"
    application.undo()
    assert engine.run(1) == ["run", 1]


def test_applies_on_import_where_it_is_not(faked: Faked) -> None:
    changes: list[str] = []
    application = faked.application(patch(RUN), changed=lambda: changes.append(application.outcomes["run"].outcome))
    application.apply()
    assert not faked.imported("engine")
    assert application.outcomes["run"].outcome == "deferred"
    module = faked.module("engine")
    assert module.Engine().run(1) == ["patched", "run", 1]
    assert changes == ["applied"]
    assert type(module.__loader__).__module__ == "_frozen_importlib_external"
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    application.undo()
    assert module.Engine().run(1) == ["run", 1]


def test_undo_before_the_import_leaves_nothing(faked: Faked) -> None:
    application = faked.application(patch(RUN))
    application.apply()
    application.undo()
    assert faked.module("engine").Engine().run(1) == ["run", 1]


@pytest.mark.parametrize("name", ["run", "stop", "static", "of", "decorated"])
def test_every_kind_of_method_comes_back_as_it_was(faked: Faked, name: str) -> None:
    owner = faked.module("engine").Engine
    before = dict(vars(owner))
    plain = getattr(owner(), name)(1)
    application = faked.application(patch(f"engine:Engine.{name}"))
    application.apply()
    assert getattr(owner(), name)(1) == ["patched", *plain]
    application.undo()
    assert dict(vars(owner)) == before


def test_a_nested_class(faked: Faked) -> None:
    application = faked.application(patch("engine:Engine.Inner.run"))
    application.apply()
    assert faked.module("engine").Engine.Inner().run(1) == ["patched", "inner", 1]
    application.undo()


def test_an_inherited_method_leaves_no_shadow(faked: Faked) -> None:
    owner, base = faked.module("engine").Engine, faked.module("base").Base
    application = faked.application(patch("engine:Engine.inherited"))
    application.apply()
    assert owner().inherited(1) == ["patched", "base", 1]
    assert base().inherited(1) == ["base", 1]
    application.undo()
    assert "inherited" not in vars(owner)
    base.inherited = lambda self, value: ["later", value]
    assert owner().inherited(1) == ["later", 1]


def test_twice_is_once(faked: Faked) -> None:
    faked.module("engine")
    application = faked.application(patch(RUN))
    application.apply()
    application.apply()
    assert faked.module("engine").Engine().run(1) == ["patched", "run", 1]
    application.undo()
    application.undo()
    application.apply()
    assert faked.module("engine").Engine().run(1) == ["patched", "run", 1]
    application.undo()


def test_undo_goes_backwards(faked: Faked, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = faked.module("engine").Engine
    application = faked.application(patch(RUN), patch("engine:Engine.stop"))
    application.apply()
    done = [name for name, value in vars(owner).items() if hasattr(value, "__wrapped__")]
    assert {"run", "stop"} <= set(done)
    undone: list[str] = []
    monkeypatch.setattr(apply, "setattr", lambda *change: undone.append(change[1]), raising=False)
    application.undo()
    assert undone == ["stop", "run"]


def test_many_threads_apply_once(faked: Faked) -> None:
    faked.module("engine")
    calls: list[Any] = []

    def counted(original: Any) -> Any:
        calls.append(original)
        return prefixed(original)

    application = faked.application(patch(RUN, replacement=counted), patch("worker:Worker.load", replacement=counted))
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        application.apply()
        faked.module("worker")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 2
    assert faked.module("worker").Worker().load(1) == ["patched", "load", 1]
    application.undo()


# --- refusals --------------------------------------------------------------------------------------------


def refused(faked: Faked, kind: type[PatchError], *patches: Patch, recorded: Any = None) -> PatchError:
    """Apply patches to the package, next to one that fits; nothing may be changed."""
    owner = faked.module("engine").Engine
    before = dict(vars(owner))
    application = faked.application(patch("engine:Engine.stop"), *patches, recorded=recorded)
    with pytest.raises(kind) as caught:
        application.apply()
    assert dict(vars(owner)) == before
    outcomes = application.outcomes
    assert all(outcome.outcome == "failed" for outcome in outcomes.values()), outcomes
    assert patches[0].name in outcomes["stop"].reason
    assert outcomes[patches[0].name].reason == str(caught.value)
    with pytest.raises(kind):
        application.apply()
    return caught.value


def recorded_before(faked: Faked, *patches: Patch) -> Any:
    from roll_vllm.patches.command import fingerprints

    return fingerprints([patch("engine:Engine.stop"), *patches], {"0.12.0": faked.tree})


def test_a_missing_method(faked: Faked) -> None:
    recorded = recorded_before(faked, patch(RUN))
    faked.edit("engine", "def run(self, value):\n        # A comment.", "def runs(self, value):")
    error = refused(faked, MissingTargetError, patch(RUN), recorded=recorded)
    assert error.target == "faked.engine:Engine.run"
    assert error.wanted == "(self, value) as in 0.12.0"
    assert error.found == "no function Engine.run in faked.engine"


def test_a_missing_class(faked: Faked) -> None:
    recorded = recorded_before(faked, patch("worker:Worker.load"))
    faked.edit("worker", "Worker", "Workers")
    assert "no class Worker" in refused(faked, MissingTargetError, patch("worker:Worker.load"), recorded=recorded).found


def test_a_missing_module(faked: Faked) -> None:
    recorded = recorded_before(faked, patch("worker:Worker.load"))
    (faked.root / "faked/worker.py").unlink()
    assert "no module" in refused(faked, MissingTargetError, patch("worker:Worker.load"), recorded=recorded).found


def test_other_parameters(faked: Faked) -> None:
    recorded = recorded_before(faked, patch(RUN))
    faked.edit("engine", "def run(self, value)", "def run(self, value, extra=None)")
    error = refused(faked, DriftError, patch(RUN), recorded=recorded)
    assert error.wanted == "the parameters (self, value)"
    assert error.found.startswith("(self, value, extra) in ")


def test_other_code(faked: Faked) -> None:
    recorded = recorded_before(faked, patch(RUN))
    faked.edit("engine", '["run", value]', '["ran", value]')
    error = refused(faked, DriftError, patch(RUN), recorded=recorded)
    assert "the code of 0.12.0" in error.wanted
    assert f"{faked.root / 'faked/engine.py'}:15" in error.found


def test_other_code_of_something_it_relies_on(faked: Faked) -> None:
    leaning = patch(RUN, relies_on=("faked.worker:Worker.load",))
    recorded = recorded_before(faked, leaning)
    faked.edit("worker", '"load"', '"loads"')
    assert refused(faked, DriftError, leaning, recorded=recorded).target == "faked.worker:Worker.load"


@pytest.mark.parametrize(("old", "new"), [("# A comment.", '"""A docstring."""'), ("# A comment.", "\n\n        # b")])
def test_what_has_no_effect_is_no_drift(faked: Faked, old: str, new: str) -> None:
    recorded = recorded_before(faked, patch(RUN))
    faked.edit("engine", old, new)
    application = faked.application(patch(RUN), recorded=recorded)
    application.apply()
    assert faked.module("engine").Engine().run(1) == ["patched", "run", 1]
    application.undo()


def test_two_patches_of_one_attribute(faked: Faked) -> None:
    one, other = patch(RUN, "one", versions="<0.13"), patch(RUN, "other", versions=">=0.12,<0.20")
    with pytest.raises(OverlapError, match="'other' overlaps") as caught:
        faked.application(one, other, recorded={}).apply()
    assert caught.value.found == "'one' for <0.13 and 'other' for >=0.12,<0.20"


def test_two_patches_of_one_name(faked: Faked) -> None:
    with pytest.raises(OverlapError):
        faked.application(patch(RUN, "one"), patch("worker:Worker.load", "one"), recorded={}).apply()


def test_a_moved_target_is_two_entries(faked: Faked) -> None:
    old, new = patch("worker:Worker.load", "moved", versions="<0.12"), patch(RUN, "moved", versions=">=0.12,<0.13")
    application = faked.application(old, new)
    application.apply()
    assert faked.module("engine").Engine().run(1) == ["patched", "run", 1]
    assert faked.module("worker").Worker().load(1) == ["load", 1]
    application.undo()


def test_somebody_else_s_change_before(faked: Faked) -> None:
    owner = faked.module("engine").Engine
    original, owner.run = owner.run, lambda self, value: ["theirs", value]
    error = refused(faked, ForeignChangeError, patch(RUN))
    assert "<lambda>" in error.found
    assert error.wanted.endswith("engine.py:15")
    owner.run = original


def test_somebody_else_s_wrapper_before(faked: Faked) -> None:
    owner = faked.module("engine").Engine
    owner.run = prefixed(owner.run)
    assert "patched" not in refused(faked, ForeignChangeError, patch(RUN)).wanted


def test_somebody_else_s_class(faked: Faked) -> None:
    module = faked.module("engine")
    module.Engine = type("Engine", (module.Engine,), {})  # type: ignore[attr-defined]
    with pytest.raises(ForeignChangeError) as caught:
        faked.application(patch(RUN)).apply()
    assert caught.value.wanted == "the class faked.engine:Engine"
    assert caught.value.found == "test_patches_apply:Engine"
    assert "run" not in vars(module.Engine)


def test_a_replacement_that_fails(faked: Faked) -> None:
    def broken(original: Any) -> Any:
        raise KeyError("nothing")

    assert "KeyError: 'nothing'" in refused(faked, PatchError, patch(RUN, replacement=broken)).found


def test_a_failure_at_a_late_import_undoes_the_rest(faked: Faked) -> None:
    def broken(original: Any) -> Any:
        raise KeyError("nothing")

    owner = faked.module("engine").Engine
    changes: list[bool] = []
    application = faked.application(
        patch(RUN), patch("worker:Worker.load", replacement=broken), changed=lambda: changes.append(True)
    )
    application.apply()
    assert owner().run(1) == ["patched", "run", 1]
    with pytest.raises(PatchError, match="KeyError"):
        faked.module("worker")
    assert owner().run(1) == ["run", 1]
    assert {outcome.outcome for outcome in application.outcomes.values()} == {"failed"}
    assert application.error is not None
    assert len(changes) == 2
    assert not faked.imported("worker")


def test_somebody_else_s_change_meanwhile(faked: Faked) -> None:
    owner = faked.module("engine").Engine
    application = faked.application(patch(RUN), patch("engine:Engine.stop"))
    application.apply()
    theirs = prefixed(owner.run)
    owner.run = theirs
    with pytest.raises(ForeignChangeError, match=r"'run' meets somebody else's change"):
        application.undo()
    assert owner.run is theirs
    assert owner().stop(1) == ["stop", 1]


def test_a_release_that_was_not_reviewed(faked: Faked) -> None:
    application = faked.application(patch(RUN), version="0.11.2")
    application.apply()
    assert faked.module("engine").Engine().run(1) == ["run", 1]
    outcome = application.outcomes["run"]
    assert (outcome.outcome, outcome.reason[:33]) == ("not applicable", "no fingerprint for vLLM 0.11.2: t")


@pytest.mark.parametrize("version", ["0.12.0.post2", "0.12.0+cu128", "0.12.0rc1"])
def test_suffixes_do_not_matter(faked: Faked, version: str) -> None:
    application = faked.application(patch(RUN), version=version)
    application.apply()
    assert application.outcomes["run"].outcome == "deferred"
    application.undo()


def test_a_version_outside_of_the_range(faked: Faked) -> None:
    application = faked.application(patch(RUN), version="0.13.0")
    application.apply()
    assert application.outcomes["run"].reason == "for vLLM >=0.8,<0.13"
    assert not application._done


@pytest.mark.parametrize("kind", [PatchError, DriftError, MissingTargetError, OverlapError, ForeignChangeError])
def test_errors_cross_processes(kind: type[PatchError]) -> None:
    error = pickle.loads(pickle.dumps(kind("name", "a:B.c", "this", "that")))
    assert type(error) is kind
    assert (error.patch, error.target, error.wanted, error.found) == ("name", "a:B.c", "this", "that")
    assert isinstance(error, RollVllmError)
    assert isinstance(error, RuntimeError)
    for part in ("'name'", "a:B.c", "this", "that", kind.remedy):
        assert part in str(error)


def test_the_hook_is_gone_afterwards(faked: Faked) -> None:
    finders = list(sys.meta_path)
    application = faked.application(patch(RUN))
    application.apply()
    assert len(sys.meta_path) == len(finders) + 1
    application.undo()
    assert sys.meta_path == finders
