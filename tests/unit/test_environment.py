"""The variables of a worker: computed without side effects, applied and restored exactly."""

from __future__ import annotations

import itertools
import logging
import os
import random
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from roll_vllm import environment
from roll_vllm.environment import AppliedEnvironment, worker_environment
from roll_vllm.errors import ConfigurationError


def compute(
    environ: Mapping[str, str] | None = None,
    *,
    name: str | None = "actor-0",
    kind: str = "cuda",
    version: str = "0.12.0",
    port: int | None = None,
    cache_home: Path | None = None,
) -> dict[str, str]:
    return worker_environment(
        worker_name=name,
        device_kind=kind,
        vllm_version=version,
        port=port,
        environ={"HOME": "/home/user"} if environ is None else environ,
        cache_home=cache_home,
    )


# --- the allocator ---------------------------------------------------------------------------------------

SPELLINGS = [
    "expandable_segments:True",
    "expandable_segments:False",
    " expandable_segments : True ",
    "Expandable_Segments:true",
    "EXPANDABLE_SEGMENTS:TRUE",
    "expandable-segments:True",
    "expandable _segments:True",
    "expandable_segments=True",
    "expandable_segments",
    "\texpandable_segments:True\n",
]
OTHERS = [
    "max_split_size_mb:128",
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
    "backend:native",
    "garbage_collection_threshold:0.8",
    "pinned_use_background_threads:True",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("position", range(len(OTHERS) + 1))
def test_only_expandable_segments_is_removed(spelling: str, position: int) -> None:
    options = [*OTHERS[:position], spelling, *OTHERS[position:]]
    assert environment.without_expandable_segments(",".join(options)) == ",".join(OTHERS)


@pytest.mark.parametrize("seed", range(50))
def test_the_other_options_survive_in_order(seed: int) -> None:
    chance = random.Random(seed)
    options = [chance.choice(OTHERS + SPELLINGS + [""]) for _ in range(chance.randrange(8))]
    expected = ",".join(option for option in options if option in OTHERS)
    cleaned = environment.without_expandable_segments(",".join(options))
    assert cleaned == expected
    assert environment.without_expandable_segments(cleaned) == cleaned


@pytest.mark.parametrize("options", ["", ",", " , ", "expandable_segments:True", "expandable_segments:True,"])
def test_nothing_left_is_empty(options: str) -> None:
    assert environment.without_expandable_segments(options) == ""


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:64"},
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"},  # an empty PYTORCH_CUDA_ALLOC_CONF would hide it
        ),
        (
            {
                "PYTORCH_HIP_ALLOC_CONF": "backend:native",
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            },
            {"PYTORCH_HIP_ALLOC_CONF": "backend:native", "PYTORCH_CUDA_ALLOC_CONF": ""},
        ),
        (  # torch does not read this one
            {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
            {"PYTORCH_NPU_ALLOC_CONF": "", "PYTORCH_CUDA_ALLOC_CONF": ""},
        ),
    ],
)
def test_allocator_variables(environ: dict[str, str], expected: dict[str, str]) -> None:
    changes = compute(environ)
    assert {name: value for name, value in changes.items() if name.endswith("_ALLOC_CONF")} == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (None, "expandable_segments:False"),
        ({}, "expandable_segments:False"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments:False"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:64"},
            "max_split_size_mb:64,expandable_segments:False",
        ),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native,expandable_segments:False"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "", "PYTORCH_ALLOC_CONF": "backend:native"},
            "expandable_segments:False",
        ),
    ],
)
def test_setting_for_a_running_allocator(environ: dict[str, str] | None, expected: str) -> None:
    assert environment.allocator_setting(environ) == expected


# --- the other variables ---------------------------------------------------------------------------------


def test_all_variables_of_a_plain_worker() -> None:
    assert compute(port=4711) == {
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
        "VLLM_CACHE_ROOT": "/home/user/.cache/vllm/actor-0",
        "FLASHINFER_WORKSPACE_BASE": "/home/user/.cache/vllm/actor-0",
        "VLLM_PORT": "4711",
    }


