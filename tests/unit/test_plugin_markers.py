"""Markers and contracts: what is selected, skipped as not applicable, refused, and in what order it runs."""

from __future__ import annotations

import pytest
from plugin_harness import Inner

from roll_vllm.versions import TESTED

VERSIONED = """
    import pytest
    from pytest_roll_vllm.contracts import contract

    @pytest.mark.vllm_version(">=0.12")
    def test_new(): pass

    @pytest.mark.vllm_version("<0.12")
    def test_old(): pass

    @contract("some-id", "It does something.", versions=">=0.11,<0.13")
    class TestContract:
        def test_all(self): pass

        @pytest.mark.vllm_version(">=0.11.1")
        def test_later(self): pass

    def test_fixture(vllm_settings): pass

    def test_other(): pass
"""


@pytest.mark.parametrize(
    ("marker", "expected"),
    [
        ("vllm_0_12_0", {"test_new", "test_all", "test_later", "test_fixture"}),
        ("vllm_0_11_0", {"test_old", "test_all", "test_fixture"}),
        ("vllm_0_8_4", {"test_old", "test_fixture"}),
    ],
)
def test_selection_by_version(installed: Inner, marker: str, expected: set[str]) -> None:
    result = installed.run("--collect-only", "-q", "-m", marker, source=VERSIONED)
    assert {line.rpartition("::")[2] for line in result.outlines if "::" in line} == expected


def test_all_markers_are_registered(installed: Inner) -> None:
    lines = installed.run("--markers").outlines
    for name in ("vllm_version(", "vllm_backend(", "vllm_contract(", "vllm_engine_key("):
        assert any(line.startswith(f"@pytest.mark.{name}") for line in lines)
    for row in TESTED:
        assert any(line.startswith(f"@pytest.mark.{row.marker}:") for line in lines)


@pytest.mark.parametrize(
    ("marker", "reason"),
    [
        ('vllm_version(">=0.13")', "needs vLLM >=0.13, found 0.12.0.post2"),
        ('vllm_backend("cuda", count=2)', "needs 2 cuda, found 1 cpu (*)"),
        ('vllm_backend("cpu", count=2)', "needs 2 cpu, found 1 cpu (*)"),
        ('vllm_backend("cuda", reference=False)', "needs 1 cuda, found 1 cpu (*)"),
        (
            'vllm_backend("cpu")\n@pytest.mark.vllm_backend("cpu", count=2)',
            "needs 2 cpu, found 1 cpu (*)",
        ),
        ('vllm_contract("an-id", "A sentence.", versions="<0.12")', "needs vLLM <0.12, found 0.12.0.post2"),
        (
            'vllm_contract("an-id", "A sentence.", backends=["npu", "rocm"])',
            "needs npu or rocm, found 1 cpu (*)",
        ),
    ],
)
def test_not_applicable(installed: Inner, marker: str, reason: str) -> None:
    result = installed.run("-rs", source=f"import pytest\n@pytest.mark.{marker}\ndef test(): assert False")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines([f"*not applicable: {reason}*"])
    assert result.ret == 0


@pytest.mark.parametrize(("backend", "passed"), [("cpu", 1), ("cpu-reference", 0)])
def test_not_on_the_reference_platform(inner: Inner, backend: str, passed: int) -> None:
    inner.install("0.10.2")
    source = "import pytest\n@pytest.mark.vllm_backend('cpu', reference=False)\ndef test(): pass"
    result = inner.run("-rs", f"--vllm-backend={backend}", source=source)
    result.assert_outcomes(passed=passed, skipped=1 - passed)
    if not passed:
        result.stdout.fnmatch_lines(["*not applicable: needs more than the reference platform, found 1 cpu (*)*"])


@pytest.mark.parametrize(
    "markers",
    [
        '@pytest.mark.vllm_version(">=0.12")',
        '@pytest.mark.vllm_backend("cuda", count=8)\n@pytest.mark.vllm_backend("cpu")',
    ],
)
def test_applicable(installed: Inner, markers: str) -> None:
    result = installed.run(source=f"import pytest\n{markers}\ndef test(): pass")
    result.assert_outcomes(passed=1)


def test_without_vllm_nobody_can_tell(inner: Inner) -> None:
    """Not "not applicable": a contract is not out of scope because somebody forgot to install vLLM."""
    inner.no_vllm()
    result = inner.run(
        "-rs",
        source="""
        from pytest_roll_vllm.contracts import contract
        @contract("an-id", "A sentence.", versions=">=0.12")
        def test(): pass
        """,
    )
    result.stdout.fnmatch_lines(["COULD NOT RUN an-id: *none is installed: `pip install vllm`"])


