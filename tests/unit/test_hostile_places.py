"""Homes that are missing or cannot be written, full disks, odd locales and odd names: a clear error, or it works."""

from __future__ import annotations

import errno
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from plugin_harness import PLUGIN, Inner

from pytest_roll_vllm.models.cache import publish
from roll_vllm import environment
from roll_vllm.errors import ConfigurationError
from roll_vllm.transfer import shared_memory

SOURCE = """
from pathlib import Path
from pytest_roll_vllm.contracts import contract

@contract("a-cache", "Its cache is there.")
def test_cache(vllm_cache_dir):
    path = vllm_cache_dir / "größe"
    path.write_text("ß", encoding="utf-8")
    Path("cache").write_text(ascii(str(vllm_cache_dir)))

@contract("b-fail", "It fails.")
def test_fail(): assert "größe" == "ß"
"""
HOMELESS = "import os; os.environ.pop('HOME'); os.environ.pop('XDG_CACHE_HOME', None)"  # which pytester sets
WITHOUT_CACHE = """
def test_other(): pass
"""


def run(installed: Inner, environ: Mapping[str, str | None], *args: str, source: str = SOURCE) -> Any:
    """Run pytest in a process of its own, with other variables."""
    for name, value in {"XDG_CACHE_HOME": None, **environ}.items():
        if value is None:
            installed.monkeypatch.delenv(name, raising=False)
        else:
            installed.monkeypatch.setenv(name, value)
    installed.pytester.makepyfile(test_it=source)
    return installed.pytester.runpytest_subprocess("-p", PLUGIN, *args)


def test_a_home_that_cannot_be_written(installed: Inner) -> None:
    home = installed.pytester.path / "home"
    home.touch()  # root may write everywhere else
    run(installed, {"HOME": str(home)}, source=WITHOUT_CACHE).assert_outcomes(passed=1)
    result = run(installed, {"HOME": str(home)}, "-rA")
    text = str(result.stdout) + str(result.stderr)
    assert "cannot write to the directory" in text
    assert "--vllm-cache-dir or PYTEST_VLLM_CACHE_DIR" in text
    assert "INTERNALERROR" not in text
    other = str(installed.pytester.path / "other cache")
    run(installed, {"HOME": str(home)}, "--vllm-cache-dir", other).assert_outcomes(passed=1, failed=1)


def test_no_home(installed: Inner) -> None:
    result = run(installed, {"HOME": None, "PYTEST_VLLM_CACHE_DIR": str(installed.pytester.path / "cache dir")})
    result.assert_outcomes(passed=1, failed=1)


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home, and whom the user database does not know, as in a container with another user's id."""

    def unknown(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("stranger")
def test_a_stranger_can_run_tests(installed: Inner) -> None:
    installed.pytester.makeconftest(HOMELESS)
    installed.run(source=SOURCE).assert_outcomes(passed=1, failed=1)
    # TMPDIR is the directory of the test
    assert f"pytest-roll-vllm-{os.getuid()}" in Path("cache").read_text()


@pytest.mark.usefixtures("stranger")
def test_a_stranger_has_no_directory_of_this_name(installed: Inner) -> None:
    installed.pytester.makeconftest(HOMELESS)
    result = installed.run("--vllm-cache-dir=~/cache", source=SOURCE)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*~/cache (from --vllm-cache-dir)*there is no home directory*absolute path*"])


@pytest.mark.usefixtures("stranger")
def test_a_stranger_is_asked_for_a_cache() -> None:
    with pytest.raises(ConfigurationError, match=r"no home directory.*set HOME, XDG_CACHE_HOME or VLLM_CACHE_ROOT"):
        environment.ensure_cache_directory(environment._cache_roots("w", {}, None)[0])
    assert environment._cache_roots("w", {"VLLM_CACHE_ROOT": "/v"}, None) == (Path("/v/w"), Path("/v/w"))
    assert environment._cache_roots("w", {"XDG_CACHE_HOME": "/x"}, None) == (Path("/x/vllm/w"), Path("/x/vllm/w"))


@pytest.mark.parametrize("name", ["with space", "größe", "weiß 'und' \"so\"", "日本語", "[0] *?"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_odd_names_and_locales(installed: Inner, name: str, locale: str) -> None:
    """Python takes the names of files for UTF-8 in either locale, and the terminal, too."""
    place = installed.pytester.path / name
    args = ("--vllm-report", str(place / "out"), "--vllm-cache-dir", str(place / "cache"))
    environ = {"LC_ALL": locale, "LANG": None, "PYTHONUTF8": None, "PYTHONIOENCODING": None}
    result = run(installed, environ, *args)
    result.assert_outcomes(passed=1, failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    document = json.loads((place / "out/report.json").read_text(encoding="utf-8"))
    assert document["contracts"]["a-cache"]["outcome"] == "passed"
    assert "größe" in (place / "out/report.html").read_text(encoding="utf-8")
    assert Path("cache").read_text() == ascii(str(place / "cache/main"))


def test_a_terminal_that_knows_ascii_only(installed: Inner) -> None:
    environ = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii:backslashreplace",
    }
    source = SOURCE.replace('vllm_cache_dir / "größe"', 'vllm_cache_dir / "name"')  # names of files are ASCII, too
    result = run(installed, environ, "--vllm-report=out", "--vllm-cache-dir=caches", source=source)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "INTERNALERROR" not in str(result.stdout) + str(result.stderr)
    assert json.loads(Path("out/report.json").read_text(encoding="utf-8"))["totals"]["failed"] == 1


def test_no_room_for_a_model(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        (directory / "model").symlink_to("/dev/full")
        (directory / "model").write_text("weights")

    with pytest.raises(ConfigurationError, match=r"model cache .* cannot be written \(.*No space left on device"):
        publish(tmp_path, "counting", "0" * 64, fill)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.ENOENT, errno.EDQUOT])
def test_no_room_for_a_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.delenv("ROLL_VLLM_SHM_DIR", raising=False)
    monkeypatch.setattr(shared_memory, "directory", lambda: tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    remedy = "Enlarge it .*shm size.*, use a smaller bucket_bytes, or point ROLL_VLLM_SHM_DIR elsewhere"
    with pytest.raises(
        ConfigurationError, match=rf"100 bytes of shared memory in {tmp_path}: .*{os.strerror(reason)}.*{remedy}"
    ):
        shared_memory.Segment(100)
    assert list(tmp_path.iterdir()) == []


def test_without_shared_memory_the_temporary_directory_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ROLL_VLLM_SHM_DIR", raising=False)
    assert shared_memory.directory() == Path("/dev/shm")
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda self: str(self) != "/dev/shm" and is_dir(self))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert shared_memory.directory() == tmp_path


def test_a_small_shared_memory(tmp_path: Path) -> None:
    """A real one, where this user may mount it."""
    if (
        os.getuid()
        or subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)],
            capture_output=True,
        ).returncode
    ):
        pytest.skip("this user cannot mount anything")
    program = (
        "from roll_vllm.transfer.shared_memory import Segment\nfrom roll_vllm.errors import ConfigurationError\n"
        "try:\n    Segment(2**20)\nexcept ConfigurationError as error:\n    print(error)\n"
    )
    command = 'mount -t tmpfs -o size=64k tmpfs "$1" && exec "$2" -c "$3"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", str(tmp_path), sys.executable, program],
        env=os.environ | {"ROLL_VLLM_SHM_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"cannot reserve 1048576 bytes of shared memory in {tmp_path}: [Errno 28]"), (
        done.stderr
    )
