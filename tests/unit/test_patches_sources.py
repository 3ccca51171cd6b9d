"""Finding targets in sources, what counts as the same code, and fetching the sources of releases."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import shutil
import tarfile
import urllib.request
from pathlib import Path

import pytest
from patch_target import Faked

from roll_vllm.errors import ConfigurationError
from roll_vllm.patches import released
from roll_vllm.patches.fingerprint import fingerprint, parameters
from roll_vllm.patches.sources import NotFound, installed


def function(source: str) -> ast.FunctionDef:
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


# --- parsing ---------------------------------------------------------------------------------------------


def test_another_thread_that_parses_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python up to 3.11.7 counts how deep it is for all threads together."""
    parse, disturbed = ast.parse, iter([True, True, False])

    def fragile(*arguments: str) -> ast.AST:
        if next(disturbed):
            raise SystemError("AST constructor recursion depth mismatch (before=60, after=112)")
        return parse(*arguments)

    monkeypatch.setattr(ast, "parse", fragile)
    found = installed("json").find("json.decoder:JSONDecoder.decode")
    monkeypatch.undo()  # pytest parses, too
    assert found.parameters[0] == "self"


# --- fingerprints ----------------------------------------------------------------------------------------

SOURCE = "def f(a, *, b=1):\n    return g(a, b)"


@pytest.mark.parametrize(
    "same",
    [
        'def f(a, *, b=1):\n    """Doc."""\n    return g(a, b)',
        "def f(\n    a,\n    *,\n    b=1,  # why\n):\n\n    return g(\n        a, b\n    )",
    ],
)
def test_the_same_code(same: str) -> None:
    assert fingerprint(function(same)) == fingerprint(function(SOURCE))


@pytest.mark.parametrize(
    "other",
    [
        "def f(a, *, b=2):\n    return g(a, b)",
        "def f(a, *, b=True):\n    return g(a, b)",
        "def f(a: int, *, b=1):\n    return g(a, b)",
        "@d\ndef f(a, *, b=1):\n    return g(a, b)",
        "def f(a, *, b=1):\n    return g(b, a)",
        "def f(a, *, b=1):\n    'x'; 'y'\n    return g(a, b)",
        "def f(a, b=1):\n    return g(a, b)",
        "async def f(a, *, b=1):\n    return g(a, b)",
    ],
)
def test_other_code(other: str) -> None:
    node = ast.parse(other).body[0]
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    assert fingerprint(node) != fingerprint(function(SOURCE))


def test_parameters() -> None:
    assert parameters(function("def f(a, /, b, *c, d, **e): pass")) == ["a", "b", "*c", "d", "**e"]
    assert parameters(function("def f(*, d): pass")) == ["*", "d"]
    assert parameters(function("def f(): pass")) == []


def test_the_same_for_every_python() -> None:
    """The environments of tox run this under each of them; what changed most between them are f-strings."""
    source = r"""
def f(x: "int" = -1, *y) -> None:
    return f"{x!r:>{y[0]}} {x=} \n" f"b" "c", lambda: (yield), x[1:2, ...]
"""
    assert fingerprint(function(source)) == "81350a12054eb13b"


# --- trees -----------------------------------------------------------------------------------------------


def test_finds(tmp_path: Path) -> None:
    tree = Faked(tmp_path).tree
    found = tree.find("faked.engine:Engine.stop")
    assert (found.parameters, found.decorated) == (("self", "value", "*rest", "now", "**more"), False)
    assert found.path == tmp_path / "faked/engine.py"
    assert tree.find("faked.engine:Engine.decorated").decorated
    assert tree.find("faked.engine:function").parameters == ("value",)
    assert tree.find("faked.engine:Engine.Inner.run").line > found.line


def test_finds_what_is_inherited_from_another_module(tmp_path: Path) -> None:
    assert Faked(tmp_path).tree.find("faked.engine:Engine.inherited").path == tmp_path / "faked/base.py"


def test_the_last_definition_counts(tmp_path: Path) -> None:
    faked = Faked(tmp_path)
    faked.edit("worker", "class Worker:", "class Worker:\n    def load(self, old): ...\n")
    assert faked.tree.find("faked.worker:Worker.load").parameters == ("self", "value")


@pytest.mark.parametrize(
    ("target", "missing"),
    [
        ("faked.none:Engine.run", "no module faked.none"),
        ("faked.engine:Other.run", "no class Other"),
        ("faked.engine:Engine.other", "no function Engine.other"),
        ("faked.engine:other", "no function other"),
    ],
)
def test_says_what_is_missing(tmp_path: Path, target: str, missing: str) -> None:
    with pytest.raises(NotFound, match=missing):
        Faked(tmp_path).tree.find(target)