def test_nothing_is_changed_by_computing() -> None:
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "VLLM_USE_V1": "0"}
    before, process = dict(environ), dict(os.environ)
    compute(environ, version="0.10.2", port=1)
    assert environ == before
    assert dict(os.environ) == process


def test_workers_do_not_share_a_dictionary() -> None:
    first, second = compute(), compute()
    first["VLLM_PORT"] = "1"
    assert "VLLM_PORT" not in second


@pytest.mark.parametrize(
    ("version", "kind", "user", "engine", "variable"),
    [
        ("0.8.4", "cuda", None, "V1", "1"),
        ("0.8.4", "rocm", None, "V0", "0"),
        ("0.8.4", "npu", None, "V1", "1"),
        ("0.8.4", "cpu", None, "V0", "0"),  # the CPU build has no other
        ("0.8.4", "cpu-reference", None, "V1", "1"),
        ("0.8.4", "cpu-reference", "0", "V0", "0"),
        ("0.8.4", "cuda", "0", "V0", "0"),
        ("0.8.4", "rocm", "1", "V1", "1"),
        ("0.8.4", "rocm", "", "V0", "0"),
        ("0.10.2+rocm641", "rocm", None, "V0", "0"),
        ("0.10.2", "cuda", " 1 ", "V1", "1"),
        ("0.10.2", "cpu-reference", None, "V1", "1"),
        ("0.10.0", "cuda", "0", "V0", "0"),  # not tested, and older than the first release without V0
        ("0.11.0", "cuda", None, "V1", "1"),
        ("0.11.0", "rocm", None, "V1", "1"),
        ("0.11.1", "cuda", None, "V1", None),
        ("0.11.1rc2.dev0+gabc", "rocm", None, "V1", None),
        ("0.12.0.post2", "cpu", "1", "V1", None),
        ("0.33.0", "cuda", None, "V1", None),
    ],
)
def test_engine_generation(version: str, kind: str, user: str | None, engine: str, variable: str | None) -> None:
    environ = {} if user is None else {"VLLM_USE_V1": user}
    assert environment.engine_generation(version, kind, environ) == engine
    assert compute(environ, version=version, kind=kind).get("VLLM_USE_V1") == variable


@pytest.mark.parametrize(
    ("version", "kind", "user", "message"),
    [
        ("0.12.0", "cuda", "0", "vLLM 0.12.0 has no V0 engine; unset VLLM_USE_V1, or use .* one: 0.8.4, 0.10.2$"),
        ("0.11.0+cu126", "cuda", "0", "vLLM 0.11.0.cu126 has no V0 engine; unset VLLM_USE_V1"),
        ("0.33.0", "rocm", "0", "vLLM 0.33.0 has no V0 engine; unset VLLM_USE_V1"),
        ("0.10.2", "npu", "0", "vLLM 0.10.2 has no V0 engine on npu; unset VLLM_USE_V1, or use .* one: 0.8.4$"),
        ("0.10.2", "cpu", "0", "vLLM 0.10.2 has no V0 engine on cpu; .* one: 0.8.4$"),
        ("0.11.0", "cpu-reference", "0", "vLLM 0.11.0 has no V0 engine; .* one: 0.8.4, 0.10.2$"),
        ("0.8.4", "cpu", "1", "vLLM 0.8.4 has no V1 engine on cpu; unset VLLM_USE_V1, or use .*: 0.10.2, 0.11.0"),
        ("0.8.4", "cuda", "true", "VLLM_USE_V1='true' must be 0 or 1"),
        ("0.8.4", "tpu", None, "unknown backend 'tpu'; choose one of: cuda, rocm, npu, cpu, cpu-reference"),
    ],
)
def test_an_engine_that_is_not_there_is_refused(version: str, kind: str, user: str | None, message: str) -> None:
    environ = {} if user is None else {"VLLM_USE_V1": user}
    for ask in (
        lambda: environment.engine_generation(version, kind, environ),
        lambda: compute(environ, version=version, kind=kind),
    ):
        with pytest.raises(ConfigurationError, match=message):
            ask()


