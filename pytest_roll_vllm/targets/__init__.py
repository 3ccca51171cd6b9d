"""What is tested: any vLLM integration that can be asked the questions of :class:`Target`.

``--vllm-target`` names one, from the entry-point group ``pytest_roll_vllm.targets`` or as ``module:attribute``.
"""

from __future__ import annotations

import enum
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

from roll_vllm import versions as vllm_versions
from roll_vllm.errors import ConfigurationError, UnsupportedFeatureError

if TYPE_CHECKING:
    import torch

GROUP = "pytest_roll_vllm.targets"

#: Everything that a contract may need of a target, beside starting, generating and shutting down.
CAPABILITIES: Mapping[str, str] = {
    "abort": "ends requests, each with one final output",
    "abort.partial": "the output of an aborted request holds the tokens that it had",
    "cache.reset": "empties the prefix cache, and says whether it is empty",
    "checksum": "checksums of every parameter and buffer, by rank",
    "lora": "takes LoRA adapters as tensors",
    "pause": "stops generating and goes on when told",
    "pause.keep": "a pause freezes what runs, and loses nothing",
    "runtime": "all of roll_vllm's own engine: its calls, its errors, its processes",
    "sleep": "gives back the memory of the KV cache (level 1)",
    "sleep.level2": "gives back the memory of the weights, too",
    "sleep.tags": "wakes weights and KV cache one after the other",
    "state": "says what sleeps, and whether its weights are one complete set",
    "update": "takes a complete set of weights as tensors",
    "update.collective": "takes it through a process group of torch.distributed",
    "update.checked": "refuses a set of weights that does not fit or is not complete",
}


class Support(str, enum.Enum):
    """How far a target has a capability."""

    FULL = "full"
    VERSIONED = "versioned"
    """On some vLLM versions, backends or engines."""
    NOT_IMPLEMENTED = "not implemented"
    """It could be done, and the target does not."""
    UNSUPPORTED = "unsupported"
    """It cannot be done there."""
    UNKNOWN = "unknown"
    """Nobody has said: the contracts that need it run, and show it."""


@dataclass(frozen=True)
class Capability:
    """What a target says of one capability.

    Attributes:
        support: how far it has it.
        reason: why not, wherever it does not; required unless it is full or unknown.
        versions: with ``VERSIONED``, the vLLM versions that have it, as a PEP 440 specifier.
        backends: likewise the names of backends; empty for all.
        engines: likewise ``V0`` or ``V1``; empty for both.
    """

    support: Support
    reason: str = ""
    versions: str = ""
    backends: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        narrowed = bool(self.versions or self.backends or self.engines)
        if narrowed != (self.support is Support.VERSIONED):
            raise ValueError("versions, backends or engines are given with VERSIONED, and only with it")
        if not self.reason and self.support not in (Support.FULL, Support.UNKNOWN):
            raise ValueError(f"{self.support.value!r} wants a reason, for those who read why a contract did not run")
        vllm_versions.satisfies("0", self.versions)  # raises if malformed

    def is_here(self, vllm_version: str, backend: str, engine: str) -> bool:
        """Whether contracts that need it should run on that version, backend and engine generation."""
        if self.support is Support.VERSIONED:
            return (
                vllm_versions.satisfies(vllm_version, self.versions)
                and backend in (self.backends or (backend,))
                and engine in (self.engines or (engine,))
            )
        return self.support in (Support.FULL, Support.UNKNOWN)


FULL = Capability(Support.FULL)
UNKNOWN = Capability(Support.UNKNOWN)


class NotSupportedError(UnsupportedFeatureError):
    """A target was asked for what it declares that it does not have."""


