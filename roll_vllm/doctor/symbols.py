"""Which versions of a shared library's symbols an ELF file asks for, and which ones a library has.

A wheel that was built with a newer C++ library than the system's fails when it is imported. The tables that say so
are read from the files; nothing is loaded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_DEFINED, _NEEDED = 0x6FFFFFFD, 0x6FFFFFFE  # SHT_GNU_verdef and SHT_GNU_verneed
_WEAK = 2  # VER_FLG_WEAK: may be missing


@dataclass(frozen=True)
class Symbols:
    """The tables of one file.

    Attributes:
        machine: ELF's number of the processor: a library of another one does not count.
        needed: By library, such as ``libstdc++.so.6``, the versions asked of it, such as ``GLIBCXX_3.4.32``.
        provided: The versions that the file has itself.
    """

    machine: int
    needed: dict[str, frozenset[str]]
    provided: frozenset[str]


def read(path: Path) -> Symbols:
    """Read the tables of a 64-bit little-endian ELF file.

    Raises:
        ValueError: It is another kind of file, or damaged.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is not a 64-bit little-endian ELF file")

        def part(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        try:
            (machine,) = struct.unpack_from("<H", header, 18)
            (offset,) = struct.unpack_from("<Q", header, 40)
            entry, count = struct.unpack_from("<HH", header, 58)
            table = part(offset, entry * count)
            # kind, offset, size, number of the section that holds the names
            sections = [struct.unpack_from("<4xI16xQQI", table, entry * index) for index in range(count)]
            needed: dict[str, frozenset[str]] = {}
            provided: set[str] = set()
            for kind, start, size, link in sections:
                if kind in (_DEFINED, _NEEDED):
                    data, names = part(start, size), part(*sections[link][1:3])
                    if kind == _NEEDED:
                        needed.update(_needs(data, names))
                    else:
                        provided.update(_definitions(data, names))
        except (struct.error, IndexError) as error:
            raise ValueError(f"{path} is a damaged ELF file ({error})") from error
    return Symbols(machine, needed, frozenset(provided))


def _needs(data: bytes, names: bytes) -> Iterator[tuple[str, frozenset[str]]]:
    position, more = 0, 1
    while more:
        count, library, first, more = struct.unpack_from("<2xHIII", data, position)
        versions, place = set(), position + first
        for _ in range(count):
            flags, name, following = struct.unpack_from("<4xH2xII", data, place)
            if not flags & _WEAK:
                versions.add(_text(names, name))
            place += following
        yield _text(names, library), frozenset(versions)
        position += more


def _definitions(data: bytes, names: bytes) -> Iterator[str]:
    position, more = 0, 1
    while more:
        first, more = struct.unpack_from("<12xII", data, position)
        (name,) = struct.unpack_from("<I", data, position + first)  # the ones behind it are its ancestors
        yield _text(names, name)
        position += more


def _text(names: bytes, start: int) -> str:
    return names[start : names.index(b"\0", start)].decode("ascii", "replace")
