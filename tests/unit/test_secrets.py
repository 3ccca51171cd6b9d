"""Reports hold no secrets of the environment they were made in, whatever tests and engines say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plugin_harness import Inner

from pytest_roll_vllm.report import PAGES
from pytest_roll_vllm.surroundings import VARIABLES, redacted, without_secrets

SECRETS = {
    "HF_TOKEN": "hf-made-up-value-1",
    "WANDB_API_KEY": "made-up-value-2",
    "AWS_SECRET_ACCESS_KEY": "made/up+value=3",
    "DB_PASSWORD": 'made up value "4"',
    "SIGNING_KEY": "made-up-value-5",
    "GOOGLE_CREDENTIALS": '{"made": "up-value-6"}',
    "REGISTRY_AUTH": "made-up-value-7",
}
SOURCE = """
import os
from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.report import note

@contract("a-fail", "It says too much.")
def test_fail(request):
    note(request.node, "engine starts", {"hf_token": "from-elsewhere", "environment": dict(os.environ), "seed": 3})
    values = " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()))
    assert False, values + " https://me:pass-8@host/ Authorization: Bearer abcdefgh.ijkl hf_" + "a1" * 17

@contract("b-setup", "Its fixture says too much.")
def test_setup(broken): pass

import pytest

@pytest.fixture
def broken():
    raise RuntimeError(repr(os.environ))
"""


@pytest.mark.parametrize("workers", [[], ["-pxdist", "-n1"]], ids=["alone", "xdist"])
def test_nothing_secret_in_a_report(installed: Inner, monkeypatch: pytest.MonkeyPatch, workers: list[str]) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PLAIN_VALUE", "stays-as-it-is")
    document = installed.report(*workers, source=SOURCE)
    (start,) = document["notes"]["engine starts"]
    assert (start["hf_token"], start["seed"]) == ("***", 3)
    assert start["environment"]["PLAIN_VALUE"] == "stays-as-it-is"
    assert "HF_TOKEN=***" in document["contracts"]["a-fail"]["reason"]
    for name in ("report.json", *PAGES):
        text = Path("out", name).read_text(encoding="utf-8")
        assert "stays-as-it-is" in text or name != "report.json"
        for number in range(1, 8):
            assert not any(f"{word}{number}" in text for word in ("value-", "value=", 'value \\"')), f"{name}: {number}"
        for secret in ("from-elsewhere", "pass-8", "abcdefgh.ijkl", "hf_a1a1"):
            assert secret not in text, name


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"tokenizer": "path", "max_tokens": 16, "seed": None}, {"tokenizer": "path", "max_tokens": 16, "seed": None}),
        ({"token": ""}, {"token": ""}),
        ({"api-key": "a"}, {"api-key": "***"}),
        ([{"deep": ["http://a:b@c/"]}], [{"deep": ["http://***@c/"]}]),
        ("x topsecret1 y", "x *** y"),
        ({"topsecret1": 1}, {"***": 1}),
        ("1 true", "1 true"),
        ((1, 2.5, True), [1, 2.5, True]),
        ("ghp_" + "a" * 36, "***"),
        ("sk-learn", "sk-learn"),
    ],
)
def test_redacted(value: Any, shown: Any) -> None:
    environ = {"MY_SECRET": "topsecret1", "USE_TOKEN": "1", "TOKENIZERS_PARALLELISM": "parallelism", "A_TOKEN": "true"}
    assert redacted(value, environ) == shown


def test_the_longer_of_two_secrets_goes_first() -> None:
    environ = {"A_TOKEN": "12345678", "B_TOKEN": "12345678-and-more"}
    assert redacted("12345678-and-more 12345678", environ) == "*** ***"


def test_an_option_for_a_tokenizer_is_no_secret() -> None:
    given = ["--tokenizer=path", "--hf-token=a", "--api-key", "b", "--private-key=c"]
    assert without_secrets(given) == ["--tokenizer=path", "--hf-token=***", "--api-key", "***", "--private-key=***"]


def test_no_listed_variable_sounds_secret() -> None:
    assert redacted(dict.fromkeys(VARIABLES, "value"), {}) == dict.fromkeys(VARIABLES, "value")