class Target(ABC):
    """One engine under test, from its start to its shutdown.

    A subclass implements :meth:`start`, :meth:`generate` and :meth:`shutdown`, and the methods of the capabilities
    that it declares. All of them run on one event loop. What a method cannot do it refuses by raising
    :class:`NotSupportedError`, as those that are not overridden do.

    Attributes:
        name: how reports call it.
        capabilities: what it declares, by the names of :data:`CAPABILITIES`; ``UNKNOWN`` for those left out.
        errored: whether the engine is dead, so that the next test needs another.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Mapping[str, Capability]] = {}
    errored: bool = False

    @abstractmethod
    async def start(self, arguments: Mapping[str, Any]) -> None:
        """Start the engine.

        Args:
            arguments: vLLM's engine arguments from the fixture ``vllm_engine_args``, and ``worker_name``, by which
                engines that start one after the other may find their caches again.
        """

    @abstractmethod
    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        """Answer one request.

        Args:
            prompt: ``{"prompt_token_ids": [...]}``, or text where the model has a tokenizer.
            sampling_params: vLLM's ``SamplingParams``.
            request_id: the caller's name for it.
            lora_request: what :meth:`add_lora` returned, for an answer by that adapter.

        Yields:
            vLLM's ``RequestOutput``, or what has the same attributes.
        """

    @abstractmethod
    async def shutdown(self) -> None:
        """End the engine and all its processes; also after a start that failed."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End requests (``abort``); each caller gets a final output with the finish reason ``abort``."""
        raise self.refusal("abort")

    async def update(self, weights: Mapping[str, torch.Tensor], *, transport: str = "bucket", **options: Any) -> None:
        """Load one complete set of weights (``update``).

        Args:
            weights: tensors on the CPU by their checkpoint names.
            transport: ``bucket``, or ``collective`` for a process group (``update.collective``).
            options: of the target's own.
        """
        raise self.refusal("update" if transport == "bucket" else "update.collective")

    async def sleep(self, level: int = 1) -> None:
        """Give back the memory of the KV cache (``sleep``), with level 2 of the weights too (``sleep.level2``)."""
        raise self.refusal("sleep.level2" if level == 2 else "sleep")

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take memory back: of everything, or of the tags ``weights`` and ``kv_cache`` (``sleep.tags``)."""
        raise self.refusal("sleep" if tags is None else "sleep.tags")

    async def add_lora(self, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Any:
        """Take a LoRA adapter (``lora``).

        Args:
            tensors: by PEFT's names.
            config: PEFT's ``adapter_config``.

        Returns:
            What :meth:`generate` takes as ``lora_request``.
        """
        raise self.refusal("lora")

    async def pause_generation(self, mode: str = "abort") -> None:
        """Stop generating (``pause``): ``abort`` or ``wait`` for what runs, or ``keep`` it (``pause.keep``)."""
        raise self.refusal("pause.keep" if mode == "keep" else "pause")

    async def resume_generation(self) -> None:
        """Go on after a pause."""
        raise self.refusal("pause")

    async def state(self) -> Any:
        """What the engine can do now (``state``): an object with the fields of ``roll_vllm.EngineState``."""
        raise self.refusal("state")

    async def checksums(self) -> list[dict[str, str]]:
        """XXH3 of every tensor by vLLM's name, for each rank (``checksum``); see ``roll_vllm.worker.checksums``."""
        raise self.refusal("checksum")

    async def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache (``cache.reset``). Returns whether it is empty now."""
        raise self.refusal("cache.reset")

    @classmethod
    def capability(cls, name: str) -> Capability:
        """What the target declares of a capability."""
        return cls.capabilities.get(name, UNKNOWN)

    @classmethod
    def refusal(cls, name: str) -> NotSupportedError:
        """The error for a capability that is not there."""
        capability = cls.capability(name)
        what = CAPABILITIES[name]
        if capability.support in (Support.FULL, Support.UNKNOWN):
            return NotSupportedError(
                f"the target {cls.name} declares {name} ({what}) {capability.support.value}, and has no code for it; "
                f"declare it NOT_IMPLEMENTED, or write it"
            )
        return NotSupportedError(f"the target {cls.name} has no {name} ({what}) here: {capability.reason}")


def missing(target: type[Target], name: str, vllm_version: str, backend: str, engine: str) -> str:
    """Why contracts that need a capability do not concern a target on what is installed; empty if they do."""
    capability = target.capability(name)
    if capability.is_here(vllm_version, backend, engine):
        return ""
    return f"needs {name}, which the target {target.name} declares {capability.support.value}: {capability.reason}"


def available() -> dict[str, str]:
    """The installed targets: for each name, where it is."""
    return {entry.name: entry.value for entry in metadata.entry_points(group=GROUP)}


def resolve(name: str) -> type[Target]:
    """Return the target of that name, or at ``module:attribute``.

    Raises:
        ConfigurationError: there is none, it cannot be imported, or what it declares makes no sense.
    """
    where = name if ":" in name else available().get(name, "")
    if not where:
        known = ", ".join(sorted(available())) or "none; is pytest-roll-vllm installed?"
        raise ConfigurationError(
            f"no target named {name!r}; installed are {known}. Give one of these, or module:attribute"
        )
    try:
        target = pkgutil.resolve_name(where)
    except (AttributeError, ImportError, ValueError) as error:
        raise ConfigurationError(f"the target {name!r} cannot be imported from {where}: {error}") from error
    if not (isinstance(target, type) and issubclass(target, Target)):
        raise ConfigurationError(f"the target {name!r} ({where}) is no subclass of pytest_roll_vllm.targets.Target")
    unknown = [one for one in target.capabilities if one not in CAPABILITIES]
    if unknown:
        raise ConfigurationError(
            f"the target {name!r} declares {', '.join(unknown)}; the capabilities are {', '.join(CAPABILITIES)}"
        )
    return target
