"""Expectations files: what is wrong in them is said with its place, and what is expected must come true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plugin_harness import Inner

from pytest_roll_vllm import expected
from pytest_roll_vllm.expected import Expectation, Place
from pytest_roll_vllm.report import EXIT_INCOMPLETE
from roll_vllm.errors import ConfigurationError

HERE = Place("0.12.0.post2", "V1", "cpu", "vllm")
LINK = "upstream/project#1"
SOURCE = """
    import pytest
    from pytest_roll_vllm.contracts import contract

    @contract("a-one", "It does this.")
    @pytest.mark.parametrize("how", ["good", "bad"])
    def test_both(how): assert how == "good"

    @contract("b-two", "It does that.")
    def test_good(): pass

    @contract("b-three", "It does it all.")
    def test_bad(): assert ["wanted"] == ["found"]
"""


def entry(contract: str, outcome: str = "fail", **fields: Any) -> str:
    given = {"contract": contract, "outcome": outcome, "reason": "It cannot", "link": LINK, **fields}
    return "\n".join(["[[expect]]", *(f"{name} = {json.dumps(value)}" for name, value in given.items()), ""])


def write(*entries: str, name: str = "known.toml") -> str:
    Path(name).write_text("\n".join(entries))
    return f"--vllm-expectations={name}"


def outcomes(document: dict[str, Any]) -> dict[str, str]:
    return {id: one["outcome"] for id, one in document["contracts"].items()}


# -- the file -----------------------------------------------------------------------------------------------


def test_every_key(tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    path.write_text(
        "# first\n\n"
        + entry(
            "sl-*",
            "skip",
            test="test_it",
            versions=">=0.8,<0.10",
            backends=["cpu", "cpu-reference"],
            targets=["vllm", "mine:Target"],
            engine="V0",
        )
        + entry("wu-a")
    )
    assert expected.read(path) == [
        Expectation(
            "sl-*", "skip", "It cannot", LINK, f"{path}, entry 1 (line 3)", "test_it", ">=0.8,<0.10", ("V0",),
            ("cpu", "cpu-reference"), ("vllm", "mine:Target"),
        ),
        Expectation("wu-a", "fail", "It cannot", LINK, f"{path}, entry 2 (line 13)"),
    ]  # fmt: skip


def test_an_empty_file_expects_nothing(tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    path.write_text("# nothing\n")
    assert expected.read(path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[expect]", "known.toml is not TOML: *line 1, column *"),
        ("name = 1", "known.toml: unknown key 'name'; this file may have expect"),
        ("[expect]\ncontract = 'a'", "known.toml: 'expect' is no list of tables; head each entry with [[expect]]"),
        ("expect = [1]", "known.toml: 'expect' is no list of tables*"),
        (
            entry("a") + entry("b", versoins=">1"),
            "known.toml, entry 2 (line 6): unknown key 'versoins'; did you mean 'versions'?",
        ),
        (entry("a", colour="red"), "*entry 1 (line 1): unknown key 'colour'; an entry may have contract, outcome, *"),
        ("[[expect]]\ncontract = 'a'\noutcome='fail'", "*(line 1) has no reason, link; every entry has *"),
        (entry("a", reason=" "), "*: reason is ' '; give a text that is not empty*"),
        (entry("a", reason=3), "*: reason is 3; give a text*"),
        (entry("A b"), "*: contract is 'A b'; give an id*`pytest --vllm-contracts` lists them"),
        (entry("a", "xfail"), "*: outcome is 'xfail'; choose from fail, skip"),
        (entry("a", link="some day"), "*: link is 'some day'; give an address, https://..., or owner/repository#1*"),
        (entry("a", versions="0.12"), "*: versions: '0.12' is not a version specifier; *'>=0.10.2,<0.12'"),
        (entry("a", engine="V2"), "*: engine is 'V2'; choose from V0, V1"),
        (entry("a", backends=["tpu"]), "*: backends is 'tpu'; choose from cpu, cuda, rocm, npu, cpu-reference"),
        (entry("a", backends="cpu"), "*: backends is 'cpu'; give a list of texts, or leave it out for all"),
        (entry("a", targets=[]), "*: targets is []; give a list of texts, or leave it out for all"),
        (entry("a", test=""), "*: test is ''; give a text*"),
        ("expect = [{contract = 'a'}]", "known.toml, entry 1 has no outcome*"),
    ],
)
def test_what_is_wrong_ends_the_run_at_once(installed: Inner, text: str, message: str) -> None:
    result = installed.run(write(text), source=SOURCE)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    pattern = message.replace("[", "[[]").replace("/repository#1*", "/repository#*").removeprefix("known.toml")
    result.stderr.fnmatch_lines([f"ERROR: expectations from --vllm-expectations: {Path.cwd()}/known.toml{pattern}"])


@pytest.mark.parametrize(("make", "why"), [("missing", "No such file or directory"), ("directory", "Is a directory")])
def test_a_file_that_cannot_be_read(installed: Inner, make: str, why: str) -> None:
    if make == "directory":
        Path("known.toml").mkdir()
    result = installed.run("--vllm-expectations=known.toml", source=SOURCE)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*cannot read {Path.cwd()}/known.toml: {why}; give the path of a TOML file"])


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    path.write_bytes(b"# \xff\n")
    with pytest.raises(ConfigurationError, match="is not UTF-8"):
        expected.read(path)


@pytest.mark.parametrize(
    ("fields", "applies"),
    [
        ({}, True),
        ({"versions": ">=0.12,<0.13"}, True),
        ({"versions": "<0.12"}, False),
        ({"engines": ("V0",)}, False),
        ({"backends": ("cuda", "cpu")}, True),
        ({"backends": ("cpu-reference",)}, False),
        ({"targets": ("vllm",)}, True),
        ({"targets": ("roll_vllm",)}, False),
    ],
)
def test_where_it_applies(fields: dict[str, Any], applies: bool) -> None:
    assert Expectation("a", "fail", "r", "l", "s", **fields).applies(HERE) is applies


@pytest.mark.parametrize(
    ("contract", "test", "matches"),
    [
        ("wu-a-b", "*", True),
        ("wu-*", "test_it", True),
        ("wu-?-b", "test_it[[]x]", False),
        ("wu-a", "*", False),
        ("*", "test_it[x]", True),
        ("*", "test_it[*]", True),
        ("*", "test_it[y]", False),
        ("*", "test_i", False),
    ],
)
def test_what_it_matches(contract: str, test: str, matches: bool) -> None:
    assert Expectation(contract, "fail", "r", "l", "s", test).matches("wu-a-b", "t.py::test_it[x]") is matches


def test_the_files_of_this_package_are_right() -> None:
    files = sorted(Path(expected.__file__).with_name("expectations").iterdir())
    assert [path.suffix for path in files] == [".toml"] * len(files) != []
    for path in files:
        assert {entry.source for entry in expected.of_target(path.stem)} == {one.source for one in expected.read(path)}


def test_a_target_without_a_file_expects_nothing() -> None:
    assert [
        *expected.of_target("nothing"),
        *expected.of_target("../expectations/vllm"),
        *expected.of_target("a:B"),
    ] == []


# -- the judge ----------------------------------------------------------------------------------------------


def test_the_failure_of_an_expected_test_is_a_known_gap(installed: Inner) -> None:
    known = write(entry("b-three"), entry("a-one", test="test_both[bad]"))
    result = installed.run("--vllm-report=out", known, source=SOURCE)
    assert result.ret == 0
    result.assert_outcomes(passed=2, xfailed=2)
    result.stdout.fnmatch_lines(
        [
            f"expectations: {Path.cwd()}/known.toml (from --vllm-expectations)",
            f"KNOWN GAP a-one: It does this. - It cannot ({LINK}) (1 of 2 tests)",
            f"KNOWN GAP b-three: It does it all. - It cannot ({LINK})",
            "contracts: 1 passed, 2 known gap",
        ]
    )
    document = json.loads(Path("out/report.json").read_text())
    assert document["complete"]
    assert document["expectations"][0] == {
        "contract": "b-three",
        "test": "*",
        "outcome": "fail",
        "reason": "It cannot",
        "link": LINK,
        "source": f"{Path.cwd()}/known.toml, entry 1 (line 1)",
        "tests": 1,
        "unmatched": False,
    }
    assert r"- why: It cannot \(upstream/project\#1\)" in Path("out/report.md").read_text()


def test_a_success_is_a_failure(installed: Inner) -> None:
    result = installed.run("--vllm-backend=cpu", write(entry("a-one")), "-k", "a-one", source=SOURCE)
    assert result.ret == 1
    result.assert_outcomes(failed=1, xfailed=1, deselected=2)
    result.stdout.fnmatch_lines(
        [
            f"passed although {Path.cwd()}/known.toml, entry 1 (line 1) expects a-one to fail on 0.12.0 (V1, cpu): "
            f"It cannot ({LINK}). Take the entry out, or narrow it."
        ]
    )


def test_a_skip_is_neither_run_nor_a_pass(installed: Inner) -> None:
    known = write(entry("b-*", "skip"))
    result = installed.run("--vllm-report=out", "--junit-xml=junit.xml", known, "-k", "b-", source=SOURCE)
    assert result.ret == 0
    result.assert_outcomes(skipped=2, deselected=2)
    result.stdout.fnmatch_lines(
        [f"EXPECTED SKIP b-two: It does that. - It cannot ({LINK})", "contracts: 2 expected skip"]
    )
    document = json.loads(Path("out/report.json").read_text())
    assert outcomes(document) == {"b-two": "expected skip", "b-three": "expected skip"}
    assert document["complete"]
    assert "skipped as expected" in Path("out/report.html").read_text()
    assert f'<property name="vllm_expected_skip" value="It cannot ({LINK})"' in Path("junit.xml").read_text()


def test_a_contract_with_a_skipped_test_has_not_passed(installed: Inner) -> None:
    known = write(entry("a-one", "skip", test="test_both[bad]"))
    document = installed.report(known, "-k", "a-one", source=SOURCE)
    assert outcomes(document) == {"a-one": "expected skip"}


def test_the_first_entry_counts(installed: Inner) -> None:
    first = write(entry("b-three", "skip", versions="<0.12"), entry("b-three"), name="first.toml")
    second = write(entry("b-*", "skip"), name="second.toml")
    document = installed.report(first, second, "-k", "b-", source=SOURCE)
    assert outcomes(document) == {"b-three": "known gap", "b-two": "expected skip"}
    here = Path.cwd()
    assert document["settings"]["expectations"] == {
        "value": f"{here}/first.toml:{here}/second.toml",
        "source": "--vllm-expectations",
    }
    again = document["contracts"]["b-two"]["again"]
    assert f"--vllm-expectations {here}/first.toml --vllm-expectations {here}/second.toml" in again


@pytest.mark.parametrize("how", ["variable", "ini"])
def test_other_ways_to_give_files(installed: Inner, how: str) -> None:
    write(entry("b-three"), name="first.toml")
    write(entry("b-two", "skip"), name="second.toml")
    if how == "variable":
        installed.monkeypatch.setenv("PYTEST_VLLM_EXPECTATIONS", "first.toml:second.toml")
    else:
        installed.pytester.makeini("[pytest]\nvllm_expectations = first.toml:second.toml\n")
    document = installed.report("-k", "b-", source=SOURCE)
    assert outcomes(document) == {"b-three": "known gap", "b-two": "expected skip"}


def test_runxfail_expects_nothing(installed: Inner) -> None:
    known = write(entry("b-three"), entry("b-two", "skip"))
    result = installed.run("--runxfail", known, "-k", "b-", source=SOURCE)
    result.assert_outcomes(passed=1, failed=1, deselected=2)


def test_without_a_vllm_nothing_is_expected(inner: Inner) -> None:
    inner.no_vllm()
    source = SOURCE.replace("def test_bad()", "def test_bad(vllm_version)")
    result = inner.run(write(entry("b-three", "skip")), "-k", "b-three", source=source)
    assert result.ret == EXIT_INCOMPLETE


def test_the_file_of_a_target_is_used_with_it_alone(installed: Inner, tmp_path: Path) -> None:
    (tmp_path / "roll_vllm.toml").write_text(entry("b-three", targets=["roll_vllm"]))
    installed.monkeypatch.setattr("pytest_roll_vllm.expected._SHIPPED", tmp_path)
    assert outcomes(installed.report("-k", "b-three", source=SOURCE)) == {"b-three": "known gap"}
    installed.monkeypatch.setenv("PYTEST_VLLM_TARGET", "plugin_harness:Inner")
    installed.monkeypatch.setattr("pytest_roll_vllm.options.Settings.target_class", None)
    assert outcomes(installed.report("-k", "b-three", source=SOURCE)) == {"b-three": "failed"}


def test_workers_of_xdist_know_what_is_expected(installed: Inner) -> None:
    known = write(entry("b-three"), entry("b-two", "skip"), entry("a-one", test="test_both[bad]"))
    document = installed.report("-pxdist", "-n2", known, source=SOURCE)
    assert outcomes(document) == {"a-one": "known gap", "b-three": "known gap", "b-two": "expected skip"}
    assert [one["tests"] for one in document["expectations"]] == [1, 1, 1]


# -- what matches nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [[], ["-pxdist", "-n2"]])
def test_an_entry_that_matches_nothing_fails_the_whole_suite(installed: Inner, workers: list[str]) -> None:
    # What is skipped starts no engine.
    known = write(entry("*", "skip"), entry("sl-typo"), entry("wu-*", test="test_typo"), entry("sl", versions="<0.12"))
    result = installed.run(*workers, "--pyargs", "conformance", "--vllm-report=out", known)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    file = Path.cwd() / "known.toml"
    result.stdout.fnmatch_lines(
        [
            f"UNMATCHED sl-typo: {file}, entry 2 (line 7) expects something of the contract 'sl-typo', and the whole "
            "suite has none. Correct the name (`pytest --vllm-contracts` lists all), or take the entry out",
            f"UNMATCHED wu-[*]: {file}, entry 3 (line 13) expects something of the contract 'wu-[*]' and the test *",
            "contracts: * expected skip*",
        ]
    )
    document = json.loads(Path("out/report.json").read_text())
    assert [one["contract"] for one in document["expectations"] if one["unmatched"]] == ["sl-typo", "wu-*"]
    assert f"{file}, entry 2 (line 7): the whole suite has no test" in Path("out/report.html").read_text()


@pytest.fixture
def suite(installed: Inner) -> Inner:
    """A small suite in the current directory, and an entry that matches nothing in it."""
    installed.monkeypatch.setattr("pytest_roll_vllm.gaps._SUITE", Path.cwd())
    installed.pytester.makepyfile(test_suite=SOURCE, test_more="def test(): pass")
    installed.monkeypatch.setenv("PYTEST_VLLM_EXPECTATIONS", "known.toml")
    write(entry("*", "skip"), entry("sl-typo"))
    return installed


@pytest.mark.parametrize("whole", [["."], [".", "test_more.py"], [".", "-m", "vllm_contract or not vllm_contract"]])
def test_the_whole_suite(suite: Inner, whole: list[str]) -> None:
    result = suite.run(*whole)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["UNMATCHED sl-typo: *"])


@pytest.mark.parametrize(
    "narrowed",
    [
        ["test_suite.py"],
        [".", "-k", "not b-three"],
        [".", "-m", "vllm_contract"],
        [".", "--deselect=test_suite.py::test_bad"],
        [".", "--lf"],
        [".", "--ignore=test_more.py"],
        [".", "--ignore-glob=*_more.py"],
    ],
)
def test_a_narrowed_selection_leaves_entries_alone(suite: Inner, narrowed: list[str]) -> None:
    result = suite.run(*narrowed)
    assert result.ret == 0
    result.stdout.no_fnmatch_line("UNMATCHED*")


def test_workers_of_xdist_know_what_was_deselected(installed: Inner) -> None:
    known = write(entry("*", "skip"), entry("sl-typo"))
    result = installed.run("-pxdist", "-n1", "--pyargs", "conformance", "-k", "abort", known)
    assert result.ret == 0
    result.stdout.no_fnmatch_line("UNMATCHED*")


def test_an_entry_must_match_on_every_version_that_it_applies_to(inner: Inner) -> None:
    inner.fake_uv()
    known = write(entry("*", "skip"), entry("sl-typo", versions="<0.12"))
    versions = ("--vllm-version=0.11.0", "--vllm-version=0.12.0", "--vllm-backend=cpu")
    result = inner.run("-pxdist", "--vllm-provision", *versions, "--pyargs", "conformance", "--vllm-report=out", known)
    result.stdout.fnmatch_lines(["expectations: *", "UNMATCHED sl-typo [[]0.11.0-cpu[]]: *"])
    document = json.loads(Path("out/report.json").read_text())
    assert document["exit_status"] == pytest.ExitCode.TESTS_FAILED
    unmatched = [[one["contract"] for one in run["expectations"] if one["unmatched"]] for run in document["runs"]]
    assert unmatched == [["sl-typo"], []]
    assert document["totals"]["failed"] == document["totals"]["could not run"] == 0


def test_an_error_in_the_collection_leaves_entries_alone(suite: Inner) -> None:
    Path("test_more.py").write_text("import nothing_of_that_name")
    result = suite.run(".", "--continue-on-collection-errors")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.no_fnmatch_line("UNMATCHED*")


def test_all_entries_match(suite: Inner) -> None:
    write(entry("b-*", "skip"), entry("a-one", "skip", test="test_both"))
    assert suite.run(".").ret == 0