def test_an_installed_package_is_not_imported() -> None:
    assert installed("pytest_roll_vllm").find("pytest_roll_vllm.plugin:pytest_configure").parameters == ("config",)
    with pytest.raises(NotFound, match="no package not_there"):
        installed("not_there")


# --- released sources ------------------------------------------------------------------------------------


class Index:
    """A package index in a directory, as ``file:`` URLs: what urllib reads is what it would be sent."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root / "index"
        (self.root / "vllm").mkdir(parents=True)
        for name in released._INDEX_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PIP_INDEX_URL", self.root.as_uri())
        # A directory has no page of its own.
        find = urllib.request.urlopen

        def opened(request: object, timeout: float) -> object:
            url = getattr(request, "full_url", request)
            return find(f"{url}index.html" if str(url).endswith("/") else str(url), timeout=timeout)

        monkeypatch.setattr(urllib.request, "urlopen", opened)

    def add(self, release: str, files: dict[str, str], digest: str | None = None) -> None:
        archive = self.root / "vllm" / f"vllm-{release}.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for name, text in files.items():
                member = tarfile.TarInfo(f"vllm-{release}/{name}")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        actual = hashlib.sha256(archive.read_bytes()).hexdigest()
        link = f'<a href="vllm-{release}.tar.gz#sha256={digest or actual}">vllm-{release}.tar.gz</a>\n'
        with (self.root / "vllm/index.html").open("a", encoding="utf-8") as page:
            page.write(link)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(tmp_path, monkeypatch)


GOOD = {
    "vllm/engine.py": "class E:\n    def run(self): ...\n",
    "vllm/data.bin": "x",
    "setup.py": "",
    "vllm/../x.py": "",
}


def test_fetches_python_files_once(index: Index, tmp_path: Path) -> None:
    index.add("0.12.0", GOOD)
    cache = tmp_path / "cache"
    tree = released.trees(["0.12.0"], cache=cache)["0.12.0"]
    assert tree.find("vllm.engine:E.run").parameters == ("self",)
    assert sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()) == [
        "vllm-0.12.0/vllm/engine.py"
    ]
    shutil.rmtree(index.root)
    assert released.trees(["0.12.0"], cache=cache)["0.12.0"].find("vllm.engine:E.run")


def test_a_wrong_digest_leaves_nothing(index: Index, tmp_path: Path) -> None:
    index.add("0.12.0", GOOD, digest="0" * 64)
    with pytest.raises(ConfigurationError, match="SHA-256"):
        released.trees(["0.12.0"], cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_release_that_the_index_lacks(index: Index, tmp_path: Path) -> None:
    index.add("0.12.0", GOOD)
    with pytest.raises(ConfigurationError, match=r"has no vllm-0\.13\.0\.tar\.gz\); set PIP_INDEX_URL"):
        released.trees(["0.12.0", "0.13.0"], cache=tmp_path / "cache")


def test_an_archive_without_the_package(index: Index, tmp_path: Path) -> None:
    index.add("0.12.0", {"setup.py": ""})
    with pytest.raises(ConfigurationError, match=r"has no vllm-0\.12\.0/vllm"):
        released.trees(["0.12.0"], cache=tmp_path / "cache")


def test_an_index_that_answers_in_json(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add("0.12.0", GOOD)
    archive = index.root / "vllm/vllm-0.12.0.tar.gz"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    file = {"filename": archive.name, "url": archive.as_uri(), "hashes": {"sha256": digest}}
    (index.root / "vllm/page.json").write_text(json.dumps({"files": [file]}), encoding="utf-8")
    plain = urllib.request.urlopen

    def opened(request: object, timeout: float) -> object:
        # By its name, urllib takes the file for what an index would declare: application/json.
        page = (index.root / "vllm/page.json").as_uri()
        return plain(page if hasattr(request, "full_url") else str(request), timeout=timeout)

    monkeypatch.setattr(urllib.request, "urlopen", opened)
    assert released.trees(["0.12.0"], cache=tmp_path / "cache")["0.12.0"].find("vllm.engine:E.run")


def test_unpacked_sources(tmp_path: Path) -> None:
    (tmp_path / "vllm-0.12.0/vllm").mkdir(parents=True)
    assert set(released.trees(["0.12.0"], sources=tmp_path)) == {"0.12.0"}
    with pytest.raises(ConfigurationError, match=r"has no directory vllm-0\.8\.4/vllm"):
        released.trees(["0.12.0", "0.8.4"], sources=tmp_path)
