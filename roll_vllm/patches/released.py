"""The sources of released versions of vLLM, from the package index. Needs neither vLLM nor torch."""

from __future__ import annotations

import hashlib
import html.parser
import json
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from roll_vllm.errors import ConfigurationError
from roll_vllm.patches.sources import SourceTree

_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
_PYPI = "https://pypi.org/simple"
_TYPES = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
_TIMEOUT_S = 120


def default_cache() -> Path:
    """Where downloaded sources are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "roll-vllm" / "sources"


def trees(releases: Iterable[str], *, sources: Path | None = None, cache: Path | None = None) -> dict[str, SourceTree]:
    """The source trees of releases.

    Args:
        releases: which ones.
        sources: a directory with unpacked source distributions (``vllm-0.12.0/vllm/...``); nothing is downloaded.
        cache: where downloads are kept, :func:`default_cache` by default.

    Raises:
        ConfigurationError: one is not there, or cannot be downloaded.
    """
    releases = list(releases)
    if sources is not None:
        missing = [release for release in releases if not (sources / f"vllm-{release}" / "vllm").is_dir()]
        if missing:
            raise ConfigurationError(
                f"{sources} has no directory vllm-{missing[0]}/vllm; unpack vllm-{missing[0]}.tar.gz there"
            )
        return {release: SourceTree(sources / f"vllm-{release}") for release in releases}
    where = cache or default_cache()
    with ThreadPoolExecutor(len(releases) or 1) as pool:
        return dict(
            zip(releases, pool.map(lambda release: SourceTree(_fetched(release, where)), releases), strict=True)
        )


def _fetched(release: str, cache: Path) -> Path:
    final = cache / f"vllm-{release}"
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    try:
        url, digest = _find(f"vllm-{release}.tar.gz")
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
            archive = Path(scratch) / "archive"
            _download(url, digest, archive)
            _unpack(archive, f"vllm-{release}", Path(scratch) / "tree")
            try:
                os.rename(Path(scratch) / "tree", final)
            except OSError:
                if not final.is_dir():  # somebody else was faster otherwise
                    raise
    except (OSError, tarfile.TarError) as error:
        raise ConfigurationError(
            f"the sources of vLLM {release} cannot be had from {_index()} ({error}); set {_INDEX_VARIABLES[-1]}, or "
            "unpack them yourself and give --sources"
        ) from error
    return final


def _index() -> str:
    return next((os.environ[name] for name in _INDEX_VARIABLES if os.environ.get(name)), _PYPI).rstrip("/")


def _find(filename: str) -> tuple[str, str]:
    """URL and SHA-256 of a file of the project vllm, by the simple API (PEP 503 and 691)."""
    page = f"{_index()}/vllm/"
    with urllib.request.urlopen(urllib.request.Request(page, headers={"Accept": _TYPES}), timeout=_TIMEOUT_S) as answer:
        base, content = answer.url or page, answer.read().decode()
        is_json = "json" in (answer.headers.get_content_type() or "")
    if is_json:
        links = {
            file["filename"]: (file["url"], file["hashes"].get("sha256", "")) for file in json.loads(content)["files"]
        }
    else:
        links = _Links.of(content)
    if filename not in links:
        raise OSError(f"{page} has no {filename}")
    url, digest = links[filename]
    if not digest:
        raise OSError(f"{page} gives no SHA-256 of {filename}")
    return urllib.parse.urljoin(base, url), digest


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[str, str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href") if tag == "a" else None
        if target:
            url, fragment = urllib.parse.urldefrag(target)
            name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
            self.found[name] = url, fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""

    @classmethod
    def of(cls, page: str) -> dict[str, tuple[str, str]]:
        parser = cls()
        parser.feed(page)
        return parser.found


def _download(url: str, digest: str, path: Path) -> None:
    sha256 = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, path.open("wb") as file:
        while chunk := answer.read(1 << 20):
            sha256.update(chunk)
            file.write(chunk)
    if sha256.hexdigest() != digest:
        raise OSError(f"{url} has the SHA-256 {sha256.hexdigest()}, the index says {digest}")


def _unpack(archive: Path, top: str, root: Path) -> None:
    """The package's Python files only, and nothing outside of ``root``."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if not member.isfile() or not member.name.startswith(f"{top}/vllm/") or not member.name.endswith(".py"):
                continue
            parts = member.name.split("/")[1:]
            source = tar.extractfile(member)
            if ".." in parts or source is None:
                continue
            path = root.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
    if not (root / "vllm").is_dir():
        raise OSError(f"the archive has no {top}/vllm")
