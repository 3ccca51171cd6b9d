"""The released sources that the backends' rows are compared with. Downloaded once, kept in the user's cache.

No ROCm or Ascend hardware was at hand: here the code of the releases is read, and where it can run without its
device, run on simulated environments.
"""

from __future__ import annotations

import pytest
from source_reader import Source, download_ascend

from roll_vllm import versions
from roll_vllm.patches import released

ASCEND = [row for row in versions.TESTED if row.ascend]


@pytest.fixture(scope="session")
def vllm_sources() -> dict[str, Source]:
    """The sources of vLLM by release."""
    trees = released.trees(row.release for row in versions.TESTED)
    return {release: Source(tree.root) for release, tree in trees.items()}


@pytest.fixture(params=[row.release for row in versions.TESTED])
def release(request: pytest.FixtureRequest) -> str:
    """Each tested release."""
    return request.param


@pytest.fixture
def vllm(vllm_sources: dict[str, Source], release: str) -> Source:
    """The sources of vLLM of one release."""
    return vllm_sources[release]


@pytest.fixture(params=ASCEND, ids=lambda row: row.release)
def row(request: pytest.FixtureRequest) -> versions.VersionRow:
    """Each tested release for which there is one of vllm-ascend."""
    return request.param


@pytest.fixture
def ascend(row: versions.VersionRow) -> Source:
    """The sources of vllm-ascend of one release."""
    assert row.ascend
    return Source(download_ascend(row.ascend, released.default_cache()))
