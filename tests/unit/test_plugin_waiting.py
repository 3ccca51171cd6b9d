"""What is waited for is said on the terminal, in spite of capture, and nothing is said of what takes no time."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_harness import PLUGIN, Inner

from pytest_roll_vllm.engines import describe

# Sooner than for people.
CONFTEST = """
    from pytest_roll_vllm import waiting

    waiting._PATIENCE, waiting._INTERVAL, waiting._TICK = {patience}, {interval}, 0.02
"""
SOURCE = """
    import time
    from pytest_roll_vllm.waiting import waiting

    def test_first(): pass

    def test_slow():
        print("captured")
        with waiting("starting engine"):
            time.sleep({seconds})

    def test_last(): pass
"""


@pytest.fixture
def impatient(installed: Inner) -> Inner:
    """Everything that takes two tenths of a second is waited for."""
    installed.pytester.makeconftest(CONFTEST.format(patience=0.1, interval=0.2))
    return installed


def on_terminal(inner: Inner, *arguments: str) -> str:
    """Run pytest on a terminal of 60 columns, and return what it wrote there."""
    main, other = pty.openpty()
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", *arguments]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "60"}
    with subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=env) as process:
        os.close(other)
        written = b""
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:  # it has ended
                break
            if not part:
                break
            written += part
    os.close(main)
    assert process.returncode == 0, written
    return written.decode()


def test_lines_in_a_log(impatient: Inner) -> None:
    impatient.pytester.makepyfile(test_it=SOURCE.format(seconds=0.7))
    result = impatient.run()
    lines = result.outlines
    said = [number for number, line in enumerate(lines) if line.startswith("waiting: starting engine (")]
    assert 1 <= len(said) <= 3
    assert lines[said[0] - 1] == "test_it.py ."
    assert re.fullmatch(r"test_it\.py \.\.\. +\[100%\]", lines[said[-1] + 1])
    result.stdout.no_fnmatch_line("*captured*")


@pytest.mark.parametrize("arguments", [["-v"], ["-s"]])
def test_lines_elsewhere(impatient: Inner, arguments: list[str]) -> None:
    result = impatient.run(*arguments, source=SOURCE.format(seconds=0.4))
    result.stdout.fnmatch_lines(["*waiting: starting engine (* s)"])


def test_nothing_is_said_when_quiet(impatient: Inner) -> None:
    result = impatient.run("-q", source=SOURCE.format(seconds=0.4))
    result.stdout.no_fnmatch_line("*waiting*")


def test_nothing_is_said_of_what_is_over_soon(installed: Inner) -> None:
    installed.pytester.makeconftest(CONFTEST.format(patience=5, interval=0))
    result = installed.run(source=SOURCE.format(seconds=0.3))
    result.stdout.no_fnmatch_line("*waiting*")


def test_lines_are_rare(installed: Inner) -> None:
    installed.pytester.makeconftest(CONFTEST.format(patience=0, interval=30))
    result = installed.run(source=SOURCE.format(seconds=0.3))
    result.stdout.no_fnmatch_line("*waiting*")


def test_without_pytest_s_terminal(impatient: Inner) -> None:
    assert impatient.run("-p", "no:terminal", source=SOURCE.format(seconds=0.3)).ret == 0


def test_words_on_a_terminal_vanish(impatient: Inner) -> None:
    impatient.pytester.makepyfile(test_it=SOURCE.format(seconds=0.5))
    written = on_terminal(impatient, "test_it.py")
    # Behind the letters, and back; then gone, and the letters go on.
    assert re.search(r"test_it\.py .*\.(\x1b7\x1b\[K waiting: starting engine \(\d s\)\x1b8)+\x1b\[K", written)
    shown = re.sub(r"\x1b7.*?\x1b8|\x1b\[[0-9;]*[A-Za-z]", "", written)
    assert re.search(r"test_it\.py \.\.\. +\[100%\]", shown)
    assert "waiting" not in shown
    assert "captured" not in written


def test_words_do_not_break_a_line(impatient: Inner) -> None:
    source = SOURCE.replace("starting engine", "starting engine" + " of many words" * 9)
    impatient.pytester.makepyfile(test_it=source.format(seconds=0.5))
    words = re.findall(r"\x1b\[K( waiting.*?)\x1b8", on_terminal(impatient, "test_it.py"))
    assert {len(one) for one in words} == {60 - len("test_it.py .") - 1}
    assert all(re.search(r" \(\d s\)$", one) for one in words)


def test_what_is_begun_last_is_shown(impatient: Inner) -> None:
    impatient.pytester.makepyfile(
        test_it="""
        import time
        from pytest_roll_vllm.waiting import waiting

        def test_nested():
            with waiting("outer"):
                with waiting("inner"):
                    time.sleep(0.4)
                time.sleep(0.4)
        """
    )
    written = on_terminal(impatient, "test_it.py")
    assert re.search(r"(waiting: inner.*)(waiting: outer)", written)
    assert not re.search(r"(waiting: outer.*)(waiting: inner)", written)


@pytest.mark.parametrize("how", ["raise RuntimeError", "os._exit(3)"])
def test_workers_of_xdist(impatient: Inner, how: str) -> None:
    source = f"""
        import os, time
        from pytest_roll_vllm.waiting import waiting

        def test_it():
            with waiting("starting engine"):
                time.sleep(1)
                {how}
    """
    impatient.pytester.makepyfile(test_it=source)
    result = impatient.run("-pxdist", "-n1", "--max-worker-restart=0", "test_it.py")
    result.stdout.fnmatch_lines(["gw0: waiting: starting engine (* s)", "*1 failed*"])
    assert not list(impatient.pytester.path.glob("*.waiting"))


def test_an_environment(impatient: Inner) -> None:
    impatient.fake_uv()
    impatient.monkeypatch.setenv("FAKE_UV_SECONDS", "1")
    for variable in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        impatient.monkeypatch.setenv(variable, "")
    versions = ("--vllm-version=0.11.0", "--vllm-version=0.12.0", "--vllm-backend=cpu")
    result = impatient.run("-pxdist", "--vllm-provision", *versions, source="def test(): pass")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["waiting: provisioning 0.11.0-cpu (* s)", "waiting: provisioning 0.12.0-cpu (* s)"])


def test_the_start_of_an_engine(impatient: Inner) -> None:
    impatient.pytester.makepyfile(
        slow="""
        import asyncio
        from pytest_roll_vllm.targets import Target

        class Slow(Target):
            name = "slow"

            async def start(self, arguments):
                await asyncio.sleep(0.5)

            async def generate(self, prompt, sampling_params, request_id, *, lora_request=None):
                yield

            async def shutdown(self): pass
        """
    )
    impatient.pytester.syspathinsert()
    source = """
        import asyncio

        def test_it(vllm_engine_creator):
            asyncio.run(vllm_engine_creator({"model": "/models/tiny", "tensor_parallel_size": 2})())
    """
    result = impatient.run("--vllm-target=slow:Slow", source=source)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["waiting: starting engine tiny tp=2 (* s)"])


def test_engines_are_named(tmp_path: Path) -> None:
    class Executor: ...

    assert describe({"model": str(tmp_path)}) == tmp_path.name
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    arguments = {"model": str(tmp_path), "tensor_parallel_size": 2, "pipeline_parallel_size": 1}
    assert describe({**arguments, "distributed_executor_backend": "mp"}) == "Qwen2ForCausalLM tp=2 mp"
    assert describe({**arguments, "distributed_executor_backend": Executor}) == "Qwen2ForCausalLM tp=2 Executor"
