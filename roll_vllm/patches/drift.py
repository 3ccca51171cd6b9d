"""Comparing targets with what the replacements were written against."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from roll_vllm.patches.patch import DriftError, MissingTargetError, Patch
from roll_vllm.patches.sources import Found, NotFound, SourceTree

FILE = Path(__file__).with_name("fingerprints.json")

#: By target and release: the parameters and the fingerprint.
Fingerprints = Mapping[str, Mapping[str, Mapping[str, Any]]]


@cache
def recorded() -> Fingerprints:
    """The fingerprints of the tested releases, as ``roll-vllm patches --record`` wrote them."""
    fingerprints: Fingerprints = json.loads(FILE.read_text(encoding="utf-8"))
    return fingerprints


def targets(patch: Patch) -> Iterable[str]:
    """Everything a patch depends on, its own target first."""
    return (patch.target, *patch.relies_on)


def known(patch: Patch, release: str, fingerprints: Fingerprints) -> bool:
    """Whether a patch was reviewed for a release."""
    return all(release in fingerprints.get(target, {}) for target in targets(patch))


def check(patch: Patch, release: str, tree: SourceTree, fingerprints: Fingerprints) -> Found:
    """Compare a patch's target, and what else it relies on, with the record of a release.

    Returns:
        Where the patch's own target is.

    Raises:
        MissingTargetError: Something is not there.
        DriftError: Something is not the same.
    """
    first: Found | None = None
    for target in targets(patch):
        wanted = fingerprints[target][release]
        parameters = ", ".join(wanted["parameters"])
        try:
            found = tree.find(target)
        except NotFound as error:
            raise MissingTargetError(patch.name, target, f"({parameters}) as in {release}", str(error)) from None
        if list(found.parameters) != list(wanted["parameters"]):
            raise DriftError(
                patch.name, target, f"the parameters ({parameters})", f"({', '.join(found.parameters)}) in {found.path}"
            )
        if found.fingerprint != wanted["fingerprint"]:
            raise DriftError(
                patch.name,
                target,
                f"the code of {release} (fingerprint {wanted['fingerprint']})",
                f"{found.fingerprint} at {found.path}:{found.line}",
            )
        first = first or found
    assert first is not None
    return first