def test_a_backend_adds_its_own_variables() -> None:
    plain = compute()
    assert compute(kind="cpu") == plain
    assert compute(kind="npu") == {**plain, "PYTORCH_NPU_ALLOC_CONF": ""}
    rocm = compute({"HOME": "/home/user", "CUDA_VISIBLE_DEVICES": "1"}, kind="rocm")
    assert rocm == {**plain, "HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "1"}
    reference = {"ROLL_VLLM_CPU_REFERENCE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    assert compute(kind="cpu-reference") == {**plain, **reference}


def test_a_malformed_version_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'dev' is not a version"):
        compute(version="dev")


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_an_impossible_port_is_refused(port: int) -> None:
    with pytest.raises(ConfigurationError, match=f"port {port} "):
        compute(port=port)


def test_free_port_can_be_bound() -> None:
    port = environment.free_port()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("", port))


# --- caches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "cache_home", "vllm", "flashinfer"),
    [
        ({"HOME": "/h"}, None, "/h/.cache/vllm/w", "/h/.cache/vllm/w"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, None, "/x/vllm/w", "/x/vllm/w"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "", "VLLM_CACHE_ROOT": ""}, None, "/h/.cache/vllm/w", None),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, Path("/c"), "/c/vllm/w", "/c/vllm/w"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x", "VLLM_CACHE_ROOT": "/v"}, Path("/c"), "/v/w", "/v/w"),
        ({"HOME": "/h", "VLLM_CACHE_ROOT": "~/v"}, None, "/h/v/w", "/h/v/w"),
        ({"HOME": "/h", "FLASHINFER_WORKSPACE_BASE": "/f"}, None, "/h/.cache/vllm/w", "/f/w"),
    ],
)
def test_cache_roots(environ: dict[str, str], cache_home: Path | None, vllm: str, flashinfer: str | None) -> None:
    changes = compute(environ, name="w", cache_home=cache_home)
    assert changes["VLLM_CACHE_ROOT"] == vllm
    assert changes["FLASHINFER_WORKSPACE_BASE"] == (flashinfer or vllm)


NAMES = [
    "actor_infer-0",
    "actor_infer-1",
    "a/b",
    "a_b",
    "a b",
    "a.b",
    "a\\b",
    " a_b",
    "a_b ",
    "..",
    ".",
    "../..",
    "/",
    "/etc",
    "~",
    "$HOME",
    "a\0b",
    "名前",
    "名",
    "\udc80",
    "x" * 80,
    "x" * 81,
    "x" * 5000,
    "x" * 5001,
    "unnamed",
    f"unnamed.{os.getpid()}.0",
]


def test_names_stay_inside_the_root_and_apart() -> None:
    directories = [environment.worker_directory(name) for name in NAMES]
    # A name that looks like the result for another name must not meet it.
    directories += [environment.worker_directory(directory) for directory in directories if "." in directory]
    assert len(set(directories)) == len(directories)
    for directory in directories:
        assert Path(directory).parts == (directory,)
        assert directory.strip(".")
        assert len(directory) < 200
        assert directory.isascii()


def test_the_same_name_keeps_its_cache() -> None:
    assert compute(name="a/b")["VLLM_CACHE_ROOT"] == compute(name="a/b")["VLLM_CACHE_ROOT"]


@pytest.mark.parametrize(("first", "second"), list(itertools.product((None, "", " \n"), repeat=2)))
def test_workers_without_a_name_do_not_share_a_cache(first: str | None, second: str | None) -> None:
    one, two = compute(name=first), compute(name=second)
    for variable in ("VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE"):
        assert one[variable] != two[variable]
        assert Path(one[variable]).parent == Path("/home/user/.cache/vllm")


