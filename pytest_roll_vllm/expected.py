"""Expectations: which contracts are known to fail, or must not be run, where, and why. ``gaps.py`` judges by them.

They come from expectations files in TOML, those of the user and the one that this package has for a target, and from
the gaps in the table of releases. The module reads and checks them, and has no side effect.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pytest_roll_vllm.contracts import BACKENDS
from roll_vllm import versions
from roll_vllm.errors import ConfigurationError

FAIL, SKIP = OUTCOMES = ("fail", "skip")

OWN_TARGET = "roll_vllm"
"""The target whose gaps the table of releases declares."""

_SHIPPED = Path(__file__).with_name("expectations")
_TABLE = "expect"
_REQUIRED = ("contract", "outcome", "reason", "link")
_ENGINES = ("V0", "V1")
_CHOICES: Mapping[str, tuple[str, ...]] = {"backends": (*BACKENDS, "cpu-reference"), "targets": ()}
_KEYS = (*_REQUIRED, "test", "versions", "engine", *_CHOICES)


@dataclass(frozen=True)
class Place:
    """What tests run on.

    Attributes:
        version: The vLLM version.
        engine: The engine generation, ``V0`` or ``V1``.
        backend: The name of the backend.
        target: The target, as ``--vllm-target`` names it.
    """

    version: str
    engine: str
    backend: str
    target: str

    def __str__(self) -> str:
        row = versions.resolve(self.version)
        target = "" if self.target == OWN_TARGET else f", target {self.target}"
        return f"{row.release if row else self.version} ({self.engine}, {self.backend}{target})"


@dataclass(frozen=True)
class Expectation:
    """What is expected of some tests, in some places.

    Attributes:
        contract: The id of their contract; ``*`` and ``?`` stand for any characters and for one.
        outcome: ``fail`` if they run and must fail, ``skip`` if they do not run.
        reason: One sentence that says why.
        link: The address of what shows it, or an issue as ``owner/repository#number``.
        source: Where this is declared, for messages.
        test: The name of the tests, with ``*`` and ``?`` likewise, and with or without their parameters.
        versions: The vLLM versions concerned, as a PEP 440 specifier; empty for all of them.
        engines: The engine generations concerned.
        backends: The names of the backends concerned; empty for all of them.
        targets: The targets concerned; empty for all of them.
    """

    contract: str
    outcome: str
    reason: str
    link: str
    source: str
    test: str = "*"
    versions: str = ""
    engines: tuple[str, ...] = _ENGINES
    backends: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """The reason with its link."""
        return f"{self.reason} ({self.link})"

    def applies(self, place: Place) -> bool:
        """Whether it concerns tests in that place."""
        return (
            versions.satisfies(place.version, self.versions)
            and place.engine in self.engines
            and place.backend in (self.backends or (place.backend,))
            and place.target in (self.targets or (place.target,))
        )

    def matches(self, contract: str, nodeid: str) -> bool:
        """Whether it concerns a test of a contract."""
        name = nodeid.partition("::")[2]
        names = (name, name.partition("[")[0])
        return _fits(contract, self.contract) and any(_fits(one, self.test) for one in names)


def of_table() -> Iterator[Expectation]:
    """Yield the gaps of all releases."""
    for row in versions.TESTED:
        for gap in row.gaps:
            yield Expectation(
                gap.contract,
                FAIL,
                gap.reason,
                gap.reference,
                source="roll_vllm/versions.py",
                versions=f"=={row.release}",
                engines=gap.engines,
                backends=gap.backends,
                targets=(OWN_TARGET,),
            )


def of_target(target: str) -> Iterator[Expectation]:
    """Yield what this package has on a target."""
    path = _SHIPPED / f"{target}.toml"
    if re.fullmatch(r"\w+", target) and path.is_file():
        for entry in read(path):
            if entry.targets not in ((), (target,)):
                raise ConfigurationError(f"{entry.source}: the file is that of the target {target!r} alone")
            yield entry


def read(path: Path) -> list[Expectation]:
    """Read an expectations file.

    Raises:
        ConfigurationError: If it cannot be read, or an entry is wrong; the message says which one, and its line.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}; give the path of a TOML file") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 ({error}); save it as that") from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}; see https://toml.io") from error
    _only_known(document, (_TABLE,), str(path), "this file")
    entries = document.get(_TABLE, [])
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise ConfigurationError(f"{path}: {_TABLE!r} is no list of tables; head each entry with [[{_TABLE}]]")
    return [_entry(fields, source) for fields, source in zip(entries, _sources(path, text, len(entries)), strict=True)]


def _sources(path: Path, text: str, count: int) -> list[str]:
    """Name the entries of a file; by their lines, too, unless something else looks like the head of one."""
    heads = [number for number, line in enumerate(text.splitlines(), 1) if re.match(r"\s*\[\[\s*expect\s*\]\]", line)]
    lines = [f" (line {number})" for number in heads] if len(heads) == count else [""] * count
    return [f"{path}, entry {number}{line}" for number, line in enumerate(lines, 1)]


def _entry(fields: Mapping[str, Any], source: str) -> Expectation:
    _only_known(fields, _KEYS, source, "an entry")
    missing = [name for name in _REQUIRED if name not in fields]
    if missing:
        raise ConfigurationError(f"{source} has no {', '.join(missing)}; every entry has {', '.join(_REQUIRED)}")
    values: dict[str, Any] = {
        name: value if name in _CHOICES else _text(name, value, source) for name, value in fields.items()
    }
    if not re.fullmatch(r"[a-z0-9.*?-]+", values["contract"]):
        raise ConfigurationError(
            f"{source}: contract is {values['contract']!r}; give an id, in which * and ? may stand for any characters "
            f"and for one. `pytest --vllm-contracts` lists them"
        )
    _choose("outcome", values["outcome"], OUTCOMES, source)
    from pytest_roll_vllm.pages.text import link

    if not link(values["link"]):
        raise ConfigurationError(
            f"{source}: link is {values['link']!r}; give an address, https://..., or owner/repository#number"
        )
    if "versions" in values:
        try:
            versions.satisfies("0", values["versions"])
        except ConfigurationError as error:
            raise ConfigurationError(f"{source}: versions: {error}") from error
    if "engine" in values:
        values["engines"] = (_choose("engine", values.pop("engine"), _ENGINES, source),)
    for name, choices in _CHOICES.items():
        if name in values:
            values[name] = tuple(_names(name, values[name], choices, source))
    return Expectation(source=source, **values)


def _only_known(fields: Mapping[str, Any], known: tuple[str, ...], where: str, what: str) -> None:
    for name in fields:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"{what} may have {', '.join(known)}"
            raise ConfigurationError(f"{where}: unknown key {name!r}; {hint}")


def _text(name: str, value: Any, source: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{source}: {name} is {value!r}; give a text that is not empty, in quotes")
    return " ".join(value.split())


def _names(name: str, value: Any, choices: tuple[str, ...], source: str) -> Iterator[str]:
    if not isinstance(value, list) or not value:
        raise ConfigurationError(f"{source}: {name} is {value!r}; give a list of texts, or leave it out for all")
    for one in value:
        text = _text(name, one, source)
        yield _choose(name, text, choices, source) if choices else text


def _choose(name: str, value: str, choices: tuple[str, ...], source: str) -> str:
    if value not in choices:
        raise ConfigurationError(f"{source}: {name} is {value!r}; choose from {', '.join(choices)}")
    return value


def _fits(text: str, pattern: str) -> bool:
    return fnmatchcase(text, pattern.replace("[", "[[]"))  # brackets are those of parameters
