"""The patches that there are: bounded, reviewed for every tested release, documented."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest

from roll_vllm import versions
from roll_vllm.patches import drift
from roll_vllm.patches.apply import selected
from roll_vllm.patches.patch import Patch
from roll_vllm.patches.registry import PATCHES

ROOT = Path(__file__).parents[2]
RELEASES = [row.release for row in versions.TESTED]

every = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.name}{patch.versions}")


@pytest.mark.parametrize("release", [*RELEASES, "0.8.5", "0.9.0", "0.10.0", "0.11.2", "0.13.0", "1.0"])
def test_no_two_patches_meet(release: str) -> None:
    selected(PATCHES, release)


@every
def test_every_range_ends_before_what_is_not_known(patch: Patch) -> None:
    assert not versions.satisfies("0.13.0", patch.versions)
    assert not versions.satisfies("99", patch.versions)


@every
def test_every_patch_is_for_a_tested_release_and_was_reviewed_for_all_of_them(patch: Patch) -> None:
    releases = [release for release in RELEASES if versions.satisfies(release, patch.versions)]
    assert releases
    assert [release for release in releases if not drift.known(patch, release, drift.recorded())] == []


def test_nothing_is_recorded_that_no_patch_needs() -> None:
    needed = {
        (target, release) for release in RELEASES for p in selected(PATCHES, release) for target in drift.targets(p)
    }
    assert {(target, release) for target, rows in drift.recorded().items() for release in rows} == needed


@every
def test_every_patch_says_what_it_is(patch: Patch) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", patch.name)
    assert patch.why.endswith(".")
    assert patch.upstream.startswith(("https://github.com/vllm-project/vllm/", "vllm/"))
    assert patch.remove_when
    assert patch.replacement.__doc__ or patch.replacement.__qualname__.endswith("replacement")


@every
def test_declaring_and_replacing_imports_nothing(patch: Patch) -> None:
    """Until it is called, a replacement needs neither vLLM nor torch."""

    def original(self: object) -> None:
        """What it replaces."""

    replaced = patch.replacement(original)
    assert (replaced.__name__, replaced.__wrapped__) == ("original", original)


def test_every_file_of_the_folder_is_registered() -> None:
    folder = ROOT / "roll_vllm/patches"
    declaring = {
        path.stem
        for path in folder.glob("*.py")
        if any(
            isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "PATCHES" for target in node.targets)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
        )
    }
    assert {patch.replacement.__module__.rpartition(".")[2] for patch in PATCHES} == declaring


def test_the_page_names_every_patch_and_no_other() -> None:
    page = (ROOT / "docs/patches.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", page, flags=re.MULTILINE)
    assert sorted(rows) == sorted({patch.name for patch in PATCHES})


def test_names_are_unique_up_to_moves() -> None:
    for one, other in itertools.combinations(PATCHES, 2):
        if one.name == other.name:
            both = [
                r for r in RELEASES if versions.satisfies(r, one.versions) and versions.satisfies(r, other.versions)
            ]
            assert both == [], one.name