def test_a_cache_directory_is_created_and_left_empty(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert environment.ensure_cache_directory(path) == path
    assert environment.ensure_cache_directory(path) == path
    assert list(path.iterdir()) == []


def test_an_unwritable_cache_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "cache"
    with pytest.raises(ConfigurationError, match="set VLLM_CACHE_ROOT") as caught:
        environment.ensure_cache_directory(path)
    assert str(path) in str(caught.value)
    assert "Not a directory" in str(caught.value)


# --- applying and restoring ------------------------------------------------------------------------------


def test_apply_and_restore() -> None:
    environ = {"kept": "1", "changed": "old", "removed": "x"}
    before = dict(environ)
    with AppliedEnvironment({"changed": "new", "added": "y", "removed": None, "absent": None}, environ):
        assert environ == {"kept": "1", "changed": "new", "added": "y"}
    assert environ == before


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROLL_VLLM_TEST", raising=False)
    with AppliedEnvironment({"ROLL_VLLM_TEST": "1"}):
        assert os.environ["ROLL_VLLM_TEST"] == "1"
    assert "ROLL_VLLM_TEST" not in os.environ


def test_apply_and_restore_may_be_repeated() -> None:
    environ = {"a": "old"}
    applied = AppliedEnvironment({"a": "new"}, environ)
    applied.restore()
    assert environ == {"a": "old"}
    for _ in range(2):
        assert applied.apply().apply() is applied
        assert environ == {"a": "new"}
        applied.restore()
        environ["a"] = "old"
        applied.restore()
        assert environ == {"a": "old"}


def test_restores_after_an_exception() -> None:
    environ: dict[str, str] = {}
    with pytest.raises(KeyError), AppliedEnvironment({"a": "1"}, environ):
        raise KeyError
    assert environ == {}


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLL_VLLM_TEST", "old")
    applied = AppliedEnvironment({"ROLL_VLLM_TEST": "new", "ROLL_VLLM_BAD": "null\0byte"})
    with pytest.raises(ValueError, match="null byte"):
        applied.apply()
    assert os.environ["ROLL_VLLM_TEST"] == "old"
    assert "ROLL_VLLM_BAD" not in os.environ


@pytest.mark.parametrize("foreign", ["theirs", None])
def test_foreign_changes_are_left_alone_and_logged(foreign: str | None, caplog: pytest.LogCaptureFixture) -> None:
    environ = {"a": "old", "b": "old"}
    with caplog.at_level(logging.WARNING), AppliedEnvironment({"a": "new", "b": "new"}, environ):
        environ.pop("a")
        if foreign:
            environ["a"] = foreign
    assert environ == ({"a": foreign, "b": "old"} if foreign else {"b": "old"})
    assert [record.getMessage() for record in caplog.records] == ["a was changed by somebody else; leaving it as it is"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_may_end_in_any_order(order: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    environ = {"a": "old", "c": "old"}
    before = dict(environ)
    layers = [
        AppliedEnvironment(changes, environ).apply()
        for changes in (
            {"a": "0", "b": "0", "only": "0"},
            {"a": "1", "b": None, "c": "1"},
            {"a": None, "b": "2", "c": "2"},
        )
    ]
    for index in order:
        layers[index].restore()
    assert environ == before
    assert caplog.records == []


def test_a_foreign_change_between_two_layers_survives(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"a": "old"}
    first = AppliedEnvironment({"a": "1"}, environ).apply()
    environ["a"] = "theirs"
    second = AppliedEnvironment({"a": "2"}, environ).apply()
    first.restore()
    second.restore()
    assert environ == {"a": "theirs"}
    assert len(caplog.records) == 1


def test_different_environments_do_not_meet() -> None:
    one: dict[str, str] = {}
    two: dict[str, str] = {}
    first = AppliedEnvironment({"a": "1"}, one).apply()
    second = AppliedEnvironment({"a": "1"}, two).apply()
    first.restore()
    assert (one, two) == ({}, {"a": "1"})
    second.restore()
    assert two == {}


def test_threads_leave_nothing_behind() -> None:
    environ = {"shared": "old"}

    def work(name: str) -> None:
        for _ in range(200):
            with AppliedEnvironment({"shared": name, name: name}, environ):
                pass

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert environ == {"shared": "old"}


def test_ranks_of_one_host_talk_on_it() -> None:
    alone = environment.one_host_environment({})
    assert alone["VLLM_HOST_IP"] == "127.0.0.1"
    assert alone.get("GLOO_SOCKET_IFNAME", "lo") == "lo"
    assert environment.one_host_environment({"VLLM_HOST_IP": "", "GLOO_SOCKET_IFNAME": ""}) == alone
    assert environment.one_host_environment({"VLLM_HOST_IP": "10.0.0.7", "GLOO_SOCKET_IFNAME": "eth0"}) == {}
