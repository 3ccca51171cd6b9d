"""``roll-vllm patches``: what would be patched, where, why, and whether it still fits."""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roll_vllm import versions
from roll_vllm.errors import ConfigurationError
from roll_vllm.patches import drift, released, sources
from roll_vllm.patches.apply import selected
from roll_vllm.patches.patch import Patch, PatchError
from roll_vllm.patches.registry import PATCHES
from roll_vllm.patches.sources import NotFound, SourceTree


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "patches",
        help="list the patches of vLLM, and check them",
        description="Without options: the patches for the installed vLLM.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="every patch by every tested release")
    what.add_argument(
        "--verify", action="store_true", help="check every target in the released sources of every tested release"
    )
    what.add_argument(
        "--record", action="store_true", help="write the fingerprints of the released sources, after a review"
    )
    parser.add_argument(
        "--sources", type=Path, metavar="DIR", help="unpacked source distributions (DIR/vllm-0.12.0/vllm) to read"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help=f"where downloads are kept (default: {released.default_cache()})"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if options.all:
        print(matrix(PATCHES))
        return 0
    if options.verify or options.record:
        start = time.monotonic()
        trees = released.trees([row.release for row in versions.TESTED], sources=options.sources, cache=options.cache)
        ready = time.monotonic()
        if options.record:
            drift.FILE.write_text(dump(fingerprints(PATCHES, trees)), encoding="utf-8")
            print(f"wrote {drift.FILE}")
            return 0
        checked, problems = verify(PATCHES, trees, drift.recorded())
        for problem in problems:
            print(f"MISMATCH {problem}")
        print(
            f"{checked} targets in {len(trees)} releases checked, {len(problems)} mismatches "
            f"({time.monotonic() - ready:.1f} s; sources ready after {ready - start:.1f} s)"
        )
        return 1 if problems else 0
    return listing(PATCHES, versions.installed())


def listing(patches: Sequence[Patch], installed: versions.Installed | None) -> int:
    """Print the patches for the installed vLLM; status 1 if one of them does not fit."""
    if installed is None:
        raise ConfigurationError("vLLM is not installed here; install a tested version, or use --all")
    print(f"{installed.distribution} {installed.version}")
    chosen = selected(patches, installed.version)
    status = 0
    for patch in chosen:
        state, fits = _state(patch, installed.version)
        status = status or (0 if fits else 1)
        print(f"\n{patch.name}: {state}")
        for label, text in (
            ("target", patch.target),
            ("versions", patch.versions),
            ("why", patch.why),
            ("upstream", patch.upstream),
            ("remove when", patch.remove_when),
        ):
            print(textwrap.fill(f"{label:<12} {text}", 110, initial_indent="  ", subsequent_indent=" " * 15))
    others = sorted({patch.name for patch in patches} - {patch.name for patch in chosen})
    print(f"\nnot applicable: {', '.join(others) or 'none'}")
    return status


def _state(patch: Patch, version: str) -> tuple[str, bool]:
    row = versions.resolve(version)
    if row is None or not drift.known(patch, row.release, drift.recorded()):
        return "not applied, because this release was not reviewed", True
    try:
        drift.check(patch, row.release, sources.installed(patch.module.partition(".")[0]), drift.recorded())
    except (PatchError, NotFound) as error:
        return f"does not fit: {error}", False
    return "fits, applied in the processes of a rollout engine", True


def matrix(patches: Sequence[Patch]) -> str:
    """Patches by tested releases; ``?`` stands for a release that was not reviewed."""
    releases = [row.release for row in versions.TESTED]
    names = list(dict.fromkeys(patch.name for patch in patches))
    width = max(map(len, names), default=0)
    lines = [" " * width + "".join(f"  {release:>7}" for release in releases)]
    for name in names:
        cells = []
        for release in releases:
            here = [patch for patch in selected(patches, release) if patch.name == name]
            reviewed = all(drift.known(patch, release, drift.recorded()) for patch in here)
            cells.append(("yes" if reviewed else "?") if here else "-")
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>7}" for cell in cells))
    return "\n".join(lines)


def verify(
    patches: Sequence[Patch], trees: dict[str, SourceTree], recorded: drift.Fingerprints
) -> tuple[int, list[str]]:
    """Check every patch in every release that it is for; returns the number of targets, and the mismatches."""
    checked, problems = 0, []
    for release, tree in trees.items():
        for patch in selected(patches, release):
            checked += len(list(drift.targets(patch)))
            if not drift.known(patch, release, recorded):
                problems.append(
                    f"{release}: patch {patch.name!r} covers this release, but has no fingerprint for it; review the "
                    "replacement and run 'roll-vllm patches --record'"
                )
                continue
            try:
                drift.check(patch, release, tree, recorded)
            except PatchError as error:
                problems.append(f"{release}: {error}")
    return checked, problems


def fingerprints(patches: Sequence[Patch], trees: dict[str, SourceTree]) -> dict[str, dict[str, dict[str, Any]]]:
    """What the targets look like in the trees.

    Raises:
        ConfigurationError: A target is not there.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for release, tree in trees.items():
        for patch in selected(patches, release):
            for target in drift.targets(patch):
                try:
                    place = tree.find(target)
                except NotFound as error:
                    raise ConfigurationError(
                        f"patch {patch.name!r} covers {release}, where {target} is not found ({error}); "
                        "narrow its versions"
                    ) from error
                found.setdefault(target, {})[release] = {
                    "parameters": list(place.parameters),
                    "fingerprint": place.fingerprint,
                }
    return found


def dump(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """As JSON, one line for a target and release."""
    targets = []
    for target in sorted(found):
        rows = ",\n".join(f"    {json.dumps(release)}: {json.dumps(row)}" for release, row in found[target].items())
        targets.append(f"  {json.dumps(target)}: {{\n{rows}\n  }}")
    return "{\n" + ",\n".join(targets) + "\n}\n"
