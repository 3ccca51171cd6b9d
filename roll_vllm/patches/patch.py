"""What a patch is, and every way in which one can be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from roll_vllm.errors import ConfigurationError, RollVllmError


@dataclass(frozen=True)
class Patch:
    """One changed method of vLLM, declared.

    Attributes:
        name: Unique among the patches of one release.
        target: ``package.module:Class.method``, where the class is defined. Methods only: they are looked up at
            every call, whereas a function may have been imported elsewhere under a name that no patch reaches.
        versions: The releases concerned, as a PEP 440 specifier with an upper bound: what comes later is not known.
        replacement: Gets the original and returns what takes its place. Imports vLLM and torch only when called.
        why: One sentence: what goes wrong without it.
        upstream: The issue, pull request or source that shows it.
        remove_when: What makes it superfluous.
        relies_on: Other methods or functions that the replacement calls or copies; their drift counts as well.
    """

    name: str
    target: str
    versions: str
    replacement: Callable[[Any], Any]
    why: str
    upstream: str
    remove_when: str
    relies_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        module, _, qualname = self.target.partition(":")
        if not module or "." not in qualname:
            raise ConfigurationError(
                f"patch {self.name!r} has the target {self.target!r}; name a method as 'package.module:Class.method', "
                "because functions are out of reach where they were imported by name"
            )
        if not any(part.strip().startswith(("<", "==")) for part in self.versions.split(",")):
            raise ConfigurationError(
                f"patch {self.name!r} is for {self.versions!r}, which has no end; add an upper bound such as '<0.13'"
            )

    @property
    def module(self) -> str:
        """The module that holds the target."""
        return self.target.partition(":")[0]

    @property
    def qualname(self) -> str:
        """The target's name inside its module."""
        return self.target.partition(":")[2]


class PatchError(RollVllmError, RuntimeError):
    """A patch cannot be applied or undone; nothing is left half done.

    Attributes:
        patch: The patch's name.
        target: What it was to change.
        wanted: What should be there.
        found: What is there.
    """

    problem: ClassVar[str] = "cannot be applied"
    remedy: ClassVar[str] = "run 'roll-vllm patches --verify'"

    def __init__(self, patch: str, target: str, wanted: str, found: str) -> None:
        super().__init__(patch, target, wanted, found)
        self.patch, self.target, self.wanted, self.found = patch, target, wanted, found

    def __str__(self) -> str:
        difference = f"wanted {self.wanted}, found {self.found}"
        return f"patch {self.patch!r} {self.problem}: {self.target}: {difference}; {self.remedy}"


class MissingTargetError(PatchError):
    """The target does not exist."""

    problem = "has no target"
    remedy = "install a tested vLLM release, or give the patch an entry for where the target has moved to"


class DriftError(PatchError):
    """The target is not the code that the replacement was written against."""

    problem = "does not fit the installed code"
    remedy = (
        "install an unmodified, tested vLLM release, or review the replacement and run 'roll-vllm patches --record'"
    )


class OverlapError(PatchError):
    """Two patches want the same attribute, or share a name, on one release."""

    problem = "overlaps another one"
    remedy = "give the two disjoint version ranges"


class ForeignChangeError(PatchError):
    """Somebody else has changed the attribute."""

    problem = "meets somebody else's change"
    remedy = "remove the other patch, or apply it after the rollout engine's and undo it before"