@pytest.mark.parametrize(
    ("marker", "error"),
    [
        ("vllm_version", "missing 1 required positional argument: 'specifier'"),
        ('vllm_version("0.12")', "'0.12' is not a version specifier"),
        ("vllm_version(0.12)", "*"),
        ('vllm_backend("gpu")', "unknown backend 'gpu'; choose from cpu, cuda, rocm, npu"),
        ('vllm_backend("cuda", 2)', "takes 1 positional argument but 2 were given"),
        ('vllm_backend("cuda", count=0)', "count is 0, and must be a whole number above 0"),
        ('vllm_contract("an-id")', "missing 1 required positional argument: 'sentence'"),
        ('vllm_contract("An Id", "A sentence.")', "the id 'An Id' must be lower-case words joined by '-'"),
        ('vllm_contract("an-id", " ")', "the sentence is empty"),
        ('vllm_contract("an-id", "A sentence.", versions="new")', "'new' is not a version specifier"),
        ('vllm_contract("an-id", "A sentence.", backends=())', "unknown backend (none)"),
        ('vllm_contract("an-id", "A sentence.", engine=1)', "unexpected keyword argument 'engine'"),
        ("vllm_engine_key()", "missing 1 required positional argument: 'key'"),
    ],
)
def test_wrong_calls(installed: Inner, marker: str, error: str) -> None:
    result = installed.run(source=f"import pytest\n@pytest.mark.{marker}\ndef test_it(): pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    usage = marker.partition("(")[0]
    result.stderr.fnmatch_lines([f"*::test_it: wrong use of a marker: *{error}*. The marker is {usage}(*"])


def test_a_wrong_call_is_seen_under_xdist(installed: Inner) -> None:
    result = installed.run("-pxdist", "-n1", source="import pytest\n@pytest.mark.vllm_version\ndef test_it(): pass")
    result.stdout.fnmatch_lines(["*::test_it: wrong use of a marker: *"])
    result.assert_outcomes(errors=1)


def test_one_id_with_two_sentences(installed: Inner) -> None:
    result = installed.run(
        source="""
        from pytest_roll_vllm.contracts import contract
        @contract("an-id", "A sentence.")
        def test_one(): pass
        @contract("an-id", "Another one.")
        def test_two(): pass
        """
    )
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*'an-id' is declared in two ways, in *::test_one: *test_two: *Give both*"])


def test_several_tests_of_one_contract(installed: Inner) -> None:
    report = installed.report(
        source="""
        from pytest_roll_vllm.contracts import contract
        shared = contract("shared", "A sentence.")

        @shared
        def test_one(): pass

        @shared
        class TestMore:
            def test_two(self): pass

            @contract("own", "The closest contract counts.")
            def test_three(self): pass
        """
    )
    tests = {
        id: [test["nodeid"].rpartition("::")[2] for test in one["tests"]] for id, one in report["contracts"].items()
    }
    assert tests == {"own": ["test_three"], "shared": ["test_two", "test_one"]}


@pytest.mark.parametrize(("expression", "passed"), [("wu", 2), ("wu-two", 1), ("wu and not wu-two", 1), ("sl", 0)])
def test_selection_by_contract(installed: Inner, expression: str, passed: int) -> None:
    result = installed.run(
        "-k",
        expression,
        source="""
        from pytest_roll_vllm.contracts import contract

        @contract("wu-one", "A sentence.")
        def test_first(): pass

        @contract("wu-two", "A sentence.")
        def test_second(): pass

        def test_third(): pass
        """,
    )
    result.assert_outcomes(passed=passed, deselected=3 - passed)


ENGINES = """
    import pytest

    # Stands for the fixture of the plugin, on which the key does not depend.
    @pytest.fixture
    def vllm_engine(vllm_settings, vllm_model): pass

    @pytest.fixture
    def vllm_model(request): return request.param

    @pytest.mark.parametrize("vllm_model", ["x", "y"], indirect=True)
    def test_a(vllm_engine): pass

    def test_b(): pass

    @pytest.mark.vllm_engine_key("z")
    def test_c(): pass

    @pytest.mark.parametrize("vllm_model", ["y", "x"], indirect=True)
    def test_d(vllm_engine): pass

    @pytest.mark.vllm_engine_key("z")
    def test_e(): pass
"""


def test_tests_that_share_an_engine_run_together(installed: Inner) -> None:
    result = installed.run("--collect-only", "-q", source=ENGINES)
    order = [line.rpartition("::")[2] for line in result.outlines if "::" in line]
    assert order == ["test_a[x]", "test_d[x]", "test_a[y]", "test_d[y]", "test_b", "test_c", "test_e"]


def test_tests_with_other_engine_arguments_run_together(installed: Inner) -> None:
    installed.pytester.makepyfile(
        test_1="""
            import pytest

            def test_a(vllm_engine): pass

            class TestChanged:
                @pytest.fixture
                def vllm_engine_args(self, vllm_engine_args): return vllm_engine_args

                def test_b(self, vllm_engine): pass
                def test_c(self, vllm_engine): pass
        """,
        test_2="def test_d(vllm_engine): pass",
    )
    result = installed.run("--collect-only", "-q")
    order = [line.rpartition("::")[2] for line in result.outlines if "::" in line]
    assert order == ["test_a", "test_d", "test_b", "test_c"]


def test_other_projects_keep_their_order_and_markers(installed: Inner) -> None:
    """A project may have a fixture ``vllm_engine`` of its own."""
    result = installed.run(
        "-m",
        "not vllm_0_12_0",
        "--collect-only",
        "-q",
        source="""
        import pytest
        @pytest.fixture(params=["x", "y"])
        def vllm_model(request): return request.param
        def test_a(vllm_model): pass
        def test_b(vllm_model): pass
        """,
    )
    order = [line.rpartition("::")[2] for line in result.outlines if "::" in line]
    assert order == ["test_a[x]", "test_a[y]", "test_b[x]", "test_b[y]"]
