"""The counting model, judged by ``transformers`` on the CPU: it counts, and every damage shows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch

from pytest_roll_vllm.models import make
from pytest_roll_vllm.models.counting import attention_gap
from pytest_roll_vllm.models.reference import ReferenceModel
from pytest_roll_vllm.models.synthetic import MAX_POSITION

DENSE = ("counting", "counting-tied")
EXPERTS = ("counting-moe", "counting-moe-tied", "counting-mixtral")
KINDS = DENSE + EXPERTS
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def every_token() -> list[int]:
    """Return 3 tokens of context, then each token once: one forward pass probes every last token."""
    return [7, 200, 7, *torch.randperm(256, generator=torch.Generator().manual_seed(0)).tolist()]


def margins(reference: ReferenceModel, tokens: list[int], step: int) -> torch.Tensor:
    """Return, per position, the logit of the right answer minus the highest of all others."""
    logits = reference.logits(tokens)
    answers = ((torch.tensor(tokens) + step) % 256)[:, None]
    right = logits.gather(1, answers)[:, 0]
    return right - logits.scatter(1, answers, -torch.inf).max(dim=1).values


def test_attention_looks_at_the_current_token() -> None:
    assert attention_gap() > 40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_counts_by_a_wide_margin(name: str, dtype: str, cache: Path) -> None:
    model = make(name, cache)
    reference = ReferenceModel(model, dtype)
    for version in (0, 1, 2, 7, 64, 128, 254, 255, 256, 1000):
        reference.load(model.weights(version))
        for tokens in (every_token(), [5] * 40, [3]):
            assert margins(reference, tokens, version).min() > 15


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_counts_up_to_the_longest_context(name: str, dtype: str, cache: Path) -> None:
    model = make(name, cache)
    reference = ReferenceModel(model, dtype)
    reference.load(model.weights(3))
    tokens = torch.randint(256, (MAX_POSITION,), generator=torch.Generator().manual_seed(0)).tolist()
    assert margins(reference, tokens, 3).min() > 15


@pytest.mark.parametrize("name", KINDS)
def test_probes_hold(name: str, cache: Path) -> None:
    model = make(name, cache)
    reference = ReferenceModel(model)
    probes = model.probes(7)
    assert len(probes) == 8
    assert max(len(probe.prompt_token_ids) for probe in probes) > 256
    for probe in probes:
        assert reference.greedy(probe.prompt_token_ids, 16, version=7) == probe.expected_token_ids


def _is_looked_at(name: str) -> bool:
    """Whether every damage to a tensor is tried: of four experts, to two."""
    return ".experts.2." not in name and ".experts.3." not in name


def stale(new: Weights, old: Weights) -> Iterator[tuple[str, Weights]]:
    """Yield (what, weights): a tensor of ``new``, some of its rows, or a group of tensors is from ``old``."""
    for name, tensor in new.items():
        half, quarter = len(tensor) // 2, len(tensor) // 4
        rows = {"all": slice(None), "first half": slice(half), "second half": slice(half, None)}
        rows |= {"every other": slice(None, None, 2), "last quarter": slice(-quarter, None)}
        # What of RoPE turns slowly tells no positions apart; and two experts stand for all.
        if name.endswith(("q_norm.weight", "k_norm.weight")) or not _is_looked_at(name):
            rows = {"all": slice(None)}
        for part, selection in rows.items():
            mixed = tensor.clone()
            mixed[selection] = old[name][selection]
            yield f"stale {name}, {part}", new | {name: mixed}
    groups = ("q_proj", "k_proj", "v_proj", "self_attn", "mlp", "layernorm", "layers.0", "layers.1")
    for group in (*groups, "moe", ".gate.", "experts.2."):
        members = {name: old[name] for name in new if group in name}
        if members:
            yield f"stale {group}", new | members


def missing(new: Weights) -> Iterator[tuple[str, Weights]]:
    """Yield (what, weights): one tensor holds what vLLM's dummy loader puts there."""
    for name, tensor in new.items():
        dummy = torch.empty_like(tensor).uniform_(-1e-3, 1e-3, generator=torch.Generator().manual_seed(0))
        yield f"missing {name}", new | {name: dummy}


def swapped(new: Weights) -> Iterator[tuple[str, Weights]]:
    """Yield (what, weights): two tensors of one shape in each other's place, or a square one transposed."""
    for one, other in combinations(filter(_is_looked_at, new), 2):
        if other == one.replace("q_norm", "k_norm"):
            continue  # they are multiplied element by element
        if new[one].shape == new[other].shape:
            yield f"swapped {one} and {other}", new | {one: new[other], other: new[one]}
        if one.endswith("q_proj.weight") and other == one.replace("q_proj", "k_proj"):
            rows = len(new[other])
            query = torch.cat([new[other], new[one][rows:]])
            yield f"swapped rows of {one} and {other}", new | {one: query, other: new[one][:rows]}
    for name, tensor in new.items():
        if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]:
            yield f"transposed {name}", new | {name: tensor.T}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [(name, 1, 2) for name in KINDS] + [("counting", 255, 127)],
)
def test_every_damage_shows(name: str, old: int, new: int, cache: Path) -> None:
    model = make(name, cache)
    reference = ReferenceModel(model)
    weights = model.weights(new)
    hidden = []
    for damages in (stale(weights, model.weights(old)), missing(weights), swapped(weights)):
        for what, damaged in damages:
            reference.load(damaged)
            for tokens in (every_token()[:35], every_token()):  # the first few show nearly all
                wrong = int((margins(reference, tokens, new)[3:] < 0).sum())
                if wrong >= 8:
                    break
            else:
                hidden.append((what, wrong))
    assert hidden == []
