"""``async def`` tests run, whether or not another plugin runs them."""

from __future__ import annotations

import pytest
from plugin_harness import Inner

OURS = """
    import asyncio
    import pytest
    from pytest_roll_vllm.contracts import contract

    @contract("a-pass", "It passes.")
    async def test_contract():
        await asyncio.sleep(0)

    async def test_fixture(vllm_settings, tmp_path):
        await asyncio.sleep(0)
        assert tmp_path.is_dir()

    class TestClass:
        @contract("a-fail", "It fails.")
        async def test_method(self):
            await asyncio.sleep(0)
            assert False
"""


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="alone"),
        pytest.param(["-ppytest_asyncio.plugin", "--asyncio-mode=strict"], id="asyncio-strict"),
        pytest.param(["-ppytest_asyncio.plugin", "--asyncio-mode=auto"], id="asyncio-auto"),
        pytest.param(["-panyio.pytest_plugin"], id="anyio"),
    ],
)
@pytest.mark.filterwarnings("ignore:The configuration option")
def test_tests_of_ours_run(installed: Inner, arguments: list[str]) -> None:
    for argument in arguments:
        if argument.startswith("-p"):
            pytest.importorskip(argument[2:].partition(".")[0])
    installed.run(*arguments, source=OURS).assert_outcomes(passed=2, failed=1)


def test_the_marks_of_others_win(installed: Inner) -> None:
    pytest.importorskip("anyio")
    result = installed.run(
        "-panyio.pytest_plugin",
        source="""
        import pytest
        @pytest.mark.anyio
        async def test_marked(vllm_settings, anyio_backend_name):
            import inspect
            assert any("anyio" in frame.filename for frame in inspect.stack())
        """,
    )
    assert result.parseoutcomes().get("passed")


def test_tests_of_other_projects_are_left_alone(installed: Inner) -> None:
    result = installed.run(source="async def test_other(): pass")
    result.stdout.fnmatch_lines(["*async def functions are not natively supported*"])
    result.assert_outcomes(failed=1)
