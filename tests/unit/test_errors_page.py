"""docs/errors.md and the code say the same: its messages are those of the code, and no class of errors is left out."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from roll_vllm import devices, environment, errors, versions
from roll_vllm.devices import Probe
from roll_vllm.transfer import roll_bucket, shared_memory
from roll_vllm.transfer.manifest import BucketManifest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/errors.md"
CLASSES = {
    name: found
    for name, found in vars(errors).items()
    if isinstance(found, type) and issubclass(found, errors.RollVllmError) and found is not errors.RollVllmError
}
ANYTHING = "\0"


class Entry(NamedTuple):
    title: str
    kind: str
    message: str

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(".+?".join(map(re.escape, self.message.split("..."))), re.DOTALL)


def entries() -> list[Entry]:
    sections = re.findall(r"^## (.+?)\n\n```text\n(.+?)\n```\n\n(.+?)(?=\n## |\Z)", PAGE.read_text(), re.M | re.S)
    assert len(sections) == PAGE.read_text().count("\n## "), "a section has another form"
    for title, _, text in sections:
        assert "**Cause.** " in text, f"{title}: no cause"
        assert "**Solution.** " in text, f"{title}: no solution"
    return [Entry(title, *line.split(": ", 1)) for title, block, _ in sections for line in block.splitlines()]


def text_of(node: ast.AST) -> str | None:
    """The text of a string in the code, with one character for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdr]", ANYTHING, node.value)
    if isinstance(node, ast.JoinedStr):
        parts = []
        for part in node.values:
            inner = getattr(part, "value", None)
            name = inner.id if isinstance(inner, ast.Name) else ""
            # Constants are part of the message.
            known = {"OUT_OF_MEMORY_REMEDY": errors.OUT_OF_MEMORY_REMEDY, "SWITCH": roll_bucket.SWITCH}
            known["FORMAT"] = "roll_vllm.bucket/1"
            parts.append(text_of(part) if isinstance(part, ast.Constant) else known.get(name, ANYTHING))
        return "".join(map(str, parts))
    return None


def strings(tree: ast.AST) -> Iterator[str]:
    """The strings in a piece of code, without the parts of others."""
    found = text_of(tree)
    if found is not None:
        yield found
        return
    for child in ast.iter_child_nodes(tree):
        yield from strings(child)


@cache
def messages() -> dict[str, set[str]]:
    """The texts in the code by what they are of: an error's class, the log, the doctor."""
    found: dict[str, set[str]] = {"log": set(), "doctor": set()}
    for package in ("roll_vllm", "pytest_roll_vllm"):
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if path.parent.name == "doctor":
                found["doctor"].update(strings(tree))
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
                if name in (*CLASSES, "UsageError"):
                    found.setdefault(name, set()).update(strings(node))
                elif name in ("debug", "info", "warning", "error"):
                    found["log"].update(strings(node))
    return found


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: f"{entry.kind}: {entry.message[:40]}")
def test_every_message_of_the_page_is_in_the_code(entry: Entry) -> None:
    assert entry.kind in messages(), f"{entry.kind} is nothing that says anything"
    assert len(entry.message.replace("...", "")) > 10, "a message that fits everything"
    assert any(entry.pattern.fullmatch(text) for text in messages()[entry.kind]), (
        f"docs/errors.md, {entry.title}: no {entry.kind} says {entry.message!r}"
    )


def test_every_error_is_on_the_page() -> None:
    assert {entry.kind for entry in entries()} >= CLASSES.keys()
    assert {entry.kind for entry in entries()} <= {*CLASSES, "UsageError", "log", "doctor"}


@pytest.mark.parametrize(
    "word",
    [
        "version",
        "Ray executor",
        "memory",
        "Expandable segments",
        "port is in use",
        "cache",
        "visible",
        "torch",
        "libstdc",
    ],
)
def test_the_common_errors_are_on_the_page(word: str) -> None:
    assert any(word in entry.title for entry in entries())


def test_the_page_is_linked() -> None:
    assert "(docs/errors.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


RAISED: dict[str, Callable[[Path], Any]] = {
    "No Ray executor": lambda path: versions.require_ray_executor("0.9.0"),
    "A device is not visible": lambda path: devices.detect(
        "cuda", Probe(root=path, environ={}, installed=lambda: None)
    ),
    "A cache cannot be written": lambda path: environment.ensure_cache_directory(path / "file" / "cache"),
    "Shared memory is too small or missing": lambda path: shared_memory.Segment(2**60),
    "A weight update is refused": lambda path: BucketManifest.decode(b"hello"),
    "A weight update is refused ": lambda path: roll_bucket.load(b"\x80\x05N."),
}


@pytest.mark.parametrize("title", RAISED)
def test_what_is_raised_reads_as_on_the_page(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROLL_VLLM_SHM_DIR", str(tmp_path / "missing"))
    monkeypatch.delenv(roll_bucket.SWITCH, raising=False)
    with pytest.raises(errors.RollVllmError) as info:
        RAISED[title](tmp_path)
    kind = type(info.value).__name__
    fitting = [one for one in entries() if one.title == title.strip() and one.kind == kind]
    assert any(one.pattern.fullmatch(str(info.value)) for one in fitting), f"{kind}: {info.value}"


def test_what_is_logged_reads_as_on_the_page(caplog: pytest.LogCaptureFixture) -> None:
    versions.warn_if_untested("0.9.99", logging.getLogger())
    assert any(entry.pattern.fullmatch(caplog.messages[0]) for entry in entries() if entry.kind == "log")
