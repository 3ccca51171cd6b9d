"""The face that all backends have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from roll_vllm import versions
from roll_vllm.errors import ConfigurationError

Kind = Literal["cuda", "rocm", "npu", "cpu"]

VERIFIED = "verified on hardware"


class Backend(ABC):
    """What the runtime must know of a backend.

    Attributes:
        name: How options, headers and reports name it.
        kind: The kind of its devices.
        torch_device: What torch calls them.
        ray_resource: The resource by which Ray counts them.
        communication: The backend of torch's process groups between them.
        visibility: The variables that hide devices. Each group filters what the one before it left; within a
            group the first variable that is set counts.
        evidence: What the statements here rest on where the suite was never run on such hardware.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    torch_device: ClassVar[str]
    ray_resource: ClassVar[str]
    communication: ClassVar[str]
    visibility: ClassVar[tuple[tuple[str, ...], ...]] = ()
    evidence: ClassVar[str] = "not verified"

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

    # -- engines --------------------------------------------------------------------------------------------

    def engines(self, vllm_version: str) -> tuple[str, ...]:
        """Return the engine generations that a release has on this backend: ``V0``, ``V1`` or both.

        Raises:
            ConfigurationError: If ``vllm_version`` is malformed.
        """
        row = versions.resolve(vllm_version)
        if row:
            return row.engines
        return ("V0", "V1") if versions.satisfies(vllm_version, "<0.11") else ("V1",)

    def default_engine(self, vllm_version: str) -> str:
        """Return the generation to start when the user did not ask for one.

        Raises:
            ConfigurationError: If ``vllm_version`` is malformed.
        """
        return self.engines(vllm_version)[-1]

    def worker_class(self, vllm_version: str, engine: str = "V1") -> str:
        """Return module and name of the worker class that vLLM runs, for ``pkgutil.resolve_name``.

        Raises:
            ConfigurationError: If the release has no such engine here, or ``vllm_version`` is malformed.
        """
        if engine not in self.engines(vllm_version):
            raise ConfigurationError(self.no_engine(vllm_version, engine))
        return self._worker_class(vllm_version, engine)

    @abstractmethod
    def _worker_class(self, vllm_version: str, engine: str) -> str:
        """The worker class of a release that has the engine."""

    def no_engine(self, vllm_version: str, engine: str) -> str:
        """Say that a release has no such engine here, and which ones have."""
        having = [row.release for row in versions.TESTED if engine in self.engines(row.release)]
        where = "" if all(engine not in row.engines for row in _row(vllm_version)) else f" on {self.name}"
        remedy = f", or use a release that has one: {', '.join(having)}" if having else ""
        return f"vLLM {vllm_version} has no {engine} engine{where}; unset VLLM_USE_V1{remedy}"

    # -- processes ------------------------------------------------------------------------------------------

    def worker_environment(self, vllm_version: str, environ: Mapping[str, str], ranks: int = 1) -> dict[str, str]:
        """Compute the variables that a worker needs because of its backend.

        :func:`roll_vllm.environment.worker_environment` adds those that every worker needs.

        Args:
            vllm_version: The version of vLLM the worker runs.
            environ: The variables it would have otherwise; not changed.
            ranks: How many workers the engine has on this machine, data-parallel ones included.

        Raises:
            ConfigurationError: If ``vllm_version`` is malformed, or the visible devices are named as vLLM cannot
                be told them.
        """
        return {}

    def show_only(self, devices: Sequence[str]) -> dict[str, str]:
        """Return the variables that limit a process to some devices, named by index or UUID."""
        return dict.fromkeys(self.visibility[-1], ",".join(devices)) if self.visibility else {}

    @property
    def ray_keeps_visibility(self) -> str:
        """The variable that keeps Ray from setting the visible devices of its workers; empty if it does not."""
        return f"RAY_EXPERIMENTAL_NOSET_{self.visibility[-1][0]}" if self.visibility else ""

    # -- memory ---------------------------------------------------------------------------------------------

    @abstractmethod
    def enable_sleep_mode(self, vllm_version: str, engine: str = "V1") -> bool:
        """Whether engines sleep by vLLM's own memory pool, its argument ``enable_sleep_mode``.

        Where they do not, the runtime resizes the storages of the tensors.

        Raises:
            ConfigurationError: If ``vllm_version`` is malformed.
        """

    @abstractmethod
    def release_allocator(self, environ: Mapping[str, str]) -> None:
        """Turn expandable segments off in this process, where the variables would come too late.

        Args:
            environ: Where the user's other allocator options are; they are kept.
        """

    # -- trust ----------------------------------------------------------------------------------------------

    def verified(self, vllm_version: str) -> str:
        """Say what is known of a release on this backend: :data:`VERIFIED` only where the suite passed on one.

        Raises:
            ConfigurationError: If ``vllm_version`` is malformed.
        """
        return VERIFIED if any(self.name in row.verified for row in _row(vllm_version)) else self.evidence


def _row(vllm_version: str) -> list[versions.VersionRow]:
    """The row of a version, if it is a tested one."""
    row = versions.resolve(vllm_version)
    return [row] if row else []
